"""Compiles kernels before they are needed, so that one process of a machine can do it for all: Triton's cache on disk
has them for the others."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .naive import Stage, Weights


class CannotCompile(Exception):
    """Triton or a tool that it needs cannot compile a kernel on this machine. The message says why, in one line."""


def cache_dir() -> Path:
    """Where Triton keeps what it has compiled: $TRITON_CACHE_DIR, or its default."""
    from triton import knobs

    return Path(knobs.cache.dir)


@contextmanager
def compiling() -> Iterator[Counter[str]]:
    """Inside, Triton's kernels are compiled and loaded but not launched; counts those `compiled`, and `found` in the
    cache. Raises CannotCompile."""
    from triton import knobs
    from triton.errors import TritonError
    from triton.runtime.jit import JITFunction

    seen: Counter[str] = Counter()
    run, listener = JITFunction.run, knobs.compilation.listener

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel.run  # noqa: B018  (makes the launcher and loads the kernel)
        return kernel

    def note(*, cache_hit: bool, **told: Any) -> None:
        seen["found" if cache_hit else "compiled"] += 1
        if listener is not None:
            listener(cache_hit=cache_hit, **told)

    JITFunction.run, knobs.compilation.listener = compile_only, note
    try:
        yield seen
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        raise CannotCompile(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
    finally:
        JITFunction.run, knobs.compilation.listener = run, listener


def launch_lstms(
    stages: Sequence[Stage], dtype: torch.dtype, device: torch.device, batch: int, *, needs_dx: bool
) -> None:
    """Launches all that training and inference of these stages do at `batch` images, on memory that nobody wrote: for
    use inside `compiling`.

    needs_dx: whether the gradient of the feature maps is computed as well.
    """
    from . import launch  # needs triton

    features = [
        torch.empty(batch, s.groups * s.seq_len, s.hidden, 1, dtype=dtype, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for s in stages
    ]
    weights = [
        Weights(
            *(torch.empty(s.groups, 4 * s.hidden, s.hidden, device=device) for _ in range(2)),
            *(torch.empty(s.groups, 4 * s.hidden, device=device) for _ in range(2)),
        )
        for s in stages
    ]
    launch.forward(features, weights, stages, save=False, recompute=False)
    out, *saved = launch.forward(features, weights, stages, save=True, recompute=False)
    launch.backward(out, features, weights, stages, *saved, needs_dx=needs_dx)
