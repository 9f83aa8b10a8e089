"""Fake CUDA tensors: the trainer's own code without a GPU, counting what it would launch, move and allocate on one.

FakeTensorMode computes each operation's shapes, dtypes and devices but no numbers. With fake_cuda.cpp, which stands in for
the driver, forward and backward passes run as on a GPU: `is_cuda` is true, operations on tensors of two devices are errors,
the attention kernel is the one that torch would choose, and Triton launches are recorded.

Import this module before torch: it builds the library (once, with g++, in a few seconds) and loads it. The process then has
a nominal GPU until it ends. Needs a CPU build of torch on Linux.
"""
# ruff: noqa: E402 - torch is imported after the library

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
SRC = Path(__file__).resolve().parents[1] / "src"


def why_not() -> str | None:
    """Why fake CUDA cannot work on this machine, or None."""
    version = importlib.metadata.version("torch")
    if not version.endswith("+cpu"):
        return f"torch {version} is not a CPU build"
    return None if shutil.which("g++") else "there is no g++ (Debian: apt install g++; RHEL: dnf install gcc-c++)"


def _load() -> None:
    """Load the library, after building it unless this source and this torch have one.

    Raises:
        ImportError: it cannot be built or loaded.
    """
    if reason := why_not():
        raise ImportError(f"fake CUDA: {reason}")
    if "torch" in sys.modules:
        raise ImportError("fake CUDA: import fake_cuda before torch, which looks for devices only once")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch_folder} {importlib.metadata.version('torch')}".encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drdpo"
    library = cache / f"fake_cuda_{key[:12]}.so"
    if not library.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImportError(f"fake CUDA: {cache}: {error.strerror}; XDG_CACHE_HOME names another place") from error
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        include = torch_folder / "include"
        words = [
            "g++", "-O1", "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", unfinished, f"-I{include}",
            f"-I{include}/torch/csrc/api/include", f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
            f"-Wl,-rpath,{torch_folder}/lib",
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise ImportError(f"fake CUDA: {SOURCE.name} does not compile: {done.stderr.strip()[-1500:]}")
        unfinished.replace(library)
    for path in (torch_folder / "lib" / "libtorch_global_deps.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


_load()

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
CAPABILITY = (9, 0)
"""Of the GPU that is not there: an H100 of 80 GB."""
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32
)
_FREE = ("_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
"""Operations that launch no kernel, beside views."""
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_VALUES = ("_local_scalar_dense", "equal", "allclose")
"""Operations that tell the host a value."""


class Counts(TorchDispatchMode):
    """Counts what a GPU would do within the block.

    Args:
        known: tensors that are there before, which do not count as memory.
        rates: {GPU: Rates}, for `seconds`.
    """

    def __init__(self, known: Sequence[Tensor] = (), rates: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        """Of operations by name; each counts as one kernel, though a few run several."""
        self.bytes = 0
        """Of all operands and results of every launch: an upper bound on memory traffic, because of caches."""
        self.flops: Counter[str] = Counter()
        """Of matrix products by dtype, and of Triton's under "triton"; attention kernels are not counted."""
        self.syncs: Counter[str] = Counter()
        """What makes the host wait for the device: operation and line of ours."""
        self.attention: Counter[tuple[str, str]] = Counter()
        """(kernel, dtype) of scaled_dot_product_attention's calls."""
        self.on_cpu: Counter[str] = Counter()
        """Operations between tensors of the CPU."""
        self.seconds: Counter[str] = Counter()
        """By GPU: each launch takes the longer of its arithmetic and its bytes."""
        self.peak = 0
        """Most bytes allocated at once."""
        self._rates = rates or {}
        self._alive = 0
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __enter__(self) -> "Counts":
        _ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.remove(self)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        out = func(*args, **kwargs)
        made = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor)]
        if space != "prim" and made and not _is_view(func) and name not in _FREE:
            if any(tensor.is_cuda for tensor in given + made):
                if name == "_to_copy" and given[0].is_cuda != made[0].is_cuda and not kwargs.get("non_blocking"):
                    _waited("copy")
                self.launched(name, given + made, _arithmetic(name, args, made))
            else:
                self.on_cpu[name] += 1
        tree_map_only(Tensor, self._hold, out)
        return out

    def launched(self, name: str, tensors: Sequence[Tensor], arithmetic: tuple[str, int]) -> None:
        """Count a launch on these operands and results, with its arithmetic as (kind, FLOPs)."""
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.launches[name] += 1
        self.bytes += moved
        kind, flops = arithmetic
        if flops:
            self.flops[kind] += flops
        for gpu, rates in self._rates.items():
            self.seconds[gpu] += rates.seconds(kind, flops, moved)

    def _hold(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        where = storage._cdata
        if tensor.is_cuda and where not in self._seen:
            size = storage.nbytes()
            self._seen[where] = weakref.finalize(storage, self._forget, where, size)
            self._alive += size
            self.peak = max(self.peak, self._alive)
        return tensor

    def _forget(self, where: int, size: int) -> None:
        del self._seen[where]
        self._alive -= size


_ACTIVE: list[Counts] = []


def _line() -> str:
    """Where ours is being run."""
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(str(SRC)):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(SRC / 'drdpo')}:{frame.f_lineno}"


_PAIR_PRODUCTS = {
    "_attention_forward_kernel": (2,), "_attention_tangent_kernel": (5,), "_query_gradient_kernel": (3, 8),
    "_key_gradient_kernel": (4, 10),
}  # fmt: skip
"""Products of rows of a head's width for a query and a key that it sees, in kernels of drdpo.kernels.triton_tangent; if they
have one, of first and second order."""


def _zero(dtype: torch.dtype) -> Any:
    return False if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0


def _is_view(func: Any) -> bool:
    return any(part.alias_info is not None and not part.alias_info.is_write for part in func._schema.returns)


def _arithmetic(name: str, args: Any, made: list[Tensor]) -> tuple[str, int]:
    """(dtype, FLOPs) of a matrix product."""
    if name not in _PRODUCTS:
        return "", 0
    left = args[0] if name in ("mm", "bmm") else args[1]
    return str(left.dtype).removeprefix("torch."), 2 * made[0].numel() * left.shape[-1]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's scaled_dot_product_attention with the kernel that torch 2.13 with cuDNN 9.15 or later chooses on CUDA."""
    if not query.is_cuda:
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    cuda, grouped = torch.backends.cuda, query.shape[1] != key.shape[1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if half and CAPABILITY[0] in (9, 10) and key.shape[2] != 1 and cuda.cudnn_sdp_enabled():
        kernel = "cudnn"
    elif half and attn_mask is None and cuda.flash_sdp_enabled():
        kernel = "flash"
    elif not grouped and cuda.mem_efficient_sdp_enabled():
        kernel = "efficient"
    else:
        kernel = "math"
    for counts in _ACTIVE:
        counts.attention[kernel, str(query.dtype).removeprefix("torch.")] += 1
    aten, inputs = torch.ops.aten, (query, key, value)
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(*inputs, dropout_p, is_causal, False, scale=scale)[0]
    if kernel == "math":
        shared = {"scale": scale, "enable_gqa": enable_gqa}
        return aten._scaled_dot_product_attention_math(*inputs, attn_mask, dropout_p, is_causal, **shared)[0]
    mask = None if attn_mask is None else attn_mask.expand(query.shape[0], query.shape[1], -1, -1)
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(*inputs, mask, True, dropout_p, is_causal, False, scale=scale)[0]
    return aten._scaled_dot_product_efficient_attention(*inputs, mask, True, dropout_p, is_causal, scale=scale)[0]


def _triton_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In place of triton.runtime.jit.JITFunction.run: no kernel runs; what it would do is counted."""
    tensors = list({id(value): value for value in args if isinstance(value, Tensor)}.values())
    if not all(tensor.is_cuda for tensor in tensors):
        raise ValueError(f"{kernel.__name__} is launched on {[str(tensor.device) for tensor in tensors]}")
    named = dict(zip(kernel.arg_names, args, strict=False))
    hidden_ND, weight_VD = named.get("hidden_ptr"), named.get("weight_ptr")
    flops = 0 if hidden_ND is None else 2 * hidden_ND.numel() * len(weight_VD)
    if kernel.__name__ in _PAIR_PRODUCTS:
        products = _PAIR_PRODUCTS[kernel.__name__][options.get("SECOND", False)] * options["PARTS"]
        flops = 2 * products * options["WIDTH"] * named["heads"] * _pairs_of_the_row()
    for counts in _ACTIVE:
        counts.launched(kernel.__name__, tensors, ("triton", flops))


def _pairs_of_the_row() -> int:
    """Pairs of a query and a key that it sees, from the blocks that are being launched: fake tables have no values."""
    frame: Any = sys._getframe(2)
    while frame is not None and "blocks" not in frame.f_locals:
        frame = frame.f_back
    if frame is None:
        raise LookupError("who launches a tangent kernel must have its table as `blocks`: its work is counted from it")
    pieces = {(start, stop - start, before) for _, stop, start, _, before, _ in frame.f_locals["blocks"]}
    return sum(length * (length + 1) // 2 + length * before for _, length, before in pieces)


def _never(*_: Any) -> None:
    raise AssertionError("fake tensors have no kernels")


_torch_attention = torch.nn.functional.scaled_dot_product_attention
_KERNELS = torch.library.Library("aten", "IMPL")
"""Of CUDA builds: without a kernel of its own torch would put a formula of several operations in its place."""


def _install() -> None:
    """Answer for the device where torch would ask the driver; before any module of ours takes a function by its name."""
    from triton.runtime.jit import JITFunction

    _KERNELS.impl("silu_backward", _never, "CUDA")
    torch.nn.functional.scaled_dot_product_attention = _attention
    JITFunction.run = _triton_launch
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_properties = lambda device=None: _PROPERTIES
    torch.cuda.get_device_name = lambda device=None: _PROPERTIES.name
    torch.cuda.mem_get_info = lambda device=None: (_PROPERTIES.total_memory, _PROPERTIES.total_memory)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor


_install()


class FakeTensors(FakeTensorMode):
    """Within it every new tensor is fake, and one that is not is an error. All values are zero, and so is what is asked of
    them."""

    avoid_device_init = True  # torch would copy small constants to a device that it believes to be there

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in _VALUES and getattr(args[0], "constant", None) is None:
            if args[0].is_cuda:
                _waited(name)
            return _zero(args[0].dtype) if name == "_local_scalar_dense" else True
        return super().__torch_dispatch__(func, types, args, kwargs)


def _waited(operation: str) -> None:
    for counts in _ACTIVE:
        counts.syncs[f"{operation} {_line()}"] += 1


def to_cuda(whole: nn.Module) -> None:
    """Move a module from the meta device to the fake one, in FakeTensors; tied weights stay tied."""
    moved: dict[int, Any] = {}
    for module in whole.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            own = module._parameters if name in module._parameters else module._buffers
            if id(tensor) not in moved:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
                moved[id(tensor)] = fake if own is module._buffers else nn.Parameter(fake, tensor.requires_grad)
            own[name] = moved[id(tensor)]
