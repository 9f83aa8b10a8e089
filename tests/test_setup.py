"""setup.sh and tests/run.sh on machines that differ in what they have; stand_ins.py says how."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from stand_ins import CONDA, PYTHON, Machine

from drdpo.asset_names import EMBEDDED_DATASETS, EMBEDDED_MODELS, HUB_DATASETS, HUB_MODELS


@pytest.fixture
def machine(root: Path, tmp_path: Path) -> Machine:
    return Machine(root, tmp_path)


def test_help_needs_no_environment(machine: Machine) -> None:
    (machine.standins / "python3.11").unlink()
    done = machine.setup("--help")
    assert done.returncode == 0
    assert "--torch_index=URL" in done.stdout
    for name in (*EMBEDDED_MODELS, *HUB_MODELS, *EMBEDDED_DATASETS, *HUB_DATASETS):
        assert name in done.stdout
    assert not (machine.tree / ".environment").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=x"], "unknown flag --model"),
        (["--quick"], "unknown flag --quick"),
        (["embedded"], "unknown flag embedded"),
        (["--models"], "--models needs a value"),
        (["--models="], "--models needs a value"),
        (["--dev=maybe"], "--dev=maybe: true or false"),
    ],
)
def test_a_wrong_flag_ends_with_status_2(machine: Machine, flags: list[str], message: str) -> None:
    done = machine.setup(*flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("usage: bash setup.sh")
    assert done.stderr.splitlines()[1] == f"error: {message}"
    assert machine.calls.read_text() == ""


def test_a_wrong_model_name_is_refused_before_anything_is_installed(machine: Machine) -> None:
    done = machine.setup("--models=GPT")
    assert done.returncode == 2
    assert "error: --models=GPT: 'GPT' is not known" in done.stderr
    assert machine.pip() == []


def test_a_venv_is_made_and_the_second_run_installs_nothing(machine: Machine) -> None:
    done = machine.setup("--models=embedded", "--datasets", "embedded")
    assert done.returncode == 0, done.stderr
    assert machine.noted() == str(machine.tree / ".venv")
    lock = machine.tree / "requirements" / "cpu.txt"
    aside = f"{machine.tree}/.venv/.torch_aside"
    assert machine.pip("download") == [f"--no-deps --dest {aside} torch==2.13.0"]
    assert machine.pip() == [
        f"--no-deps --require-hashes --no-index --find-links {aside} -r {aside}/torch.txt",
        f"--no-deps --require-hashes -r {lock}",
        f"--constraint {machine.tree}/.venv/.drdpo_constraint.txt torch==2.13.0",
    ]
    constraint = (machine.tree / ".venv" / ".drdpo_constraint.txt").read_text().splitlines()
    assert "torch==2.13.0" in constraint and all(re.fullmatch(r"[\w.-]+==[\w.!]+", pin) for pin in constraint)
    script = f"python {machine.tree}/src/download_assets.py --models=embedded --datasets=embedded"
    assert machine.calls.read_text().splitlines()[-1] == script
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.pip() == []
    assert "-m venv" not in machine.calls.read_text()
    assert machine.calls.read_text().splitlines()[-1].endswith("--models=auto --datasets=auto")


def test_the_build_of_torch_that_pip_prefers_is_checked_against_the_lock(machine: Machine, tmp_path: Path) -> None:
    """The list that its one requirement is installed from: the lock's lines of torch, digests and all, and no other."""
    seen = tmp_path / "torch.txt"
    machine.setup(KEEP_TORCH_LIST=str(seen))
    lines = seen.read_text().splitlines()
    assert lines[0] == "torch==2.13.0 \\" and len(lines) > 3 and not lines[-1].endswith("\\")
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines[1:])
    assert not (machine.tree / ".venv" / ".torch_aside").exists()


def test_a_changed_lock_is_installed_again(machine: Machine) -> None:
    machine.setup()
    with (machine.tree / "requirements" / "cpu.txt").open("a") as lock:
        lock.write("zzz==1.0\n")
    machine.setup()
    assert len(machine.pip()) == 2, "torch is there"


