"""Memory of the process: where it runs out, one line says for what, how much there is, and what to do; what is freed
on a CPU is kept for the next step."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch

from fastnet.errors import MemoryFullError
from fastnet.provenance import machine_memory

# What PyTorch, the CUDA runtime, cuBLAS, cuDNN and DALI say then; only PyTorch has an exception of its own for it.
SIGNS = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "CUDA allocation failed",
    "std::bad_alloc",
)

# Settings of glibc's mallopt (malloc.h) in bytes: how much free memory it keeps, and up to which size it keeps a block.
M_TRIM_THRESHOLD, MOST_KEPT = -1, 2**31 - 1
M_MMAP_THRESHOLD, LARGEST_KEPT = -3, 2**30


def keep_freed_memory() -> None:
    """Has glibc keep the memory of large tensors that were freed, for the next ones.

    By default it gives it back to the kernel, which clears it page by page when the next step asks for it again. Does
    nothing with another C library, or one that refuses blocks of this size.
    """
    libc = ctypes.CDLL(None)
    # Without the larger size, setting the other would stop glibc from raising it by itself.
    if hasattr(libc, "mallopt") and libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT):
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


@contextlib.contextmanager
def memory_for(what: str, device: torch.device, remedy: str) -> Iterator[None]:
    """Raises MemoryFullError where memory runs out inside the block: `what` did not fit, `remedy` is what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_of_memory(error):
            raise
        raise MemoryFullError(f"{what}: out of memory on {_described(device)}; {remedy}") from error


def is_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, of a GPU or of this machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in SIGNS)


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return f"this machine ({machine_memory() / 2**30:.1f} GiB)"
    try:
        properties = torch.cuda.get_device_properties(device)
    except RuntimeError:  # no room even for CUDA's own part
        return str(device)
    own = torch.cuda.memory_stats(device).get("reserved_bytes.all.peak", 0)
    return (
        f"{device} ({properties.name}, {properties.total_memory / 2**30:.1f} GiB, of which PyTorch held "
        f"{own / 2**30:.1f} GiB here)"
    )
