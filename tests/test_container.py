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
    """The same base, files, step and variables, in the same order."""
    docker = (root / "container" / "Dockerfile").read_text(encoding="utf-8").replace('"$LOCK"', "{{ LOCK }}")
    apptainer = (root / "container" / "drdpo.def").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^%(\w+)\n((?:    .*\n|\n)+)", apptainer, re.MULTILINE))
    for word, section in {"COPY": "files", "ARG": "arguments", "RUN": "post", "ENV": "environment"}.items():
        lines = [line.strip() for line in sections[section].splitlines() if line.strip() and "#" not in line]
        of_docker = " ".join(re.findall(rf"^{word} (.+)$", docker, re.MULTILINE))
        assert " ".join(line.removeprefix("export ") for line in lines) == of_docker != ""
    assert re.search("^From: debian:12-slim$", apptainer, re.MULTILINE) and "\nFROM debian:12-slim\n" in docker
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", docker, re.MULTILINE):
        assert (root / source).exists() and target == f"/opt/drdpo/{source}"
    # Debian 12's Python is that of the locks and of setup.sh.
    for name in LOCKS:
        assert "for Python 3.11 on" in (root / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()[0]
    setup = (root / "setup.sh").read_text(encoding="utf-8")
    assert "python=3.11 pip" in setup and "for candidate in python3.11 " in setup


@pytest.mark.parametrize("lock", LOCKS)
def test_the_step_installs_the_lock_that_it_is_told(root, tmp_path, lock):
    machine = Machine(tmp_path)
    (machine.tree / "container").mkdir()
    shutil.copy(root / "container" / "install.sh", machine.tree / "container" / "install.sh")
    for program in ("apt-get", "git", "rm"):
        (machine.standins / program).unlink(missing_ok=True)
        machine.add(program, f'#!/bin/bash\nprintf \'{program} %s\\n\' "$*" >>"$CALLS"\n')
    calls = machine.called(lock, script="container/install.sh")
    (packages,) = re.findall(r"^apt-get install .*--no-install-recommends (.+)$", calls, re.MULTILINE)
    assert {"ca-certificates", "g++", "git", "python3", "python3-dev", "python3-venv"} == set(packages.split())
    assert calls.index("apt-get update") < calls.index("apt-get install") < calls.index("-m venv --clear")
    assert f"--no-deps --require-hashes -r {machine.tree}/requirements/{lock}.txt" in machine.pip()
    assert calls.endswith("/src/download_assets.py --models=none --datasets=none\n")


def test_in_an_image_setup_only_fetches(root, tmp_path):
    """The checkout's .environment, of the host, stays; of DRDPO_ENV only the image's path can be tested without an image."""
    image, tree = tmp_path / "image" / ".venv", tmp_path / "tree"
    add_program(image / "bin", "python", "machine/printer")
    (tree / "src").mkdir(parents=True)
    (tree / ".environment").write_text("the host's\n")
    (tree / "setup.sh").write_text((root / "setup.sh").read_text().replace("/opt/drdpo/.venv", str(image)))

    def setup(flag):
        environment = os.environ | {"DRDPO_ENV": str(image)}
        return subprocess.run(["bash", tree / "setup.sh", flag], env=environment, capture_output=True, text=True)

    assert "download_assets.py] [--models=embedded]" in setup("--models=embedded").stdout
    assert "an image's packages are fixed" in setup("--dev").stderr
    assert (tree / ".environment").read_text() == "the host's\n"


class Cluster:
    """A host with SLURM and apptainer, and without an environment, beside an image that has one."""

    def __init__(self, folder: Path, python: str) -> None:
        self.cwd, self.host, self.executed = folder, folder / "host bin", folder / "executed"
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


def test_every_command_that_srun_starts_is_in_the_image_and_a_job_is_requeued_as_without(root, tmp_path):
    cluster, flags = Cluster(tmp_path, "slurm/python"), ["--model_path=m", "--save_path=my run"]
    launched = tmp_path / "launched"
    variables = {"SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    variables |= {"SLEEPS": "node=1*launch*", "STOPPED": "75"}
    with cluster.start(root / "train_alignment.slurm", *flags, **variables) as job:
        deadline = time.monotonic() + 120
        while not launched.is_file() or launched.read_text().count("launch.py") < 2:
            assert job.poll() is None and time.monotonic() < deadline, job.stderr.read()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        job.communicate(timeout=60)
    assert job.returncode == 75
    assert (tmp_path / "launched.requeue").read_text() == "requeue 40007\n"
    started = (tmp_path / "launched.srun").read_text().splitlines()
    assert started[started.index("env") :][:3] == ["env", "CONTAINER=", "apptainer"]
    assert cluster.executions() == [cluster.words(root, str(root / "train_alignment.sh"), *flags)] * 2
    assert {"--node-rank=0", "--node-rank=1", "--master-addr=first"} < set(launched.read_text().split())


LEADERBOARD = "python [{}/src/evaluate_openllm.py] [--model_path=my model] [--save_path=out] WORLD_SIZE=\n"


@pytest.mark.parametrize(
    ("script", "nodes", "times"),
    [("train_alignment.sh", "", 1), ("train_alignment.slurm", "", 1), ("generate_completions.slurm", "", 1),
     # On two nodes one divides, two evaluate, one writes.
     ("openllm_eval.slurm", "1", 1), ("openllm_eval.slurm", "2", 4)],
)  # fmt: skip
def test_every_wrapper_starts_again_in_the_image(root, tmp_path, script, nodes, times):
    """Under sbatch the leaderboard's script is a copy that the image may not see."""
    cluster, words = Cluster(tmp_path, "machine/printer"), ("--model_path=my model", "--save_path=out")
    place, name, job = root / script, script.replace("t.slurm", "t.sh").replace("s.slurm", "s.sh"), {"DRDPO_PROCESSES": "1"}
    if nodes:
        place, cluster.cwd = Path(shutil.copy(place, tmp_path / "slurm_script")), root
        job = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": nodes}
    status, out, err = cluster.run(place, *words, **job)
    assert status == 0, err
    assert cluster.executions() == times * [cluster.words(root, str(root / name), *words)]
    assert "[--model_path=my model] [--save_path=out]" in out
    assert not nodes or out == times * LEADERBOARD.format(root)


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_a_job_of_step_1_samples_and_scores_in_the_image(root, tmp_path, nodes):
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
