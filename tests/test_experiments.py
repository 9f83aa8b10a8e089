"""The experiments: flags, what they submit to SLURM, and, marked slow, the whole chain with --tiny."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import label_shift
import numpy as np
import pytest
from harness.stand_ins import add_program
from parts import checkpoint

from drdpo.cli import parse
from drdpo.config.training import TrainConfig
from drdpo.errors import DataError
from drdpo.evaluation.statistics import Layout
from drdpo.records import write_rows
from drdpo.training.losses import method_of

SCRIPTS = ("armorm_multi_objective.sh", "openllm_leaderboard.sh", "preference_shift.sh")


def start(root: Path, script: str, cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(exist_ok=True, parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = kept | {"CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(
        ["bash", str(root / "experiments" / script), *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(("script", "own"), zip(SCRIPTS, ("kldpo_tau", "tasks", "objectives"), strict=True))
def test_help_shows_flags_and_defaults(root, tmp_path, script, own):
    done = start(root, script, tmp_path / "some where", "--help")
    assert done.returncode == 0, done.stderr
    for name in ("output_path", "model_path", "methods", own, "tiny", "slurm"):
        assert f"--{name}" in done.stdout, name
    assert f"{root}/models/ArmoRM" in "".join(done.stdout.split())
    assert list((tmp_path / "some where").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        (0, ["--mixture=a"], "unrecognized arguments: --mixture=a"),
        (0, ["seeds"], "unrecognized arguments: seeds"),
        (0, ["--mixtures=kindness"], "unknown mixture kindness"),
        (0, ["--methods=PPO"], "unknown method PPO"),
        (0, ["--tiny=maybe"], "argument --tiny: 'maybe' is neither true nor false"),
        (0, ["--part=everything"], "--part=everything: no such part"),
        (1, ["--sizes=2B"], "unknown size 2B"),
        (1, ["--methods=KLDPO"], "method KLDPO: pass DPO, or KLDPO or WDPO with its tau or rho"),
        (1, ["--model_path=a/b"], "--model_path is one model"),
        (2, ["--methods=DPO PPO"], "unknown method PPO"),
        (2, ["--methods=DPO KLDPO"], "--geometric_methods has WDPO, which --methods lacks"),
        (2, ["--methods=KLDPO", "--geometric_methods=KLDPO"], "DPO is what the others are compared with"),
        (2, ["--alpha=0.15"], "--alpha=0.15: pass 0, 0.1, ... or 1"),
        (2, ["--forms=linear cubic"], "unknown form cubic"),
    ],
)  # fmt: skip
def test_wrong_flags_end_before_anything_runs(root, tmp_path, script, words, says):
    done = start(root, SCRIPTS[script], tmp_path, *words)
    assert done.returncode == 2 and says in done.stderr
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(("number", "found"), [("last", "10"), ("9", "9"), ("10_merged", None)])
def test_only_the_trainers_own_folders_are_checkpoints(tmp_path, number, found):
    for name in ("9", "10", "10_merged"):
        (tmp_path / f"global_step_{name}").mkdir()
    if found:
        assert checkpoint(tmp_path, number) == tmp_path / f"global_step_{found}"
    else:
        with pytest.raises(DataError, match="no checkpoint of step 10_merged; found: 9, 10"):
            checkpoint(tmp_path, number)


def submitted(root: Path, tmp_path: Path, script: str, *words: str) -> dict[str, tuple[str, list[str], list[str]]]:
    """{part: (id, ids of its dependencies, arguments of its command)} of the jobs that a stand-in for sbatch received."""
    binaries, jobs, found = tmp_path / "binaries", tmp_path / "jobs", {}
    add_program(binaries, "sbatch", "slurm/sbatch")
    place = {"JOBS": str(jobs), "PATH": f"{binaries}:{os.environ['PATH']}"}
    done = start(root, script, tmp_path / "my place", "--slurm", *words, **place)
    assert done.returncode == 0, done.stderr
    for line in filter(None, jobs.read_text().split("\0\n")):
        number, *options = line.split("\0")
        assert "--requeue" in options and "--signal=B:USR1@300" in options
        waits = next((option.partition("afterok:")[2].split(":") for option in options if "afterok" in option), [])
        unquoted = shlex.split(options[options.index("--wrap") + 1])
        part = next(word for word in unquoted if word.startswith("--part=")).removeprefix("--part=")
        found[part] = (number, waits, unquoted)
    return found


def test_jobs_of_the_mixtures(root, tmp_path):
    jobs = submitted(root, tmp_path, SCRIPTS[0], "--seeds=1 2", "--output_path=my out", "--", "--zero_stage=1")
    data, _, words = jobs["data"]
    assert words[:3] == ["exec", "bash", str(root / "experiments" / SCRIPTS[0])]
    assert words[-3:] == ["--output_path=my out", "--", "--zero_stage=1"]
    trainings = {part: job for part, job in jobs.items() if "/" in part}
    assert len(jobs) == 1 + 3 * 3 * 2 + 3 + 1 and all(waits == [data] for _, waits, _ in trainings.values())
    last = [number for part, (number, _, _) in trainings.items() if part.startswith("correctness_helpfulness/")]
    assert len(last) == 6 and jobs["correctness_helpfulness"][1] == last
    mixtures = ("truthfulness_complexity", "helpfulness_coherence", "correctness_helpfulness")
    assert jobs["report"][1] == [jobs[mixture][0] for mixture in mixtures]


def test_jobs_of_the_leaderboard(root, tmp_path):
    jobs = submitted(root, tmp_path, SCRIPTS[1], "--sizes=1B 8B", "--sbatch=--gres=gpu:2 --partition=long")
    assert jobs["evaluate/1B/base"][1] == []
    assert jobs["train/8B/KLDPO=0.01"][1] == [jobs["data/8B"][0]]
    assert jobs["evaluate/8B/KLDPO=0.01"][1] == [jobs["train/8B/KLDPO=0.01"][0]]
    assert "train/8B/WDPO=0.01" not in jobs
    assert len(jobs["report"][1]) == 8
    assert "--gres=gpu:2" in (tmp_path / "jobs").read_text().split("\0")


def test_jobs_of_the_preference_shift(root, tmp_path):
    words = ["--methods=DPO KLDPO WDPO", "--seeds=1 2", "--lora_rank=0", "--", "--zero_stage=3"]
    jobs = submitted(root, tmp_path, SCRIPTS[2], *words)
    assert len(jobs) == 1 + 4 + 1 + 2 * 3 * 2 + 1  # data, two trials of KLDPO and WDPO, choose, runs of both forms, report
    assert jobs["choose"][1] == [number for part, (number, _, _) in jobs.items() if part.startswith("trials/")]
    assert jobs["geometric/WDPO/2"][1] == [jobs["choose"][0]]
    assert len(jobs["report"][1]) == 12


def test_a_part_requeues_itself_before_the_time_limit(root, tmp_path):
    """SIGUSR1 reaches the running command, and the job requeues itself."""
    tree = tmp_path / "my clone"
    shutil.copytree(root / "experiments", tree / "experiments")
    shutil.copytree(root / "src", tree / "src")
    asks = "kill -USR1 $(cut -d' ' -f4 /proc/$PPID/stat)"  # SLURM signals the job's shell, which started the experiment
    (tree / "openllm_eval.slurm").write_text(f"trap 'exit 75' USR1\n{asks}\nsleep 20 >/dev/null 2>&1 & wait\n")
    path = f"{add_program(tmp_path / 'bin', 'scontrol', 'slurm/scontrol').parent}:{os.environ['PATH']}"
    done = start(tree, SCRIPTS[1], tmp_path, "--part=evaluate/1B/base", SLURM_JOB_ID="7", PATH=path)
    assert done.returncode == 75 and "scontrol requeue 7" in done.stdout


@pytest.mark.slow
def test_the_tiny_preference_shift(clone, tiny_policy, tmp_path):
    """Data, trials, choice, runs of both forms, report and picture; then again, without a training."""
    output = tmp_path / "my out"
    words = ["--tiny", f"--output_path={output}", f"--model_path={tiny_policy}", "--max_new_tokens=8", "--methods=DPO cDPO"]
    done = start(clone, SCRIPTS[2], tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = json.loads((output / "report.json").read_text())
    linear, geometric = (stored["results"][form] for form in ("linear", "geometric"))
    assert set(stored["trials"]["cDPO"]) == {"0.1", "0.3"} and stored["strengths"]["cDPO"] in ("0.1", "0.3")
    assert set(linear["gain"]) == {"DPO", "cDPO"} and set(geometric["gain"]) == {"DPO"}
    assert linear["steps"] == [0, 1, 2] and linear["seeds"] == 2
    assert f"report: {output / 'report.md'}" in done.stdout
    assert "| cDPO" in (output / "report.md").read_text() and (output / "report.png").read_bytes()[:4] == b"\x89PNG"
    metrics = output / "runs" / "geometric" / "DPO_43" / "metrics.jsonl"
    made = metrics.stat().st_mtime_ns
    again = start(clone, SCRIPTS[2], tmp_path, *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert metrics.stat().st_mtime_ns == made and "nothing to do" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_the_tiny_chain_runs_and_skips_its_steps_again(clone, tiny_policy, tmp_path, script):
    """On a random policy at even smaller sizes; --engine=auto is transformers for answers this short on a CPU."""
    output, mixtures = tmp_path / "my out", script == SCRIPTS[0]
    words = ["--tiny", f"--output_path={output}", f"--model_path={tiny_policy}", "--prompts=4", "--max_new_tokens=12",
             "--best_of_n=2", "--max_len=256"]  # fmt: skip
    words += ["--eval_best_of_n=1", "--mixtures=correctness_helpfulness"] if mixtures else ["--limit=3"]
    words.append("--methods=KLDPO" if mixtures else "--methods=DPO")
    done = start(clone, script, tmp_path / "else where", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--engine=auto is transformers" in done.stdout
    assert "setup.sh --models=embedded --datasets=embedded" in done.stdout
    text = (output / "report.md").read_text(encoding="utf-8")
    if mixtures:
        assert "## correctness + helpfulness" in text and "KLDPO, published" in text
        whole = (output / "correctness_helpfulness" / "report" / "report.md").read_text(encoding="utf-8")
        assert "`helpsteer_coherence` *unseen*" in whole
        assert (output / "spiders.png").is_file()
    else:
        assert all(f"| {run} | stand_in_choice |" in text for run in ("tiny/base", "tiny/DPO step last"))
        assert "**Trial" in text
        results = json.loads((output / "tiny" / "leaderboard" / "DPO" / "last" / "results.json").read_text())
        assert results["n-samples"]["stand_in_choice"]["effective"] == 3
    place = "correctness_helpfulness/KLDPO_seed_42" if mixtures else "tiny/DPO"
    (weights,) = output.glob(f"{place}/global_step_*/model.safetensors")
    made = weights.stat().st_mtime_ns
    again = start(clone, script, tmp_path / "else where", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert weights.stat().st_mtime_ns == made


# The study of people's labels


def write_ratings(folder: Path) -> Path:
    """HelpSteer2-like rows: 16 pairs that can be used, three of them without a difference, and four prompts that cannot."""
    rows = []
    for number, answer in itertools.product(range(16), range(2)):
        high = {"verbosity": 2 + answer, "helpfulness": 4 - answer * (number % 2)} if number % 5 else {}
        words = "so long a text " * (1 + 2 * answer)
        rows.append({"prompt": f"Question {number}?", "response": f"Answer {answer}, {words}.", **high})
    turns, long = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "word " * 99
    others = [("Alone?", "Yes."), *((turns, end) for end in "de"), *[("Same?", "Yes.")] * 2]
    others += [("Long?", long + end) for end in "ab"]
    rows += [{"prompt": prompt, "response": response} for prompt, response in others]
    for split, part in (("train", rows[:20]), ("validation", rows[20:])):
        write_rows(folder / f"{split}.jsonl", [dict.fromkeys(label_shift.RATINGS, 2) | row for row in part])
    return folder


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--first=kindness"], 2, "is not one of helpfulness"), (["--first=verbosity"], 2, "are both verbosity"),
        (["--methods", "WDPO"], 2, "--methods: pass DPO first"), (["--seeds=1"], 2, "--seeds: pass at least two"),
        (["--methods", "DPO", "PPO"], 2, "--methods: pass DPO first, then any of DPO, cDPO"),
        (["--results=nowhere/x"], 2, "no folder nowhere"), (["--data=no/such"], 1, "neither a folder nor on the hub"),
        (["--train_pairs=20"], 1, "16 rated pairs have at most 100 tokens, too few for --train_pairs and --test_pairs"),
        (["--data=bad"], 1, 'train.jsonl, row 1: not a rated answer as in HelpSteer2: field "scores"'),
    ],
)  # fmt: skip
def test_wrong_flags_and_ratings_of_the_study_are_refused(forks, smollm, tmp_path, words, status, says):
    write_ratings(tmp_path / "ratings")
    write_rows(tmp_path / "bad" / "train.jsonl", [{"prompt": "a", "response": "b", "helpfulness": 1}])
    common = ["--data=ratings", f"--model_path={smollm}", "--output_path=out", "--results=r", "--max_tokens=100"]
    script = [sys.executable, label_shift.__file__, *common, *words]
    done = forks.run(script, cwd=tmp_path)
    error = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == status and len(error) == 1 and says in error[0], done.stderr
    assert not list(tmp_path.rglob("study.json"))


def test_the_methods_of_the_study_are_six_of_the_trainers():
    paths = ["--model_path=m", "--dataset_path=d", "--save_path=s"]
    configs = [parse(TrainConfig, "", [*paths, *flags]) for flags in label_shift.METHODS.values()]
    assert [method_of(config).name for config in configs] == ["DPO", "DPO", "Dr. DPO", "KLDPO", "CVaR", "WDPO"]
    assert configs[1].label_smoothing == 0.1


def test_the_study_by_hand():
    """Two seeds, three held-out pairs, of which the second is labelled at some alphas only, and the first changes sides."""
    labels = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, -1], [-1, 0, 1]], dtype=float)
    margins = {"DPO": np.array([[2.0, -1, 0.5], [1, -2, 0.5]]), "other": np.array([[1.0, 1, 1], [1, 1, 1]])}
    found = label_shift.summarise(labels, margins)
    loss = {x: math.log1p(math.exp(-x)) for x in (2, -1, 0.5, 1, -2, -0.5)}
    first = (loss[2] + loss[-1] + loss[1] + loss[-2] + 2 * loss[0.5]) / 6
    assert found["DPO"]["loss"]["alphas"][0] == pytest.approx(first)
    assert found["DPO"]["accuracy"]["alphas"] == pytest.approx([2 / 3, 2 / 3, 1, 1 / 2, 1 / 2])
    assert found["DPO"]["accuracy"]["worst"] == 0.5 and "against_dpo" not in found["DPO"]["accuracy"]
    assert found["other"]["loss"]["alphas"] == pytest.approx([loss[1]] * 3 + [(loss[1] + loss[-1]) / 2] * 2)
    assert found["other"]["loss"]["against_dpo"][0][0] == pytest.approx(loss[1] - first)
    worst = found["other"]["loss"]["worst"] - found["DPO"]["loss"]["worst"]
    value, low, high = found["other"]["loss"]["against_dpo"][5]
    assert value == pytest.approx(worst) and low < value < high


def test_the_detectable_difference_by_hand():
    """Equal spreads of 0.01 over 31 pairs and 0.01 over the mean of 3 seeds: t is 2.042 and 4.303."""
    draws, seeds = np.array([-0.1, 0.1] * 500), np.array([-1, 0, 1]) * math.sqrt(0.03)
    found = label_shift.detectable(np.concatenate([[0.0], draws, seeds]), Layout(31, 1000, (3,)))
    assert found == pytest.approx(0.1 * math.sqrt(2.042**2 + 4.303**2) + 0.84 * 0.1 * math.sqrt(2), rel=1e-3)


@pytest.mark.slow
def test_the_study_of_labels_continues_and_agrees_with_the_trainer(clone, tiny_policy, tmp_path):
    write_ratings(tmp_path / "my ratings")
    words = [
        "--data=my ratings", f"--model_path={tiny_policy}", "--output_path=out", "--results=found", "--max_tokens=150",
        "--train_pairs=8", "--test_pairs=8", "--train_batch_size=3", "--max_steps=2", "--seeds", "1", "2",
        "--methods", "DPO", "cDPO", "WDPO",
    ]  # fmt: skip
    begun = start(clone, "label_shift.sh", tmp_path, *words, "--seconds=0")
    assert begun.returncode == 0 and "0 of 6 runs are finished; rerun" in begun.stdout, begun.stderr[-3000:]
    done = start(clone, "label_shift.sh", tmp_path, *words, DRDPO_PROCESSES="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^== WDPO/2 \([1-9]\d* s\)$", done.stdout, re.MULTILINE)
    assert not list((tmp_path / "out").rglob("resume*"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ratings"]["rated_pairs"] == 16 and sum(found["ratings"]["pairs"].values()) == 12
    # Where helpfulness differs, it disagrees with verbosity.
    place = [label_shift.RATINGS.index(name) for name in ("helpfulness", "verbosity")]
    differ, against = (found["ratings"][name][place[0]][place[1]] for name in ("both_differ", "disagree"))
    assert differ == against > 0 and min(found["ratings"]["correlations"][place[0]]) < 0
    as_in_training = found["ratings"]["as_in_training"]
    assert as_in_training[0] == found["ratings"]["pairs"]["test"] and as_in_training[4] == 0
    assert (tmp_path / "found.png").stat().st_size > 10_000
    for number, alpha in enumerate(label_shift.ALPHAS):
        trainers = [found["runs"][f"DPO, seed {seed}"]["metrics"][f"eval_loss.alpha_{alpha * 100:g}"] for seed in (1, 2)]
        assert found["methods"]["DPO"]["loss"]["alphas"][number] == pytest.approx(np.mean(trainers), rel=1e-4)
    assert list(found["methods"]) == ["DPO", "cDPO", "WDPO"]
    assert found["runs"]["DPO, seed 1"]["margins"] != found["runs"]["DPO, seed 2"]["margins"]
    again = start(clone, "label_shift.sh", tmp_path, *words, "--seconds=0")
    assert again.returncode == 0 and json.loads((tmp_path / "found.json").read_text()) == found
    other = start(clone, "label_shift.sh", tmp_path, *words, "--alpha=0.2")
    assert other.returncode == 2 and "contains results from a different configuration" in other.stderr
