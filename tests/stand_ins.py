"""A machine for setup.sh: a copied tree whose path holds spaces, and stand-ins for python and conda that record calls.

The stand-in python runs everything really, but for pip, the import of torch and the fetching of assets; PATH holds
nothing else than the tools that setup.sh may use.
"""

import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = ("bash", "sed", "grep", "cat", "rm", "dirname", "basename", "awk", "mkdir", "cp", "chmod", "find", "sort", "timeout")

PYTHON = f"""#!/bin/bash
printf 'python %s\\n' "$*" >>"$CALLS"
case "$*" in
    "-m pip --version") exit 0 ;;
    "-m pip install"*)
        [[ -z "${{PIP_STATUS:-}}" ]] || exit "$PIP_STATUS"
        [[ -z "${{KEEP_TORCH_LIST:-}}" || "$*" != */torch.txt ]] || cp "${{*: -1}}" "$KEEP_TORCH_LIST"
        : >"$0.torch"
        exit 0 ;;
    "-m pip download"*) exit "${{PIP_STATUS:-0}}" ;;
    "-c import sys, torch; sys.exit(torch.version.cuda"*) [[ -n "${{CUDA_TORCH:-}}" ]]; exit ;;
    "-c import sys, torch;"*) [[ -f "$0.torch" ]]; exit ;;
    "-m pip uninstall"*) rm -f "$0.torch"; exit 0 ;;
    *download_assets.py*) exit 0 ;;
    "-m drdpo.machine") exit "${{MACHINE_STATUS:-0}}" ;;
    *libcuda.so.1*)
        [[ -n "${{CUDA:-}}" ]] || exit 1
        echo "$CUDA"
        exit 0 ;;
    "-m venv --clear "*)
        rm -rf "$4"
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        printf 'VIRTUAL_ENV="%s"\\n' "$4" >"$4/bin/activate"
        exit 0 ;;
esac
[[ "$*" != *version_info* || -z "${{OLD_PYTHON:-}}" ]] || exit 1
exec {sys.executable} "$@"
"""

CONDA = """#!/bin/bash
printf 'conda %s\\n' "$*" >>"$CALLS"
prefix="$CONDA_ENVS/drdpo_env"
case "$1" in
    create)
        mkdir -p "$prefix/bin"
        cp "$STANDINS/python3.11" "$prefix/bin/python" ;;
    run)
        [[ -x "$prefix/bin/python" ]] || exit 1
        echo "$prefix" ;;
esac
"""


class Machine:
    """A tree with setup.sh, and a PATH of stand-ins."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.tree = folder / "my clone"
        self.standins = folder / "stand ins"
        self.calls = folder / "calls.txt"
        self.conda_envs = folder / "conda envs"
        (self.tree / "src" / "drdpo").mkdir(parents=True)
        shutil.copytree(root / "requirements", self.tree / "requirements")
        ground = [f"src/drdpo/{name}.py" for name in ("__init__", "asset_names", "display", "errors")]
        for name in ("setup.sh", "src/env.sh", *ground):
            shutil.copy(root / name, self.tree / name)
        self.standins.mkdir()
        for tool in TOOLS:
            (self.standins / tool).symlink_to(str(shutil.which(tool)))
        self.add("python3.11", PYTHON)

    def add(self, name: str, script: str, folder: Path | None = None) -> Path:
        path = (folder or self.standins) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
        return path

    def add_gpu(self, driver: str = "580.65.06", name: str = "NVIDIA H100 80GB HBM3") -> None:
        """A GPU that nvidia-smi lists."""
        query = f'[[ "$*" != *driver_version* ]] || {{ echo "{driver}"; exit; }}'
        self.add("nvidia-smi", f"#!/bin/bash\n{query}\necho 'GPU 0: {name} (UUID: GPU-7)'\n")

    def move_devices(self) -> Path:
        """An empty folder where the tree's scripts look for the devices and the kernel's word on the driver."""
        folder = self.tree.parent / "devices"
        folder.mkdir()
        for name in ("setup.sh", "src/env.sh"):
            text = (self.tree / name).read_text().replace("/dev/", f"{folder}/")
            text = text.replace(f"{folder}/null", "/dev/null").replace("/proc/driver/nvidia/version", f"{folder}/version")
            (self.tree / name).write_text(text)
        return folder

    def setup(self, *flags: str, script: str = "setup.sh", **variables: str) -> subprocess.CompletedProcess[str]:
        """Run setup.sh from another folder; afterwards `calls` holds only this run's calls."""
        self.calls.write_text("")
        environment = {
            "PATH": str(self.standins), "HOME": str(self.tree.parent), "CALLS": str(self.calls),
            "STANDINS": str(self.standins), "CONDA_ENVS": str(self.conda_envs), **variables,
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(self.tree / script), *flags],
            cwd=self.tree.parent, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def pip(self, command: str = "install") -> list[str]:
        """What pip was asked to install, or to download, in the last run, its fixed words cut off."""
        start = f"python -m pip {command} --quiet --progress-bar off "
        return [line.removeprefix(start) for line in self.calls.read_text().splitlines() if line.startswith(start)]

    def noted(self) -> str:
        return (self.tree / ".environment").read_text().strip()
