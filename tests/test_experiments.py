"""The experiments: flags, what they submit to SLURM, and, marked slow, the whole chain with --tiny."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.stand_ins import add_program

SCRIPTS = ("armorm_multi_objective.sh", "openllm_leaderboard.sh")
MIXTURES = ("truthfulness_complexity", "helpfulness_coherence", "correctness_helpfulness")


def start(root: Path, script: str, cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(exist_ok=True, parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = kept | {"CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(
        ["bash", str(root / "experiments" / script), *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_flags_and_defaults(root: Path, tmp_path: Path, script: str) -> None:
    done = start(root, script, tmp_path / "some where", "--help")
    assert done.returncode == 0, done.stderr
    for name in ("output_path", "model_path", "methods", "kldpo_tau" if script == SCRIPTS[0] else "tasks", "tiny", "slurm"):
        assert f"--{name}" in done.stdout, name
    assert f'--reward_model="{root}/models/ArmoRM"' in done.stdout
    assert list((tmp_path / "some where").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        (SCRIPTS[0], ["--mixture=a"], "unknown flag: --mixture=a"),
        (SCRIPTS[0], ["seeds"], "unknown argument: seeds"),
        (SCRIPTS[0], ["--mixtures=kindness"], "unknown mixture kindness"),
        (SCRIPTS[0], ["--methods=PPO"], "unknown method PPO"),
        (SCRIPTS[0], ["--tiny=yes"], "--tiny=yes: pass true or false"),
        (SCRIPTS[0], ["--part=everything"], "--part=everything: no such part"),
        (SCRIPTS[1], ["--sizes=2B"], "unknown size 2B"),
        (SCRIPTS[1], ["--methods=KLDPO"], "method KLDPO: pass DPO, or KLDPO or WDPO with its tau or rho"),
        (SCRIPTS[1], ["--model_path=a/b"], "--model_path is one model"),
    ],
)
def test_wrong_flags_end_before_anything_runs(root: Path, tmp_path: Path, script: str, words: list[str], says: str) -> None:
    done = start(root, script, tmp_path, *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert not list(tmp_path.rglob("*.jsonl"))


def submitted(root: Path, tmp_path: Path, script: str, *words: str) -> dict[str, tuple[str, list[str], list[str]]]:
    """{part: (id, ids of its dependencies, arguments of its command)} of the jobs that a stand-in for sbatch received."""
    binaries = tmp_path / "binaries"
    add_program(binaries, "sbatch", "slurm/sbatch")
    jobs = tmp_path / "jobs"
    done = start(
        root, script, tmp_path / "my place", "--slurm", *words, JOBS=str(jobs), PATH=f"{binaries}:{os.environ['PATH']}"
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for line in jobs.read_text().split("\0\n"):
        if not line:
            continue
        number, *options = line.split("\0")
        assert "--requeue" in options and "--signal=B:USR1@300" in options
        waits = next((option.partition("afterok:")[2].split(":") for option in options if "afterok" in option), [])
        command = options[options.index("--wrap") + 1]
        unquoted = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout.split(
            "\n"
        )
        part = next(word for word in unquoted if word.startswith("--part=")).removeprefix("--part=")
        found[part] = (number, waits, unquoted)
    return found


def test_jobs_of_the_mixtures(root: Path, tmp_path: Path) -> None:
    jobs = submitted(root, tmp_path, SCRIPTS[0], "--seeds=1 2", "--output_path=my out", "--", "--zero_stage=1")
    assert len(jobs) == 1 + 3 * 3 * 2 + 3 + 1
    data, _, words = jobs["data"]
    assert words[:3] == ["exec", "bash", str(root / "experiments" / SCRIPTS[0])]
    assert words[-4:-1] == ["--output_path=my out", "--", "--zero_stage=1"]
    trainings = {part: job for part, job in jobs.items() if "/" in part}
    assert all(waits == [data] for _, waits, _ in trainings.values())
    last = [number for part, (number, _, _) in trainings.items() if part.startswith("correctness_helpfulness/")]
    assert len(last) == 6 and jobs["correctness_helpfulness"][1] == last
    assert jobs["report"][1] == [jobs[mixture][0] for mixture in MIXTURES]


def test_jobs_of_the_leaderboard(root: Path, tmp_path: Path) -> None:
    jobs = submitted(root, tmp_path, SCRIPTS[1], "--sizes=1B 8B", "--sbatch=--gres=gpu:2 --partition=long")
    assert jobs["evaluate/1B/base"][1] == []
    assert jobs["train/8B/KLDPO=0.01"][1] == [jobs["data/8B"][0]]
    assert jobs["evaluate/8B/KLDPO=0.01"][1] == [jobs["train/8B/KLDPO=0.01"][0]]
    assert "train/8B/WDPO=0.01" not in jobs
    assert len(jobs["report"][1]) == 8
    assert "--gres=gpu:2" in (tmp_path / "jobs").read_text().split("\0")


def test_a_part_requeues_itself_before_the_time_limit(root: Path, tmp_path: Path) -> None:
    """SIGUSR1 reaches the running command, and the job requeues itself."""
    tree = tmp_path / "my clone"
    shutil.copytree(root / "experiments", tree / "experiments")
    (tree / "src").mkdir()
    shutil.copy(root / "src" / "env.sh", tree / "src" / "env.sh")
    (tree / "openllm_eval.slurm").write_text("trap 'exit 75' USR1\nkill -USR1 \"$PPID\"\nsleep 20 >/dev/null 2>&1 & wait\n")
    binaries = tmp_path / "binaries"
    add_program(binaries, "scontrol", "slurm/scontrol")
    done = start(
        tree, SCRIPTS[1], tmp_path, "--part=evaluate/1B/base", SLURM_JOB_ID="7", PATH=f"{binaries}:{os.environ['PATH']}"
    )
    assert "scontrol requeue 7" in done.stdout
    assert done.returncode == 75


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_tiny_chain_runs_and_skips_its_steps_again(clone: Path, tiny_policy: Path, tmp_path: Path, script: str) -> None:
    """The whole chain on a random policy at even smaller sizes, then again: every step is skipped.

    --engine=auto samples with transformers for answers this short on a CPU.
    """
    output = tmp_path / "my out"
    words = [
        "--tiny", f"--output_path={output}", f"--model_path={tiny_policy}", "--prompts=4", "--max_new_tokens=12",
        "--best_of_n=2", "--max_len=256",
    ]  # fmt: skip
    if script == SCRIPTS[0]:
        words += ["--eval_best_of_n=1", "--mixtures=correctness_helpfulness", "--methods=KLDPO"]
    else:
        words += ["--methods=DPO", "--limit=3"]
    done = start(clone, script, tmp_path / "else where", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "--engine=auto is transformers" in done.stdout
    assert "setup.sh --models=embedded --datasets=embedded" in done.stdout
    text = (output / "report.md").read_text(encoding="utf-8")
    if script == SCRIPTS[0]:
        assert "## correctness + helpfulness" in text
        assert "KLDPO, published" in text
        whole = (output / "correctness_helpfulness" / "report" / "report.md").read_text(encoding="utf-8")
        assert "`helpsteer_coherence` *unseen*" in whole
        assert (output / "correctness_helpfulness" / "report" / "alpha.png").is_file()
        checkpoint = next((output / "correctness_helpfulness" / "KLDPO_seed_42").glob("global_step_*"))
        assert (output / "spiders.png").is_file()
    else:
        for run in ("tiny/base", "tiny/DPO step last"):
            assert f"| {run} | stand_in_choice |" in text
        assert "**Trial" in text
        checkpoint = next((output / "tiny" / "DPO").glob("global_step_*"))
        results = json.loads((output / "tiny" / "leaderboard" / "DPO" / "last" / "results.json").read_text())
        assert results["n-samples"]["stand_in_choice"]["effective"] == 3
    weights = checkpoint / "model.safetensors"
    made = weights.stat().st_mtime_ns
    again = start(clone, script, tmp_path / "else where", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert weights.stat().st_mtime_ns == made
