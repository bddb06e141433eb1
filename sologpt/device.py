"""Where a model runs, in which dtype, and how its memory and threads are used there."""

import ctypes
import math
import mmap
import re
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from sologpt.errors import UserError

INSTALL = "pytorch.org/get-started/locally has the command that installs one for your GPU"
PEAK_FLOPS = {  # of dense bfloat16 products, by a part of the GPU's name; the first match counts
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
}


def pick_device(name: torch.device | str = "auto") -> torch.device:
    """Return the torch device of that name; "auto" is an accelerator if there is one, else the CPU.

    UserError if it is not available.
    """
    try:
        if name == "auto":
            return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).partition("\n")[0]
        if "Expected one of" in reason:
            reason = "choose auto, cpu, cuda, mps, or another one that PyTorch knows"
        if str(name).startswith("cuda") and not (torch.version.cuda or torch.version.hip):
            reason = f"PyTorch {torch.__version__} is a build for the CPU; {INSTALL}"
        raise UserError(f"device {str(name)!r} is not available: {reason}") from e
    if device.type == "meta":
        raise UserError("device 'meta' holds no data: choose cpu, cuda, mps or auto")
    return device


def peak_flops(device: torch.device) -> float | None:
    """Return the FLOP/s of bfloat16 products that this GPU's maker states; None for an unknown device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this is a CUDA device with bfloat16 units. Older ones emulate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products. "auto" is bfloat16 on a CUDA device that has it, else float32."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return getattr(torch, name)


def make_autocast(name: str, device: torch.device) -> AbstractContextManager:
    """Return a context in which matrix products have this dtype; "auto" is that of `autocast_dtype`."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32; slower on a CPU
    dtype = autocast_dtype(name, device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def keep_freed_memory(below: int = 0) -> None:
    """Make glibc keep freed memory for the next allocation, and not return large tensors to the kernel.

    The kernel hands out such memory again page by page, zeroed. That took a quarter of a training step of
    a model of 124M parameters on a CPU. below: keep only allocations of fewer bytes. Then larger ones leave
    no holes between tensors that live, so the peak is lower; at most 2**25.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        with suppress(AttributeError):  # musl has no mallopt
            if below:
                libc.mallopt(-3, below)  # M_MMAP_THRESHOLD
            else:
                libc.mallopt(-4, 0)  # M_MMAP_MAX: do not serve large allocations by mmap
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep as much unused memory at the heap's end


def return_freed_memory() -> None:
    """Make glibc return freed memory to the kernel, also if it lies between tensors that stay."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # musl has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def zeros_on_demand(like: Tensor, device: torch.device) -> Tensor:
    """Zeros of another tensor's shape and dtype. On a CPU they take memory only where they are written."""
    if device.type != "cpu":
        return torch.zeros_like(like, device=device)
    try:
        memory = mmap.mmap(-1, like.nbytes, access=mmap.ACCESS_COPY)
    except OSError:  # too little memory: PyTorch's error says so
        return torch.zeros_like(like, device=device)
    with suppress(AttributeError, OSError):  # Linux
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # the first byte of one would take all of its 2 MB
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def release_threads() -> None:
    """End the threads that OpenMP keeps for parallel loops of this one. They come back if it runs another.

    If there are more such threads than cores, they sleep after a loop instead of waiting for the next one. A
    second thread then decoded in 30 ms what took 19.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # PyTorch was built without OpenMP
            ctypes.CDLL(None).omp_pause_resource_all(1)  # omp_pause_soft


class HugePages(threading.local):
    """Memory for weights in pages of 2 MB, where Linux has them. A token reads all the weights, and to find
    where each page of 4 KB is took a tenth of its time on a CPU.
    """

    BLOCK = 2**26  # bytes; what is not used of it takes no memory

    def __init__(self) -> None:
        self.block, self.used = mmap.mmap(-1, 1), 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU that is not filled."""
        n = math.prod(shape)
        nbytes = n * dtype.itemsize
        block, start = self.block, (self.used + 63) // 64 * 64  # of a cache line
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        if start + nbytes > len(block):
            try:
                block, start = mmap.mmap(-1, max(nbytes, self.BLOCK), flags=mmap.MAP_PRIVATE), 0
                block.madvise(mmap.MADV_HUGEPAGE)
            except (AttributeError, OSError):  # a system without them, or not enough memory
                return torch.empty(shape, dtype=dtype)
        if len(block) <= self.BLOCK:  # a larger one is freed with its weight
            self.block, self.used = block, start + nbytes
        return torch.frombuffer(block, dtype=dtype, count=n, offset=start).view(shape)

    def copy(self, x: Tensor) -> Tensor:
        """Return a contiguous copy of x, on a GPU perhaps x itself."""
        return self.empty(x.shape, x.dtype).copy_(x) if x.device.type == "cpu" else x.contiguous()

    def take(self, model: torch.nn.Module) -> None:
        """Move a model's weights there, one by one."""
        for weight in model.parameters():
            weight.data = self.copy(weight.data)


HUGE_PAGES = HugePages()


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free, 4 GB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return 1024 * int(found[1])
    return 2**32
