"""Triton kernels on "cuda" tensors: compiled and launched as ever, and then run from their PTX by ptxrun.

The launch goes through Triton's own JIT, launcher and driver (cuda/kernels.c counts it). What it compiled for the
device, which says it is sm_80, is then executed on the tensors' memory.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ptxrun import launch, launch_arguments
from ptxrun.errors import MemoryFault
from softgpu import graphs, watching
from softgpu.host import alias, region

_binders: dict[JITFunction, Any] = {}


def _bind(fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All parameters of the kernel by name."""
    if fn not in _binders:
        backend = make_backend(GPUTarget("cuda", 80, 32))
        _binders[fn] = create_function_from_signature(fn.signature, fn.params, backend)
    bound, _, _ = _binders[fn](*args, **{"debug": False, **kwargs})
    return bound


def _execute(name: str, kernel: Any, grid: Any, bound: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Runs the compiled `kernel` on the memory of its arguments; within a capture, at each replay as well."""
    given = launch_arguments(kernel.src.signature, bound)
    here = torch.cuda.current_device()
    tensors = {n: value for n, value in given.items() if isinstance(value, torch.Tensor)}
    for n, tensor in tensors.items():
        if not tensor.is_cuda or tensor.device.index != here:
            raise RuntimeError(f"softgpu: {name} runs on cuda:{here}, its {n} is on {tensor.device}")
    values = [alias(value) if n in tensors else value for n, value in given.items()]
    sizes = grid(bound) if callable(grid) else grid
    meta = kernel.metadata
    together = {"resident": math.prod(sizes)} if meta.launch_cooperative_grid else {}

    def run() -> Any:
        return launch(
            kernel.asm["ptx"],
            sizes,
            values,
            meta.num_warps,
            meta.shared,
            names=list(given),
            entry=meta.name,
            scratch_bytes=meta.global_scratch_size,
            **{**options, **together},
        )

    graph = graphs.capturing(here)
    if graph:
        graphs.keep(graph, map(region, tensors.values()))
        graphs.record(graph, lambda: watching.note_launch(name, run()))
        with contextlib.suppress(MemoryFault):  # which a replay will raise
            run()
    else:
        watching.note_launch(name, run())


def install(mode: str, **options: Any) -> None:
    """`mode`: exact executes every launch, null counts and drops it. `options` are those of ptxrun.launch."""
    if mode not in ("exact", "null"):
        raise ValueError(f"triton={mode!r}: must be exact or null")
    inspect.signature(launch).bind_partial(**options)  # raises TypeError for others
    given = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = given(self, *args, grid=grid, warmup=warmup, **kwargs)
        if not warmup and kernel is not None:
            if mode == "exact":
                _execute(self.__name__, kernel, grid, _bind(self, args, kwargs), options)
            else:
                watching.note_launch(self.__name__, None)
        return kernel

    JITFunction.run = run
