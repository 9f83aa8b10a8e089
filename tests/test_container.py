"""The recipes of container/, and CONTAINER=..., by which wrappers run in such an image, with a stand-in for apptainer."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness.stand_ins import Machine, add_program, make_environment

LOCKS = ("cpu", "gpu", "gpu-cu12")


def test_both_recipes_make_the_same_image(root):
    """The same base, files, step and variables; the version of Python is that of the locks."""
    docker = (root / "container" / "Dockerfile").read_text(encoding="utf-8")
    apptainer = (root / "container" / "drdpo.def").read_text(encoding="utf-8")
    of_docker = lambda word: re.findall(rf"^{word} (.+)$", docker, re.MULTILINE)  # noqa: E731
    assert re.findall(r"^Bootstrap: docker\nFrom: (.+)$", apptainer, re.MULTILINE) == of_docker("FROM") == ["debian:12-slim"]
    sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)+)", apptainer, re.MULTILINE))
    lines = {name: [line.strip() for line in body.splitlines() if line.strip()] for name, body in sections.items()}
    assert lines["files"] == of_docker("COPY")
    for source, target in map(str.split, lines["files"]):
        assert (root / source).exists() and target == f"/opt/drdpo/{source}"
    assert lines["arguments"] == of_docker("ARG") == ["LOCK=gpu"]
    assert lines["post"] == [step.replace('"$LOCK"', "{{ LOCK }}") for step in of_docker("RUN")]
    assert lines["post"] == ["bash /opt/drdpo/container/install.sh {{ LOCK }}"]
    exported = [line.removeprefix("export ") for line in lines["environment"] if not line.startswith("#")]
    assert exported == of_docker("ENV")[0].split() == ["DRDPO_ENV=/opt/drdpo/.venv", "PATH=/opt/drdpo/.venv/bin:$PATH"]
    for name in LOCKS:
        assert "for Python 3.11 on" in (root / "requirements" / f"{name}.txt").read_text().splitlines()[0]


@pytest.mark.parametrize("lock", LOCKS)
def test_the_step_installs_the_lock_that_it_is_told(root, tmp_path, lock):
    machine = Machine(tmp_path)
    (machine.tree / "container").mkdir()
    shutil.copy(root / "container" / "install.sh", machine.tree / "container" / "install.sh")
    for program in ("apt-get", "git", "rm"):
        (machine.standins / program).unlink(missing_ok=True)
        machine.add(program, f'#!/bin/bash\nprintf \'{program} %s\\n\' "$*" >>"$CALLS"\n')
    done = machine.setup(lock, script="container/install.sh")
    assert done.returncode == 0, done.stderr
    calls = machine.calls.read_text()
    (packages,) = re.findall(r"^apt-get install .*--no-install-recommends (.+)$", calls, re.MULTILINE)
    assert {"ca-certificates", "g++", "git", "python3", "python3-dev", "python3-venv"} == set(packages.split())
    assert calls.index("apt-get update") < calls.index("apt-get install") < calls.index("-m venv --clear")
    assert f"--no-deps --require-hashes -r {machine.tree}/requirements/{lock}.txt" in machine.pip()
    assert calls.endswith("/src/download_assets.py --models=none --datasets=none\n")


def test_in_an_image_setup_only_fetches(root: Path, tmp_path: Path) -> None:
    """The checkout's .environment, of the host, stays; of DRDPO_ENV only the image's path can be tested without an image."""
    text = (root / "setup.sh").read_text(encoding="utf-8")
    image = tmp_path / "image" / ".venv"
    add_program(image / "bin", "python", "machine/printer")
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    (tree / ".environment").write_text("the host's\n")
    (tree / "setup.sh").write_text(text.replace("/opt/drdpo/.venv", str(image)))
    for flags, status, said in ((["--models=embedded"], 0, "download_assets.py] [--models=embedded]"), (["--dev"], 1, "")):
        done = subprocess.run(["bash", tree / "setup.sh", *flags], env=os.environ | {"DRDPO_ENV": str(image)},
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert (done.returncode, said in done.stdout) == (status, True), done.stderr
    assert "an image's packages are fixed" in done.stderr
    assert (tree / ".environment").read_text() == "the host's\n"


# CONTAINER=...


class Cluster:
    """A host with SLURM and apptainer, and without an environment, beside an image that has one."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.host, self.executed = folder, folder / "host bin", folder / "executed"
        self.cwd = folder
        for program in ("srun", "scontrol", "apptainer"):
            add_program(self.host, program, f"slurm/{program}")
        image = make_environment(folder / "environment of the image", {"python": python})
        self.image = folder / "my image.sif"
        self.image.touch()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER", "DRDPO"))}
        self.variables = kept | {
            "PATH": f"{self.host}:{os.environ['PATH']}", "DRDPO_ENV": str(folder / "gone"), "CONTAINER": str(self.image),
            "IMAGE_ENV": str(image), "EXECUTED": str(self.executed), "LAUNCHED": str(folder / "launched"),
            "CUDA_VISIBLE_DEVICES": "", "DRDPO_PROCESSES": "2",
        }  # fmt: skip

    def start(self, script: Path, *words: str, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(script), *words], cwd=self.cwd, env=self.variables | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, script: Path, *words: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(script, *words, **variables)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def executions(self) -> list[list[str]]:
        """The words of apptainer's calls."""
        return [line.split("\0")[:-1] for line in self.executed.read_text().splitlines()]

    def words(self, root: Path, *command: str) -> list[str]:
        """What apptainer is to be called with."""
        elsewhere = [] if self.cwd == root else ["--bind", str(self.cwd)]
        return ["exec", "--nv", "--bind", str(root), *elsewhere, str(self.image), "bash", *command, "CONTAINER="]


