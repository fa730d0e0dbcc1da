"""Executes the PTX that Triton emits for sm_80 on the CPU; see README.md."""

from ptxrun.executor import (
    BarrierError,
    MemoryFault,
    PtxError,
    Race,
    Stats,
    compile_triton,
    launch,
    run_triton,
)

__all__ = [
    "BarrierError",
    "MemoryFault",
    "PtxError",
    "Race",
    "Stats",
    "compile_triton",
    "launch",
    "run_triton",
]