def test_an_interrupted_installation_is_repeated(machine: Machine) -> None:
    done = machine.setup(PIP_STATUS="3")
    assert done.returncode == 3
    assert not (machine.tree / ".environment").exists()
    assert "download_assets" not in machine.calls.read_text()
    assert machine.setup().returncode == 0
    assert len(machine.pip()) == 3


def test_development_packages(machine: Machine) -> None:
    machine.setup("--dev=false")
    assert not any("dev.txt" in call for call in machine.pip())
    machine.setup("--dev")
    assert machine.pip() == [f"--no-deps --require-hashes -r {machine.tree}/requirements/dev.txt"]
    machine.setup("--dev=true")
    assert machine.pip() == []


def test_torch_from_another_index(machine: Machine) -> None:
    machine.setup("--torch_index=https://index.example/cpu")
    assert machine.pip()[0] == "--no-deps --index-url https://index.example/cpu torch==2.13.0"
    assert machine.pip()[1].startswith("--no-deps --require-hashes -r ")
    done = machine.setup("--torch_index=https://index.example/cpu")
    assert "--torch_index changes nothing" in done.stdout


def test_a_gpu_chooses_the_cuda_lock(machine: Machine) -> None:
    machine.add("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA (UUID: x)'\n")
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    assert machine.pip()[0] == f"--no-deps --require-hashes -r {machine.tree}/requirements/gpu.txt"
    assert "pip uninstall" not in machine.calls.read_text()
    machine.setup(CUDA_VISIBLE_DEVICES="", CUDA_TORCH="1")
    assert f"--no-deps --require-hashes -r {machine.tree}/requirements/cpu.txt" in machine.pip(), "a hidden GPU is none"


def test_a_gpu_replaces_the_cpu_build_of_torch(machine: Machine) -> None:
    """Its version is the locked one, so pip would keep it, and a cluster's login node and GPU node share an environment."""
    machine.setup()
    machine.add("nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA (UUID: x)'\n")
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    calls = machine.calls.read_text()
    assert calls.index("pip uninstall --quiet --yes torch") < calls.index("gpu.txt\n")
    (machine.tree / ".venv" / ".drdpo_gpu.txt").unlink()
    machine.setup(CUDA_TORCH="1")
    assert "pip uninstall" not in machine.calls.read_text()


def test_a_torch_that_is_there_is_kept_and_said_so(machine: Machine) -> None:
    machine.setup()
    with (machine.tree / "requirements" / "cpu.txt").open("a") as lock:
        lock.write("zzz==1.0\n")
    done = machine.setup("--torch_index=https://index.example/cpu")
    assert "--torch_index changes nothing" in done.stdout
    assert not any("index.example" in call for call in machine.pip())


def test_conda_makes_drdpo_env_once(machine: Machine) -> None:
    machine.add("conda", CONDA)
    done = machine.setup(CONDA_DEFAULT_ENV="base", CONDA_PREFIX=str(machine.standins))
    assert done.returncode == 0, done.stderr
    calls = machine.calls.read_text()
    assert "conda create --yes --name drdpo_env python=3.11 pip\n" in calls
    assert machine.noted() == str(machine.conda_envs / "drdpo_env")
    assert len(machine.pip()) == 3
    assert not (machine.tree / ".venv").exists()
    machine.setup()
    assert "\nconda" not in machine.calls.read_text(), "the noted environment is not looked up again"
    (machine.tree / ".environment").unlink()
    machine.setup()
    assert "conda create" not in machine.calls.read_text()
    assert machine.noted() == str(machine.conda_envs / "drdpo_env")


