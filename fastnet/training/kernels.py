"""The Triton kernels of a run, compiled before its first step and once for the ranks that share Triton's cache."""

from __future__ import annotations

import socket
import time
from collections import Counter
from typing import Any

import torch

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input.device import DeviceTrainStream
from fastnet_kernels import Stage, warmup


def prepare_kernels(config: Config, runtime: Runtime, backend: str, stream: Any) -> None:
    """Compiles what the LSTMs of `backend` and `stream` launch. Of the ranks with one cache the first does it, and the
    others read it there.

    Collective. Raises InputError where Triton cannot compile.
    """
    needed = backend == "triton" or isinstance(stream, DeviceTrainStream)
    if not needed or runtime.device.type != "cuda":
        return
    started = time.perf_counter()
    # On another host, or with a cache of its own, a rank would wait for nothing.
    first = runtime.is_first_with(f"{socket.gethostname()}:{warmup.cache_dir()}")
    counts: Counter[str] = Counter()
    for mine in (first, not first):
        with runtime.agree():
            if mine:
                counts = _compile(config, runtime, backend, stream)
    runtime.say(
        f"Triton kernels: {counts['compiled']} compiled, {counts['found']} found in {warmup.cache_dir()}, "
        f"{time.perf_counter() - started:.1f} s"
    )


def _compile(config: Config, runtime: Runtime, backend: str, stream: Any) -> Counter[str]:
    share = max(1, config.batch_size // runtime.world_size // config.accumulate)
    stages = [Stage(*stage) for stage in config.lstm_stages]
    dtype = runtime.amp or torch.float32
    try:
        with warmup.compiling() as counts:
            if backend == "triton":
                warmup.launch_lstms(stages, dtype, runtime.device, share, needs_dx=config.epochs > 0)
            if isinstance(stream, DeviceTrainStream):
                stream.make(0)
    except warmup.CannotCompile as error:
        cures = "--backend torch and --decode gpu or raw do without"
        raise InputError(f"Triton cannot compile its kernels here: {error}; {cures}") from error
    return counts
