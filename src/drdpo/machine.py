"""This machine's GPUs, and what --dtype=auto means on it. `python -m drdpo.machine` prints what is wrong.

torch is imported only if it is needed: not on a machine without libcuda.so.1 for an explicit --dtype=float32, so that
checking a command line is quick there.
"""

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from drdpo import distributed
from drdpo.errors import UsageError, one_line

Config = TypeVar("Config")

DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA's major version -> the first driver branch that runs it. Source: NVIDIA's CUDA compatibility guide."""
SMI_TIMEOUT = 10.0  # seconds; with a broken driver nvidia-smi can hang
_TO_CPU = "set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
_ASKED = "asked for by --dtype"
_LIST_GPUS = """
import json, torch
found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
print(json.dumps([[torch.cuda.get_device_name(k), *torch.cuda.get_device_capability(k)] for k in found]))
"""


class Gpu(NamedTuple):
    """A GPU by torch's name of it, and its compute capability."""

    name: str
    major: int
    minor: int


class Precision(NamedTuple):
    """What --dtype means here, "bfloat16" or "float32", the reason, and a warning about an explicit choice."""

    dtype: str
    reason: str
    warning: str = ""


def settle(config: Config, kernels: bool = False, untouched: bool = False) -> tuple[Config, Precision]:
    """Check the device, then replace a config's --dtype=auto by what it means here. Every step with a model calls this.

    Raises:
        UsageError: as check_device; or the config's other flags do not allow the resolved --dtype.
    """
    precision = resolve_dtype(config.dtype, check_device(kernels, untouched))  # type: ignore[attr-defined]
    return _with(config, precision), precision


def agree(config: Config, precision: Precision) -> tuple[Config, Precision]:
    """What settle returned, but float32 if ranks differ. Every rank must call this, in the process group."""
    votes = distributed.gather_floats([float(precision.dtype == "bfloat16")])
    if len(set(votes)) == 1:
        return config, precision
    precision = Precision("float32", f"{votes.count(0.0)} of {len(votes)} processes have no fast bfloat16")
    return _with(config, precision), precision


def announce(precision: Precision) -> None:
    """Print what auto means, or a warning, on rank 0. The check by src/env.sh before a launch leaves this to the run."""
    if not distributed.is_main() or ("WORLD_SIZE" in os.environ and "RANK" not in os.environ):
        return
    if precision.reason != _ASKED:
        print(f"--dtype=auto is {precision.dtype}: {precision.reason}", flush=True)
    if precision.warning:
        print(f"WARNING: {precision.warning}", file=sys.stderr, flush=True)


def _with(config: Any, precision: Precision) -> Any:
    try:
        return dataclasses.replace(config, dtype=precision.dtype)
    except UsageError as error:
        raise UsageError(f"{error} (--dtype={config.dtype} is {precision.dtype} here: {precision.reason})") from error


def resolve_dtype(asked: str, found: list[Gpu] | None = None) -> Precision:
    """What --dtype ("auto", "bfloat16" or "float32") means on this machine with these GPUs."""
    found = gpus() if found is None else found
    if asked != "auto":
        if asked == "float32" or found or bfloat16_speed() >= 1:
            return Precision(asked, _ASKED)
        slow = f"this CPU multiplies bfloat16 {1 / bfloat16_speed():.1f} times slower than float32"
        return Precision(asked, _ASKED, f"{slow}; --dtype=float32, or omitting --dtype, is faster")
    if found:
        names = dict.fromkeys(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}" for gpu in found)
        return Precision("bfloat16", ", ".join(names))
    if not _claims_bfloat16():
        return Precision("float32", "this CPU has no bfloat16 products (AVX512_BF16 or AMX), or they are switched off")
    if (speed := bfloat16_speed()) < 1:
        return Precision("float32", f"this CPU multiplies bfloat16 {1 / speed:.1f} times slower than float32")
    return Precision("bfloat16", f"this CPU multiplies bfloat16 {speed:.1f} times as fast as float32")


