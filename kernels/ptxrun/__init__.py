"""Executes the PTX that Triton emits for sm_80 on the CPU; see README.md."""

from ptxrun.compiled import Resources, cross_compile
from ptxrun.errors import BarrierError, MemoryFault, PtxError
from ptxrun.launch import launch
from ptxrun.stats import Race, Stats
from ptxrun.triton_glue import compile_triton, execute_ptx, launch_arguments, run_triton

__all__ = [
    "BarrierError",
    "MemoryFault",
    "PtxError",
    "Race",
    "Resources",
    "Stats",
    "compile_triton",
    "cross_compile",
    "execute_ptx",
    "launch",
    "launch_arguments",
    "run_triton",
]
