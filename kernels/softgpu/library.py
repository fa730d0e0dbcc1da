"""The library in CUDA's place: compiles cuda/*.c, loads it before torch, and reads its counters."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = sorted(Path(__file__).with_name("cuda").glob("*.[ch]"))

ON_WAIT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
ON_CAPTURED = ctypes.CFUNCTYPE(
    None, ctypes.c_long, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
)
ON_GRAPH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long, ctypes.c_int)
GRAPH_LAUNCHED, GRAPH_DESTROYED, CAPTURE_ENDED = range(3)  # as in softgpu.h

_library: ctypes.CDLL | None = None


def build() -> Path:
    """The compiled library, as libcuda.so.1 in a directory named by the sources' hash; compiled once.

    Raises RuntimeError without a C compiler ($CC, gcc or clang) or without Triton, which brings CUDA's headers.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softgpu" / digest
    library = cache / "libcuda.so.1"
    if library.exists():
        return library
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise RuntimeError("softgpu needs Triton, which brings CUDA's headers; install it")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("softgpu needs a C compiler; install gcc or clang, or set $CC")
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    cache.mkdir(parents=True, exist_ok=True)
    beside = cache / f"{os.getpid()}.so"
    flags = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{headers}"]
    sources = [str(path) for path in SOURCES if path.suffix == ".c"]
    subprocess.run([compiler, *flags, *sources, "-o", str(beside), "-ldl", "-lpthread"], check=True)
    beside.rename(library)
    return library


def load(devices: int = 1, capability: int = 80, memory_mb: int = 81920) -> ctypes.CDLL:
    """Puts the library in front of CUDA's. Raises RuntimeError where torch has already bound to CUDA's own."""
    global _library
    if "torch" in sys.modules:
        raise RuntimeError("softgpu.install() must come before torch is imported")
    path = build()
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # it speaks of this machine's own GPUs
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    _library.softgpu_configure(devices, capability, ctypes.c_size_t(memory_mb << 20))
    _library.softgpu_capturing.restype = ctypes.c_long
    _library.softgpu_count_kernel.argtypes = [ctypes.c_void_p]
    return _library


def library() -> ctypes.CDLL:
    """The loaded library. Raises RuntimeError before `load`."""
    if _library is None:
        raise RuntimeError("softgpu is not installed in this process")
    return _library


def counters() -> dict[str, int]:
    """What was asked of CUDA since the process began, by name: see README.md."""
    names, values = (ctypes.c_char_p * 64)(), (ctypes.c_long * 64)()
    n = library().softgpu_counters(names, values)
    return {names[i].decode(): values[i] for i in range(n)}  # type: ignore[union-attr]