def test_every_command_that_srun_starts_is_in_the_image_and_a_job_is_requeued_as_without(root: Path, tmp_path: Path) -> None:
    cluster, flags = Cluster(tmp_path, "slurm/python"), ["--model_path=m", "--save_path=my run"]
    launched = tmp_path / "launched"
    variables = {"SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    variables |= {"SLEEPS": "node=1*launch*", "STOPPED": "75"}
    with cluster.start(root / "train_alignment.slurm", *flags, **variables) as job:
        deadline = time.monotonic() + 120
        while not launched.is_file() or launched.read_text().count("launch.py") < 2:
            assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()
            time.sleep(0.05)
        time.sleep(0.3)
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=60)
    assert job.returncode == 75
    assert (tmp_path / "launched.requeue").read_text() == "requeue 40007\n"
    started = (tmp_path / "launched.srun").read_text().splitlines()
    assert started[started.index("env") :][:3] == ["env", "CONTAINER=", "apptainer"]
    assert cluster.executions() == [cluster.words(root, str(root / "train_alignment.sh"), *flags)] * 2
    assert {"--node-rank=0", "--node-rank=1", "--master-addr=first"} < set(launched.read_text().split())


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_leaderboard_starts_again_in_the_image(root: Path, tmp_path: Path, nodes: int) -> None:
    """Under sbatch its script is a copy that the image may not see."""
    cluster, spool = Cluster(tmp_path, "machine/printer"), tmp_path / "spool" / "slurm_script"
    spool.parent.mkdir()
    cluster.cwd = root
    shutil.copy(root / "openllm_eval.slurm", spool)
    job = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": str(nodes)}
    status, out, err = cluster.run(spool, "--model_path=my model", **job)
    assert status == 0, err
    times = {1: 1, 2: 4}[nodes]  # one divides, two evaluate, one writes
    assert cluster.executions() == times * [cluster.words(root, str(root / "openllm_eval.slurm"), "--model_path=my model")]
    assert out == times * f"python [{root}/src/evaluate_openllm.py] [--model_path=my model] WORLD_SIZE=\n"


@pytest.mark.parametrize("script", ["train_alignment.sh", "train_alignment.slurm", "generate_completions.slurm"])
def test_without_slurm_every_wrapper_starts_again_in_the_image(root, tmp_path, script):
    cluster, words = Cluster(tmp_path, "machine/printer"), ("--model_path=my model", "--save_path=out")
    status, out, err = cluster.run(root / script, *words, DRDPO_PROCESSES="1")
    assert status == 0, err
    assert cluster.executions() == [cluster.words(root, str(root / script.replace(".slurm", ".sh")), *words)]
    assert "[--model_path=my model] [--save_path=out]" in out


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_a_job_of_step_1_samples_and_scores_in_the_image(root: Path, tmp_path: Path, nodes: str) -> None:
    cluster = Cluster(tmp_path, "machine/printer")
    job = {"SLURM_JOB_ID": "40008", "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": "a,b", "SLURM_NODEID": "0"}
    status, out, err = cluster.run(root / "generate_completions.slurm", "--model_path=m", "--save_path=out", **job)
    assert status == 0, err
    calls = cluster.executions()
    commands = [[word for word in call[call.index(str(cluster.image)) + 1 :] if word != "CONTAINER="] for call in calls]
    sample = ["python", f"{root}/src/generate_completions.py", "--model_path=m", "--save_path=out"]
    check = ["env", "WORLD_SIZE=1", "python", f"{root}/src/score_completions.py", *sample[2:], "--check_only=true"]
    assert commands[0] == check and sample in commands[1:]
    assert {command[0] for command in commands[1:]} == {"python", "bash"}
    assert "src/score_completions.py" in out


@pytest.mark.parametrize("script", ["train_alignment.slurm", "openllm_eval.slurm", "generate.sh"])
def test_no_image_and_no_apptainer_are_one_line(root, tmp_path, script):
    cluster = Cluster(tmp_path, "machine/printer")
    status, out, err = cluster.run(root / script, "--model_path=m", CONTAINER="no.sif")
    assert (status, out, err.count("\n")) == (2, "", 1) and "CONTAINER=no.sif does not exist" in err
    (cluster.host / "apptainer").unlink()
    for tool in ("bash", "dirname"):
        (cluster.host / tool).symlink_to(str(shutil.which(tool)))
    status, out, err = cluster.run(root / script, "--model_path=m", PATH=str(cluster.host))
    assert (status, out, err.count("\n")) == (2, "", 1) and "there is no apptainer on this machine's PATH" in err
