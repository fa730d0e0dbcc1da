"""The Triton kernels of a run, compiled before its first step and once for the ranks that share Triton's cache."""

from __future__ import annotations

import socket
import time

import torch

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet_kernels import Stage, warmup


def prepare_kernels(config: Config, runtime: Runtime, backend: str) -> None:
    """Compiles what the LSTMs launch; of the ranks with one cache, the first does it and the others read it there.

    Collective. Raises InputError where Triton cannot compile.
    """
    if backend != "triton" or runtime.device.type != "cuda":
        return
    started = time.perf_counter()
    # On another host, or with a cache of its own, a rank would wait for nothing.
    first = runtime.is_first_with(f"{socket.gethostname()}:{warmup.cache_dir()}")
    found = compiled = 0
    for mine in (first, not first):
        with runtime.agree():
            if mine:
                counts = _compile(config, runtime)
                found, compiled = counts["found"], counts["compiled"]
    runtime.say(
        f"Triton kernels: {compiled} compiled, {found} found in {warmup.cache_dir()}, "
        f"{time.perf_counter() - started:.1f} s"
    )


def _compile(config: Config, runtime: Runtime) -> warmup.Counter[str]:
    share = max(1, config.batch_size // runtime.world_size // config.accumulate)
    stages = [Stage(*stage) for stage in config.lstm_stages]
    dtype = runtime.amp or torch.float32
    try:
        return warmup.compile_lstms(stages, dtype, runtime.device, share, needs_dx=config.epochs > 0)
    except warmup.CannotCompile as error:
        raise InputError(f"--backend triton: {error}; use --backend torch") from error