@lru_cache
def bfloat16_speed() -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16 matrices, measured on one thread in about 50 ms.

    Compares the fastest product of each, since other work on the core can only slow one down.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also starts no threads, which a later fork would lack
    shapes, dtypes = ((128, 512), (512, 512)), (torch.float32, torch.bfloat16)
    sides = [[torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes] for dtype in dtypes]
    seconds: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end or len(seconds[1]) < 4:
        for (x_NI, weight_OI), spent in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            torch.nn.functional.linear(x_NI, weight_OI)
            spent.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(seconds[0]) / min(seconds[1])


def _claims_bfloat16() -> bool:
    """Does this CPU report bfloat16 products, and may oneDNN, which a variable can limit, use them?"""
    import torch

    used = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(used and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))


def gpus(untouched: bool = False) -> list[Gpu]:
    """The GPUs that torch sees, unless DS_ACCELERATOR=cpu; `untouched` as for check_device.

    Raises:
        UsageError: torch sees some and cannot initialise CUDA.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or ("torch" not in sys.modules and _libcuda() is None):
        return []
    import torch

    try:
        if untouched:
            return _gpus_of_another_process() if torch.cuda.device_count() else []
        found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        return [Gpu(torch.cuda.get_device_name(k), *torch.cuda.get_device_capability(k)) for k in found]
    except RuntimeError as error:
        raise UsageError(f"torch cannot use the GPUs that it sees ({one_line(str(error), 300)}); {_TO_CPU}") from error


@lru_cache
def _gpus_of_another_process() -> list[Gpu]:
    done = subprocess.run([sys.executable, "-c", _LIST_GPUS], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError("".join(done.stderr.splitlines()[-1:]) or f"status {done.returncode}")
    return [Gpu(*gpu) for gpu in json.loads(done.stdout.splitlines()[-1])]


def check_device(kernels: bool = False, untouched: bool = False) -> list[Gpu]:
    """The GPUs to use, none for the CPU; refuses what cannot work here.

    Args:
        kernels: does the step launch Triton kernels of our own on GPUs?
        untouched: ask in another process, and leave it to an engine or its children to initialise CUDA in this one.

    Raises:
        UsageError: a GPU with too low a compute capability; a GPU that nvidia-smi lists and torch does not see, unless
            CUDA_VISIBLE_DEVICES or DS_ACCELERATOR=cpu hides it; with `kernels`, as check_compiler.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # vLLM and lm-eval ignore DeepSpeed's switch
    found = gpus(untouched)
    for number, gpu in enumerate(found):
        if gpu.major < 8:
            raise UsageError(
                f"GPU {number} ({gpu.name}) has compute capability {gpu.major}.{gpu.minor}, and bfloat16 needs 8.0 or "
                f"above; choose a newer GPU (A100, RTX 30 or later) by CUDA_VISIBLE_DEVICES, or {_TO_CPU}"
            )
    if found and kernels:
        check_compiler()
    if not found and not _hidden():
        _check_unseen()
    return found


def ask_driver() -> tuple[int, int]:
    """For how many GPUs processes are to be started, and the CUDA version that the driver runs, e.g. 12040 for 12.4.

    What the driver counts, with CUDA_VISIBLE_DEVICES; if that is none, what nvidia-smi lists: the steps then say why torch
    cannot use it. src/env.sh asks this, for setup.sh before torch is installed.
    """
    count, version = _driver()
    return 0 if _hidden() else count or len(_listed(warn=True)), version


def _hidden() -> bool:
    """Has the user chosen the CPU?"""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    return cpu or not visible or visible.startswith("-") or visible == "NoDevFiles"  # Slurm's word for none


def _listed(warn: bool = False) -> list[str]:
    """Names of the GPUs that nvidia-smi lists."""
    return re.findall(r"^GPU \d+: *(.*?) *(?:\(UUID.*)?$", _nvidia_smi("--list-gpus", warn=warn), re.MULTILINE)


