"""Run a kernel over a grid."""

from __future__ import annotations

import operator
import random
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptxrun.errors import PtxError
from ptxrun.machine import CTA, Run
from ptxrun.memory import map_arguments
from ptxrun.parser import parse
from ptxrun.stats import Stats

MAX_STEPS = 5_000_000


def launch(
    ptx: str,
    grid: Sequence[int],
    args: Sequence[Any],
    num_warps: int,
    shared_bytes: int,
    *,
    schedule: str = "lockstep",
    seed: int = 0,
    check_uninit: bool = True,
    resident: int = 1,
    names: Sequence[str] | None = None,
    scratch_bytes: int = 0,
    max_steps: int = MAX_STEPS,
    entry: str | None = None,
) -> Stats:
    """Run one kernel over `grid`; array arguments are changed in place. README.md describes the options."""
    kernel = parse(ptx, entry)
    nx, ny, nz = (*grid, 1, 1, 1)[:3]
    if kernel.threads not in (None, 32 * num_warps):
        raise PtxError(f"the kernel wants {kernel.threads} threads, num_warps gives {32 * num_warps}")
    if schedule not in ("lockstep", "random"):
        raise ValueError(f"unknown schedule {schedule!r}")
    run = Run(kernel, nx * ny * nz, num_warps, check_uninit, shared_bytes)
    _alive = bind(run, args, names or [f"arg{i}" for i in range(len(args))], scratch_bytes, num_warps)

    rng = random.Random(seed) if schedule == "random" else None
    special = {f"%{name}.{axis}": 0 for name in ("tid", "ctaid") for axis in "xyz"}
    special |= {"%ntid.x": 32 * num_warps, "%ntid.y": 1, "%ntid.z": 1}
    special |= {"%nctaid.x": nx, "%nctaid.y": ny, "%nctaid.z": nz}
    special |= {"%smid": 0, "%nsmid": 1, "%dynamic_smem_size": shared_bytes}
    todo = list(range(nx * ny * nz))
    if rng:
        rng.shuffle(todo)
    todo.reverse()

    def start(cta: CTA) -> CTA:
        i = todo.pop()
        cta.start(i, (i % nx, i // nx % ny, i // (nx * ny)))
        return cta

    with np.errstate(all="ignore"):
        busy = [start(CTA(run, num_warps, special, rng)) for _ in range(min(max(1, resident), len(todo)))]
        while busy:
            for cta in list(busy):
                quantum = None if len(busy) == 1 else rng.randrange(1, 200) if rng else 50
                if cta.run_for(quantum, max_steps):
                    start(cta) if todo else busy.remove(cta)
    stats = run.stats
    touched = [r for r in run.regions.values() if "shadow" in r.__dict__]
    stats.unique = {r.name: r.unique_bytes() for r in touched}
    stats.access = {k: v for k, v in sorted(stats.access.items()) if v["requests"]}
    return stats


def bind(run: Run, args: Sequence[Any], names: Sequence[str], scratch_bytes: int, warps: int) -> list[Any]:
    """Give the arguments addresses and fill the parameters. Returns what has to outlive the launch."""
    kernel, args, names = run.kernel, list(args), list(names)
    extra = len(kernel.params) - len(args)  # Triton appends global and profile scratch pointers
    if not 0 <= extra <= 2 or any(t != "u64" for _, t, _ in kernel.params[len(args) :]):
        raise PtxError(f"the kernel takes {len(kernel.params)} parameters, {len(args)} arguments given")
    if extra:
        ctas = len(run.stats.per_cta)
        args += [np.zeros(scratch_bytes * ctas, np.uint8) if scratch_bytes else 0, 0][:extra]
        names += ["global scratch", "profile scratch"][:extra]
    is_array = [hasattr(a, "data_ptr") or np.ndim(a) > 0 for a in args]
    arrays = [(n, a) for n, a, yes in zip(names, args, is_array, strict=True) if yes]
    tables = [(name, table.copy()) for name, table in kernel.tables.items()]
    run.regions, addresses = map_arguments(arrays + tables, run.granule["global"], warps)
    run.symbols = {name: at for (name, _), at in zip(tables, addresses[len(arrays) :], strict=True)}
    given, raw = iter(addresses), b""
    for (name, t, size), a, yes in zip(kernel.params, args, is_array, strict=True):
        raw += bytes(-len(raw) % size)
        run.symbols[name] = len(raw)  # parameters have a small address space of their own
        raw += encode(next(given) if yes else a, t, size)
    run.symbols["retval0"] = len(raw)  # what a dropped call returns
    run.params = np.frombuffer(raw + bytes(64), np.uint8)
    return [args, tables]


def encode(value: Any, t: str, size: int) -> bytes:
    """A scalar as the bytes of a parameter of type t."""
    if t[0] == "f" or (t[0] == "b" and isinstance(value, float | np.floating)):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(value))
    value = int(value) if isinstance(value, np.bool_) else operator.index(value)
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")
