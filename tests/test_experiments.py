"""The experiments: flags, what they submit to SLURM, and, marked slow, the whole chain with --tiny."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.stand_ins import add_program

SCRIPTS = ("armorm_multi_objective.sh", "openllm_leaderboard.sh")


def start(root: Path, script: str, cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(exist_ok=True, parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = kept | {"CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(
        ["bash", str(root / "experiments" / script), *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(root: Path, tmp_path: Path, script: str) -> None:
    done = start(root, script, tmp_path / "some where", "--help")
    assert done.returncode == 0, done.stderr
    text = (root / "experiments" / script).read_text(encoding="utf-8")
    names = re.search(r"^names=\(([^)]*)\)", text, re.MULTILINE)
    assert names is not None
    for name in names[1].split():
        assert f"--{name}" in done.stdout, name
    assert list((tmp_path / "some where").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        (SCRIPTS[0], ["--mixture=a"], "unknown flag: --mixture=a"),
        (SCRIPTS[0], ["--mixtures=kindness"], "mixture kindness"),
        (SCRIPTS[0], ["--methods=PPO"], "method PPO"),
        (SCRIPTS[0], ["--tiny=yes"], "--tiny=yes: give true or false"),
        (SCRIPTS[0], ["--part=everything"], "there is no such part"),
        (SCRIPTS[1], ["--sizes=2B"], "size 2B"),
        (SCRIPTS[1], ["--methods=KLDPO"], "method KLDPO: give its tau or rho"),
        (SCRIPTS[1], ["--model_path=a/b"], "--model_path is one model"),
    ],
)
def test_wrong_words_end_before_anything_runs(root: Path, tmp_path: Path, script: str, words: list[str], says: str) -> None:
    done = start(root, script, tmp_path, *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_folder_takes_one_set_of_flags(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "my experiment"
    output.mkdir()
    (output / "settings").write_text("seeds=1\n")
    done = start(root, SCRIPTS[0], tmp_path, f"--output_path={output}")
    assert done.returncode == 2
    assert "was made with other flags" in done.stderr
    assert (output / "settings").read_text() == "seeds=1\n"


def test_jobs_that_begin_together_agree_on_the_flags(root: Path, tmp_path: Path) -> None:
    """The file of the flags is written once, whole: a job never reads what another is about to write anew."""
    output, words = tmp_path / "my experiment", ["--part=none", "--seeds=1"]
    asked = [start(root, SCRIPTS[0], tmp_path, f"--output_path={output}", *words) for _ in range(2)]
    assert all("there is no such part" in done.stderr for done in asked), "past the comparison of the flags"
    written = (output / "settings").stat()
    start(root, SCRIPTS[0], tmp_path, f"--output_path={output}", *words)
    assert (output / "settings").stat().st_mtime_ns == written.st_mtime_ns
    assert [path.name for path in output.iterdir()] == ["settings"]
    script = [root / "experiments" / SCRIPTS[0], f"--output_path={output}", *words]
    many = [subprocess.Popen(["bash", *map(str, script)], cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    assert all("there is no such part" in process.communicate()[1] for process in many)


def submitted(root: Path, tmp_path: Path, script: str, *words: str) -> dict[str, tuple[str, list[str], list[str]]]:
    """{part: (id, ids it waits for, words of its command)} of what went to a stand-in for sbatch."""
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
    assert len(jobs) == 1 + 3 * 3 * 2 + 1
    data, _, words = jobs["data"]
    assert words[:3] == ["exec", "bash", str(root / "experiments" / SCRIPTS[0])]
    assert words[-4:-1] == ["--output_path=my out", "--", "--zero_stage=1"]
    trainings = {part: job for part, job in jobs.items() if "/" in part}
    assert all(waits == [data] for _, waits, _ in trainings.values())
    assert jobs["report"][1] == [number for number, _, _ in trainings.values()]
    assert "correctness_helpfulness/WDPO/2" in trainings


def test_jobs_of_the_leaderboard(root: Path, tmp_path: Path) -> None:
    jobs = submitted(root, tmp_path, SCRIPTS[1], "--sizes=1B 8B", "--sbatch=--gres=gpu:2 --partition=long")
    assert jobs["evaluate/1B/base"][1] == []
    assert jobs["train/8B/KLDPO=0.01"][1] == [jobs["data/8B"][0]]
    assert jobs["evaluate/8B/KLDPO=0.01"][1] == [jobs["train/8B/KLDPO=0.01"][0]]
    assert "train/8B/WDPO=0.01" not in jobs
    assert len(jobs["report"][1]) == 8
    assert "--gres=gpu:2" in (tmp_path / "jobs").read_text().split("\0")


def test_a_preempted_part_is_queued_again(root: Path, tmp_path: Path) -> None:
    """SIGUSR1 from SLURM reaches the command of the part; the job is queued again."""
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
def test_tiny_chain(clone: Path, tiny_policy: Path, tmp_path: Path, script: str) -> None:
    """The whole chain on a random policy with even smaller numbers, then once more: every step is skipped.

    Sampling is by transformers, which --engine=auto takes for answers this short on a CPU.
    """
    output = tmp_path / "my out"
    words = [
        "--tiny",
        f"--output_path={output}",
        f"--model_path={tiny_policy}",
        "--prompts=4",
        "--max_new_tokens=12",
        "--best_of_n=2",
        "--max_len=256",
    ]
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
        assert "A trial" in text
        checkpoint = next((output / "tiny" / "DPO").glob("global_step_*"))
        results = json.loads((output / "tiny" / "leaderboard" / "DPO" / "last" / "results.json").read_text())
        assert results["n-samples"]["stand_in_choice"]["effective"] == 3
    weights = checkpoint / "model.safetensors"
    made = weights.stat().st_mtime_ns
    again = start(clone, script, tmp_path / "else where", *words)
    assert again.returncode == 0, again.stderr[-3000:]
    assert weights.stat().st_mtime_ns == made
