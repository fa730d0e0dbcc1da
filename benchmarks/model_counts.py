"""Counts of what the kernels do, by running their compiled sm_80 code on the CPU: how they grow with the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastnet_kernels import (
    ChannelGroupLSTM,
    Stage,
    fused_backward,
    fused_forward,
    gemm,
    launch,
    packing,
    plan,
)
from ptxrun import Stats, execute_ptx

DTYPE = torch.bfloat16
STEPS = (8, 16)  # with a tile of 16 images these are whole tiles of every kernel


def counted(launches: Sequence[Stats]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for stats in launches:
        counts.update(
            {
                "instructions": stats.instructions,
                "mma": stats.mma,
                "mma flops": stats.mma_flops,
                "barriers": stats.barriers,
                "bytes through L2": 32 * stats.total["global sectors"],
                "bytes copied to shared": stats.cp_async_bytes,
                "shared wavefronts": stats.total["shared wavefronts"],
                "bytes touched": sum(r + w for r, w in stats.unique.values()),
            }
        )
    return counts


def executed(hidden: int, steps: int) -> dict[str, Counter[str]]:
    """What forward and backward of one group and 16 images do, by kernel."""
    batch = plan.BATCH_TILE
    module = ChannelGroupLSTM([(1, steps, hidden)])
    x = torch.randn(batch, hidden, 1, steps).to(DTYPE).permute(0, 3, 1, 2)  # [B, T, H, 1] channels_last
    dout = torch.randn(batch, hidden).to(DTYPE)
    with torch.no_grad(), execute_ptx(packing, gemm, fused_forward, fused_backward) as runs:
        given = ([x], module.weights(), module.stages)
        _, *saved = launch.forward(*given, save=True, recompute=False)
        launch.backward(dout, *given, *saved, needs_dx=True)
    return {kernel: counted(launches) for kernel, launches in runs.items()}


def executed_split(hidden: int, steps: int) -> dict[str, Counter[str]]:
    """The same of the recurrent kernels where the group is split, all its programs together; without their waiting.

    How often a program reads the counter before the others have arrived is up to the schedule here, and says nothing
    of a GPU: one read a warp and meeting is left, and the loop's three instructions for each.
    """
    plans = plan.plan([Stage(1, steps, hidden)], DTYPE, 80, save=True, split=True)
    size = plan.sizes(plans, plan.BATCH_TILE)
    gates, dgates, h = (torch.randn(n).to(DTYPE) for n in (size.gates, size.gates, size.states))
    packed, out = torch.zeros(size.weights, dtype=DTYPE), torch.zeros(plan.BATCH_TILE, hidden, dtype=DTYPE)
    c, carry = torch.zeros(size.states), torch.zeros(size.carry)
    with execute_ptx(fused_forward, fused_backward) as runs:
        launch.recurrent_forward(
            plans, gates=gates, h=h, c=c, packed=packed, out=out, states=True, keep_gates=True
        )
        launch.recurrent_backward(
            plans, gates=gates, c=c, packed=packed, dout=out, dgates=dgates, carry=carry
        )
    found = {}
    for kernel, (stats,) in runs.items():
        found[kernel] = counted([stats])
        reads = sum(row["requests"] for row in stats.access.values() if "ld.acquire" in row["text"])
        meetings = steps if kernel == "forward_kernel" else steps - 1
        waiting = reads - meetings * plans[0].parts * stats.metadata.num_warps
        found[kernel]["instructions"] -= 3 * waiting
        found[kernel]["bytes through L2"] -= 32 * waiting
    return found


@dataclass(frozen=True)
class Line:
    """A count of one group and 16 images: at the start, and by step."""

    fixed: float
    step: float


Executed = Callable[[int, int], dict[str, Counter[str]]]


def lines(
    hidden: int, lengths: tuple[int, int] = STEPS, execute: Executed = executed
) -> dict[str, dict[str, Line]]:
    """Kernel -> count -> its line through the two lengths."""
    short, long = (execute(hidden, steps) for steps in lengths)
    found: dict[str, dict[str, Line]] = {}
    for kernel, counts in short.items():
        found[kernel] = {}
        for name in counts:
            step = (long[kernel][name] - counts[name]) / (lengths[1] - lengths[0])
            found[kernel][name] = Line(counts[name] - step * lengths[0], step)
    return found
