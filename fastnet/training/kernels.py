"""The Triton kernels of a run, compiled before its first step and once for the ranks that share Triton's cache."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input.device import DeviceTrainStream, launch_kernel
from fastnet.training.phases import plan
from fastnet.training.placement import image_dtype
from fastnet_kernels import Stage, warmup


def prepare_kernels(
    config: Config, runtime: Runtime, backend: str, stream: Any, batch_sizes: Iterable[int]
) -> None:
    """Compiles what the LSTMs of `backend`, in this rank's `batch_sizes`, and `stream` launch. Of the ranks with one
    cache the first does it, and the others read it there.

    Collective. Raises InputError where Triton cannot compile.
    """
    needed = backend == "triton" or isinstance(stream, DeviceTrainStream)
    # GPUs of several generations may differ in what computes the LSTMs.
    if not any(runtime.gather(needed and runtime.device.type == "cuda")):
        return
    # Kernels differ by how many tiles a batch has. On several ranks, one image settles DDP's buckets.
    alone = {1} if runtime.world_size > 1 else set[int]()
    sizes = sorted(alone.union(*runtime.gather(list(batch_sizes))), reverse=True)
    started = time.perf_counter()
    counts: Counter[str] = Counter()
    for mine in turns(runtime):
        with runtime.agree():
            if mine and needed:
                counts = compile_kernels(config, runtime, backend, stream, sizes)
    runtime.say(
        f"Triton kernels: {counts['compiled']} compiled, {counts['found']} found in {warmup.cache_dir()}, "
        f"{time.perf_counter() - started:.1f} s"
    )


def turns(runtime: Runtime) -> tuple[bool, bool]:
    """In which of two turns this rank compiles: the first of the ranks with one cache before the others. Collective."""
    # On another host, or with a cache of its own, a rank would wait for nothing.
    first = runtime.is_first_with(f"{socket.gethostname()}:{warmup.cache_dir()}")
    return first, not first


def compile_kernels(
    config: Config, runtime: Runtime, backend: str, stream: Any, batch_sizes: Iterable[int]
) -> Counter[str]:
    """On this rank alone. Counts the kernels that were compiled, and those found in the cache. Raises InputError."""
    stages = [Stage(*stage) for stage in config.lstm_stages]
    dtype = runtime.dtype
    try:
        with warmup.compiling() as counts:
            if backend == "triton":
                deeper = any(phase.trains(config.read_stages[-1]) for phase in plan(config))
                for size in batch_sizes:
                    warmup.launch_lstms(stages, dtype, runtime.device, size, needs_dx=deeper)
            if isinstance(stream, DeviceTrainStream):
                for size in sorted({size for phase in plan(config) for size in phase.sizes}):
                    launch_kernel(size, image_dtype("device", runtime), runtime.device)
    except warmup.CannotCompile as error:
        cures = "--backend torch and --decode gpu or raw do without"
        raise InputError(f"Triton cannot compile its kernels here: {error}; {cures}") from error
    return counts
