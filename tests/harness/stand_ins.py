"""Stand-ins for programs, the files of bin/: an environment for src/env.sh made of them, and a machine for setup.sh."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from harness import ROOT

BIN = Path(__file__).parent / "bin"
TOOLS = ("bash", "sed", "grep", "cat", "rm", "dirname", "basename", "awk", "mkdir", "cp", "chmod", "find", "sort", "timeout")


def add_program(folder: Path, name: str, stand_in: str) -> Path:
    """Put bin/`stand_in` into a folder as the program `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(BIN / stand_in, folder / name))


def make_environment(folder: Path, programs: dict[str, str], **settings: str) -> Path:
    """An environment for src/env.sh with these {program: stand-in}, which read the settings from a file beside bin."""
    for name, stand_in in programs.items():
        add_program(folder / "bin", name, stand_in)
    known = {"REAL_PYTHON": sys.executable, "HARNESS": str(BIN.parent), **settings}
    (folder / "settings.sh").write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in known.items()))
    return folder


class Machine:
    """A copied tree with setup.sh, its path with spaces, and a PATH of nothing but tools and stand-ins that record calls."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "my clone"
        self.standins = folder / "stand ins"
        self.calls = folder / "calls.txt"
        self.conda_envs = folder / "conda envs"
        self.variables = {"REAL_PYTHON": sys.executable, "CALLS": str(self.calls)}
        (self.tree / "src" / "drdpo").mkdir(parents=True)
        shutil.copytree(ROOT / "requirements", self.tree / "requirements")
        ground = [f"src/drdpo/{name}.py" for name in ("__init__", "asset_names", "distributed", "errors", "machine")]
        for name in ("setup.sh", "src/env.sh", *ground):
            shutil.copy(ROOT / name, self.tree / name)
        self.standins.mkdir()
        for tool in TOOLS:
            (self.standins / tool).symlink_to(str(shutil.which(tool)))
        add_program(self.standins, "python3.11", "setup/python")

    def add(self, name: str, script: str, folder: Path | None = None) -> Path:
        path = (folder or self.standins) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
        return path

    def add_gpu(self, driver: str = "580.65.06", name: str = "NVIDIA H100 80GB HBM3") -> None:
        """A GPU that nvidia-smi lists."""
        add_program(self.standins, "nvidia-smi", "machine/nvidia-smi")
        self.variables |= {"SMI_DRIVER": driver, "SMI_GPUS": name}

    def tell_driver(self, version: str) -> None:
        """The kernel's word on the driver, as where nvidia-smi is missing."""
        path, setup = self.tree.parent / "version", self.tree / "setup.sh"
        path.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Tue Mar  5 22:23:56 UTC 2024\n")
        setup.write_text(setup.read_text().replace("/proc/driver/nvidia/version", str(path)))

    def setup(self, *flags: str, script: str = "setup.sh", **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run setup.sh from another folder; afterwards `calls` holds only this run's calls."""
        self.calls.write_text("")
        environment = self.variables | {
            "PATH": str(self.standins), "HOME": str(self.tree.parent), "STANDINS": str(self.standins),
            "CONDA_ENVS": str(self.conda_envs), **variables,
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(self.tree / script), *flags],
            cwd=self.tree.parent, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def called(self, *flags: str, script: str = "setup.sh", **variables: str) -> str:
        """The calls of a run that must succeed."""
        done = self.setup(*flags, script=script, **variables)
        assert done.returncode == 0, done.stderr
        return self.calls.read_text()

    def pip(self) -> list[str]:
        """Arguments of pip's installations in the last run, without the fixed ones."""
        start = "python -m pip install --quiet --progress-bar off "
        return [line.removeprefix(start) for line in self.calls.read_text().splitlines() if line.startswith(start)]

    def noted(self) -> str:
        return (self.tree / ".environment").read_text().strip()
