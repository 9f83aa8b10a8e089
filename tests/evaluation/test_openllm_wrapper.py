"""openllm_eval.slurm with a fake python and nvidia-smi: what it starts, from where, and under sbatch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.stand_ins import make_environment


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """An environment whose python prints its words."""
    return make_environment(tmp_path / "fake env", {"python": "machine/printer", "nvidia-smi": "machine/nvidia-smi"})


def start(
    script: Path, fakes: Path, cwd: Path, *words: str, gpus: int = 0, **variables: str
) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_", "DRDPO_"))}
    environment = kept | {"DRDPO_ENV": str(fakes), "SMI_GPUS": "\n".join(["fake"] * gpus)} | variables
    return subprocess.run(["bash", str(script), *words], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.parametrize("gpus", [0, 1])
def test_one_process_needs_no_launcher(root: Path, fakes: Path, tmp_path: Path, gpus: int) -> None:
    done = start(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=my model", "--limit", "2", gpus=gpus)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"python [{root}/src/evaluate_openllm.py] [--model_path=my model] [--limit] [2] WORLD_SIZE=\n"


def test_hf_on_several_gpus_is_data_parallel(root: Path, fakes: Path, tmp_path: Path) -> None:
    done = start(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=my model", gpus=4)
    assert done.returncode == 0, done.stderr
    script = f"[{root}/src/evaluate_openllm.py] [--model_path=my model]"
    check, launched = done.stdout.splitlines()
    assert check == f"python {script} [--check_only=true] WORLD_SIZE=4"
    assert launched.startswith(f"python [-P] [{root}/src/drdpo/launch.py] [--standalone]")
    assert "[--nproc-per-node=4] [--log-dir=/dev/null]" in launched
    assert script in launched


@pytest.mark.parametrize("words", [("--backend=vllm",), ("--backend", "vllm")])
def test_vllm_is_one_process(root: Path, fakes: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = start(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=m", *words, gpus=4)
    assert done.stdout.startswith("python [")
    assert "launch.py" not in done.stdout


def test_hidden_gpus_do_not_count(root: Path, fakes: Path, tmp_path: Path) -> None:
    done = start(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=m", gpus=4, CUDA_VISIBLE_DEVICES="1")
    assert "launch.py" not in done.stdout
    done = start(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=m", gpus=4, CUDA_VISIBLE_DEVICES="1,3")
    assert "[--nproc-per-node=2]" in done.stdout


@pytest.mark.parametrize("gpus", [0, 4])
def test_help_starts_no_launcher(root: Path, fakes: Path, tmp_path: Path, gpus: int) -> None:
    done = start(root / "openllm_eval.slurm", fakes, tmp_path, "--help", gpus=gpus)
    assert done.stdout == f"python [{root}/src/evaluate_openllm.py] [--help] WORLD_SIZE=\n"


def test_a_failure_is_the_wrappers_status(root: Path, fakes: Path, tmp_path: Path) -> None:
    assert start(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=m", FAKE_STATUS="3").returncode == 3
    several = start(root / "openllm_eval.slurm", fakes, tmp_path, "--model_path=m", gpus=2, FAKE_STATUS="3")
    assert several.returncode == 3
    assert "launch.py" not in several.stdout


def test_under_sbatch_the_script_is_a_copy(root: Path, fakes: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool folder" / "job00042"
    spool.mkdir(parents=True)
    copy = spool / "slurm_script"
    shutil.copy(root / "openllm_eval.slurm", copy)
    repository = tmp_path / "my repository"
    (repository / "src").mkdir(parents=True)
    shutil.copy(root / "src" / "env.sh", repository / "src" / "env.sh")
    done = start(copy, fakes, repository, "--model_path=m", SLURM_SUBMIT_DIR=str(repository), SLURM_JOB_ID="42")
    assert done.returncode == 0, done.stderr
    assert f"[{repository}/src/evaluate_openllm.py]" in done.stdout
    lost = start(copy, fakes, tmp_path, "--model_path=m", SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="42")
    assert lost.returncode == 2
    assert "submit the job from the repository's folder" in lost.stderr


def headers_of(script: Path) -> dict[str, str]:
    """sbatch reads the headers up to the first command."""
    lines = script.read_text(encoding="utf-8").splitlines()
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    words = [line.removeprefix("#SBATCH --") for line in lines[:first_command] if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def test_sbatch_headers(root: Path) -> None:
    """sbatch writes its log where the folder exists."""
    evaluation, training = (headers_of(root / name) for name in ("openllm_eval.slurm", "train_alignment.slurm"))
    assert set(evaluation) >= {"job-name", "nodes", "gres", "cpus-per-task", "time", "output"}
    for headers in (evaluation, training):
        assert (root / headers["output"]).parent.is_dir()
    assert set(training) >= {"job-name", "nodes", "gpus-per-node", "cpus-per-task", "time", "requeue"}
    # One launcher a node; the batch shell is told, five minutes before the end; a job that runs again adds to its log.
    assert training["ntasks-per-node"] == "1"
    assert training["signal"] == "B:USR1@300"
    assert training["open-mode"] == "append"
