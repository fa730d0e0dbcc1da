"""softgpu: torch's and Triton's CUDA code paths, with right numbers, where there is no GPU. See README.md."""

from __future__ import annotations

import importlib.util
from typing import Any

from softgpu.library import counters, load
from softgpu.watching import Call, Launch, Operand, Watch, watch

__all__ = ["Call", "Launch", "Operand", "Watch", "counters", "install", "watch"]


def install(
    *,
    devices: int = 1,
    capability: int = 80,
    memory_mb: int = 81920,
    operators: str = "exact",
    triton: str = "exact",
    **ptxrun_options: Any,
) -> None:
    """Makes this process one with `devices` GPUs. Before torch is imported; for good.

    Args:
        capability: compute capability, 80 for 8.0. Only kernels for sm_80 can be executed.
        memory_mb: of each GPU; cudaMalloc fails above it.
        operators: "exact" computes torch's operators on the host; "null" counts their kernels and drops them, with one
            for each operator of cuBLAS or cuDNN.
        triton: "exact" runs the kernels' PTX by ptxrun, "null" counts and drops them.
        ptxrun_options: of ptxrun.launch: schedule, seed, check_uninit, ...

    Raises:
        RuntimeError: torch has been imported before, or there is no C compiler.
    """
    load(devices, capability, memory_mb)
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("softgpu could not take CUDA's place")
    from softgpu import distributed, graphs, triton_launches, watching
    from softgpu import operators as aten

    watching.install()
    graphs.install()
    aten.install(operators)
    triton_launches.install(triton, **ptxrun_options)
    distributed.install()
    if importlib.util.find_spec("nvidia.dali"):
        from softgpu import dali

        dali.install()