def _check_unseen() -> None:
    """Refuse the CPU on a machine whose driver lists GPUs that torch does not see."""
    names = _listed()
    asked = "nvidia-smi" if names else "the driver"
    names = names or ["of unknown name"] * _driver()[0]  # a container without nvidia-smi
    if not names:
        return
    import torch

    said = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    driver = next(iter(re.findall(r"^(\d+(?:\.\d+)+)\s*$", said, re.MULTILINE)), "of unknown version")
    build, visible = torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES")
    needed = DRIVERS.get(int(build.split(".")[0])) if build else None
    if build is None:
        why = "which is a build for CPUs; run bash setup.sh, which installs the one for this driver"
    elif needed and driver[0].isdigit() and int(driver.split(".")[0]) < needed:
        why = f"whose CUDA {build} needs driver {needed} or newer; update it, or run bash setup.sh for an older CUDA"
    elif visible is not None:
        why = f"as CUDA_VISIBLE_DEVICES={visible} may name others; unset it"
    else:
        why = f"whose CUDA {build} needs driver {needed or 'unknown'}; python -c 'import torch; torch.cuda.init()' says why"
    raise UsageError(
        f"{asked} lists {len(names)} GPU{'s' * (len(names) > 1)} ({names[0]}), driver {driver}, but none is visible to "
        f"torch {torch.__version__}, {why}, or {_TO_CPU}"
    )


def _driver() -> tuple[int, int]:
    """Number of GPUs that the driver's library counts, and the CUDA version that it runs; zeros without it.

    It needs neither nvidia-smi, which containers may lack, nor torch."""
    cuda, count, version = _libcuda(), ctypes.c_int(), ctypes.c_int()
    with suppress(AttributeError):
        if cuda:
            cuda.cuDriverGetVersion(ctypes.byref(version))
            if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
                count.value = 0
    return count.value, version.value


def _libcuda() -> ctypes.CDLL | None:
    """The NVIDIA driver's library; None if it cannot be loaded, and then torch sees no GPU either."""
    with suppress(OSError):
        return ctypes.CDLL("libcuda.so.1")
    return None


@lru_cache
def _nvidia_smi(*words: str, warn: bool = False) -> str:
    """What nvidia-smi prints; empty if it is missing, hangs or fails, so that torch alone decides; `warn`: print why."""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, timeout=SMI_TIMEOUT, text=True, errors="replace")
        if done.returncode == 0:
            return done.stdout
        why = (done.stdout + done.stderr).partition("\n")[0]
    except FileNotFoundError:
        return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if warn:
        print(f"note: nvidia-smi fails: {one_line(why, 300)}", file=sys.stderr)
    return ""


def check_compiler() -> None:
    """Refuse a machine on which Triton cannot compile its kernels' launchers, which it does when a kernel first runs.

    Raises:
        UsageError: a C compiler or Python.h is missing.
    """
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    missing = [] if any(map(shutil.which, compilers)) else [f"a C compiler ({' or '.join(compilers)})"]
    missing += [] if header.is_file() else [str(header)]
    if missing:
        raise UsageError(
            f"Triton's kernels need {' and '.join(missing)}, which this machine lacks; install gcc and python3-dev (Debian, "
            f"Ubuntu) or gcc and python3-devel (RHEL, Rocky), or {_TO_CPU}"
        )


def main() -> int:
    """Print what --dtype=auto means here, or each problem on a line; the exit status is 1 if there is any."""
    problems = []
    for check in (check_device, lambda: check_compiler() if gpus() else None):
        try:
            check()
        except UsageError as error:
            problems.append(str(error))
    if problems:
        print("\n".join(dict.fromkeys(problems)))
        return 1
    precision = resolve_dtype("auto")
    print(f"--dtype=auto is {precision.dtype}: {precision.reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