@pytest.mark.parametrize(
    "variables",
    [
        lambda prefix: {"VIRTUAL_ENV": prefix},
        lambda prefix: {"CONDA_PREFIX": prefix, "CONDA_DEFAULT_ENV": "research"},
        lambda prefix: {"DRDPO_ENV": prefix},
    ],
)
def test_an_active_environment_is_used_and_said_so(machine: Machine, variables: Callable[[str], dict[str, str]]) -> None:
    machine.add("conda", CONDA)
    prefix = machine.tree.parent / "my env"
    machine.add("python", PYTHON, prefix / "bin")
    done = machine.setup(**variables(str(prefix)))
    assert done.returncode == 0, done.stderr
    assert machine.noted() == str(prefix)
    assert f"note: using the environment {prefix}; its packages will be changed" in done.stdout
    assert "conda create" not in machine.calls.read_text()
    done = machine.setup()
    assert machine.noted() == str(prefix), "without activation the noted one goes on"
    assert machine.pip() == []
    assert "note:" not in done.stdout


def test_an_old_active_environment_is_refused(machine: Machine) -> None:
    prefix = machine.tree.parent / "old env"
    machine.add("python", PYTHON, prefix / "bin")
    done = machine.setup(VIRTUAL_ENV=str(prefix), OLD_PYTHON="1")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert machine.pip() == []


def test_without_python_the_error_says_what_to_install(machine: Machine) -> None:
    (machine.standins / "python3.11").unlink()
    done = machine.setup()
    assert done.returncode == 1
    assert "error: no Python 3.11 or newer was found" in done.stderr


def test_a_deleted_or_moved_environment_is_made_anew(machine: Machine) -> None:
    machine.setup()
    shutil.rmtree(machine.tree / ".venv")
    assert machine.setup().returncode == 0
    assert len(machine.pip()) == 3
    moved = machine.tree.parent / "moved clone"
    machine.tree = machine.tree.rename(moved)
    assert machine.setup().returncode == 0
    assert machine.noted() == str(moved / ".venv")
    assert f"-m venv --clear {moved}/.venv" in machine.calls.read_text()
    assert len(machine.pip()) == 3


def test_scripts_start_although_the_path_of_the_environment_holds_spaces(machine: Machine) -> None:
    """pip copies DeepSpeed's launcher as it is, with a first line that the kernel cuts at the space."""
    machine.setup()
    folder = machine.tree / ".venv"
    launcher = machine.add("deepspeed", f"#!{folder}/bin/python\nprint('started')\n", folder / "bin")
    other = machine.add("other", "#!/bin/bash\necho other\n", folder / "bin")
    (folder / ".drdpo_cpu.txt").unlink()
    machine.setup()
    done = subprocess.run([launcher], env={"CALLS": str(machine.calls)}, capture_output=True, text=True, timeout=60)
    assert done.stdout == "started\n", done.stderr
    assert other.read_text() == "#!/bin/bash\necho other\n"


def test_the_test_command_stops_at_the_first_failing_part(root: Path, machine: Machine) -> None:
    for name in ("tests/run.sh", ".ci/run"):
        (machine.tree / name).parent.mkdir()
        shutil.copy(root / name, machine.tree / name)
    machine.setup()
    tools = machine.tree / ".venv" / "bin"
    for tool in ("ruff", "shellcheck", "mypy"):
        machine.add(tool, f'#!/bin/bash\nprintf \'{tool} %s\\n\' "$*" >>"$CALLS"\n[[ "${{FAIL:-}}" != {tool} ]]\n', tools)
    done = machine.setup("-q", script=".ci/run", FAIL="shellcheck")
    assert done.returncode == 1
    assert "FAILED: shellcheck" in done.stderr
    calls = machine.calls.read_text()
    assert "ruff check src tests\n" in calls
    assert "ruff format --check src tests\n" in calls
    shellchecked = next(line for line in calls.splitlines() if line.startswith("shellcheck"))
    assert shellchecked == "shellcheck --external-sources ./.ci/run ./setup.sh ./src/env.sh ./tests/run.sh"
    assert "mypy" not in calls
    assert "-m pytest" not in calls


def test_the_committed_scripts_are_executable(root: Path) -> None:
    for name in ("setup.sh", "tests/run.sh", ".ci/run"):
        assert os.access(root / name, os.X_OK), name
