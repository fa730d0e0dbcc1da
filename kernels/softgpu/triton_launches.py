"""Triton kernels on "cuda" tensors: compiled and launched as ever, and then run from their PTX by ptxrun.

The launch goes through Triton's own launcher and driver (cuda/kernels.c counts it), from its JIT or from a program that
Inductor wrote. What was compiled for the device, which says it is sm_80, is then executed on the tensors' memory.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch._inductor import config as inductor
from triton.compiler import CompiledKernel

from ptxrun import launch, launch_arguments
from ptxrun.errors import MemoryFault
from softgpu import graphs, watching
from softgpu.host import alias, region

AHEAD = 9  # of the launcher's arguments come before the kernel's: the grid, the stream, hooks and so on


def _execute(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Runs the compiled `kernel` on the memory of its arguments; within a capture, at each replay as well."""
    name, meta = kernel.src.fn.__name__, kernel.metadata
    given = launch_arguments(kernel.src.signature, dict(zip(kernel.src.fn.arg_names, args, strict=True)))
    here = torch.cuda.current_device()
    tensors = {n: value for n, value in given.items() if isinstance(value, torch.Tensor)}
    for n, tensor in tensors.items():
        if not tensor.is_cuda or tensor.device.index != here:
            raise RuntimeError(f"softgpu: {name} runs on cuda:{here}, its {n} is on {tensor.device}")
    values = [alias(value) if n in tensors else value for n, value in given.items()]
    together = {"resident": math.prod(grid)} if meta.launch_cooperative_grid else {}

    def run() -> Any:
        return launch(
            kernel.asm["ptx"],
            grid,
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
    # Inductor's own launcher loads kernels where nobody sees it. What it would choose by time, it is not to try out.
    inductor.use_static_cuda_launcher = inductor.shape_padding = inductor.triton.autotune_pointwise = False
    inductor.compile_threads, inductor.deterministic = 1, True
    given = CompiledKernel._init_handles

    def init_handles(self: CompiledKernel) -> None:
        if self.module is not None:
            return
        given(self)
        start = self._run

        def run(*args: Any) -> None:
            start(*args)
            if mode == "exact":
                _execute(self, args[:3], args[AHEAD:], options)
            else:
                watching.note_launch(self.src.fn.__name__, None)

        self._run = run

    CompiledKernel._init_handles = init_handles
