"""Executes the PTX that Triton emits for sm_80 on the CPU; see README.md."""

from ptxrun.errors import BarrierError, MemoryFault, PtxError
from ptxrun.launch import launch
from ptxrun.stats import Race, Stats
from ptxrun.triton_glue import compile_triton, run_triton

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
