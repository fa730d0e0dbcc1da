"""How the fused kernels lay out a call in memory and cut it into tiles; the launch table.

Legend: B batch, Bp batch rounded up to BATCH_TILE, G groups, T steps, H hidden size = input size, U units per
chunk, C chunks, Hp = C*U padded hidden size, N = 4*U columns of a chunk (gate major: i, f, g, o).
Packed columns run over (chunk, gate, unit), so that a chunk's four gates lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .naive import Stage

BATCH_TILE = 16  # rows of the batch per program, the M of one tensor-core instruction

# Where a program keeps W_hh: in registers over all steps; streamed through shared memory, a chunk's columns at
# once; or in blocks of K as well, for what a chunk's columns do not fit (large H, float32).
RESIDENT, STREAMED, BLOCKED = 0, 1, 2

# Where the batch is small, STREAMED and BLOCKED leave most of the GPU idle. Then a group's hidden units are split: a
# program for each chunk, which keeps its columns of W_hh in shared memory over all steps (STREAMED) or reads them
# every step (BLOCKED), and meets the others of its group and rows once a step (see meeting.py).
# A program of such a launch has 128 threads of up to 255 registers and, at most:
SPLIT_SHARED_KB = 80
# Multiprocessors left to kernels that wait for another GPU, which are NCCL's: even with these there all programs have
# a place, so that neither can hold up the other for ever.
LEFT_FREE = 32
MEETINGS = 64  # (group, batch tile) pairs that there are counters for, forward and backward each
COUNTER_STRIDE = 32  # int32: each has a cache line to itself
# Room for them among elements of 16 bits, and more than that among float32.
COUNTER_ELEMENTS = 2 * MEETINGS * COUNTER_STRIDE * 2


class Tile(NamedTuple):
    """A row of the launch table: it serves hidden sizes up to `upto`."""

    upto: int
    mode: int
    units: int  # hidden units per chunk; 8 * warps keeps a unit's four gates in one warp
    block: int  # K per block of mode BLOCKED
    forward_depth: int  # of the software pipeline: depth - 1 tiles of W_hh lie in shared memory
    backward_depth: int


_LARGE_SHARED = (
    Tile(16, RESIDENT, 16, 16, 3, 3),
    Tile(64, RESIDENT, 32, 32, 3, 3),
    Tile(256, STREAMED, 32, 64, 3, 3),
    Tile(1024, BLOCKED, 32, 64, 4, 4),
)
_SMALL_SHARED = (  # 99 KB
    Tile(16, RESIDENT, 16, 16, 3, 3),
    Tile(64, RESIDENT, 32, 32, 3, 3),
    Tile(256, STREAMED, 32, 64, 2, 2),
    Tile(1024, BLOCKED, 32, 64, 3, 3),
)
_FLOAT32 = (Tile(16, BLOCKED, 16, 16, 2, 2), Tile(1024, BLOCKED, 32, 32, 2, 2))

LAUNCH: dict[int, tuple[Tile, ...]] = {
    80: _LARGE_SHARED,
    86: _SMALL_SHARED,
    87: _LARGE_SHARED,
    89: _SMALL_SHARED,
    90: _LARGE_SHARED,
    100: _LARGE_SHARED,
    103: _LARGE_SHARED,
    120: _SMALL_SHARED,
}
# What one thread block may have (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


class Plan(NamedTuple):
    """One stage of a call: its tile and where its parts begin. A compile-time constant of the kernels."""

    groups: int
    steps: int
    hidden: int
    mode: int
    parts: int  # programs that a group's units are split over: C, or 1
    units: int
    chunks: int
    padded: int  # Hp
    columns: int  # N
    block: int
    forward_depth: int
    backward_depth: int
    pieces: tuple[tuple[int, int], ...]  # (start, width) powers of two that cover K = H in the forward dots
    wide: tuple[tuple[int, int], ...]  # the same for the N = H of the backward dots, at least a chunk wide
    positions: int  # of the map in a tile of a GEMM's result
    slots: int  # of h and c: T + 1 where backward needs them, else 2
    first_program: int  # programs per batch tile before this stage's
    first_meeting: int  # groups before this stage's that are split
    gates_at: int  # elements per row of the batch before this stage's gates [G, T, Bp, 4*Hp]
    states_at: int  # the same for h and c [G, slots, Bp, Hp]
    hidden_weights_at: int  # elements before this stage's packed W_hh [G, C, Hp, N]
    input_weights_at: int  # and before its packed W_ih [G, S, 4*Hp]
    counters_at: int  # and behind all stages' packed weights: counters [2, MEETINGS, COUNTER_STRIDE] int32
    partial_at: int  # elements per part before the partial sums of this stage's weight gradients, see gemm.py
    carry_at: int  # elements per row before what backward carries from step to step, see _carried
    column: int  # of the output
    outputs: int  # columns of the output


def plan(
    stages: Sequence[Stage], dtype: torch.dtype, arch: int, *, save: bool, split: bool = False
) -> tuple[Plan, ...]:
    """The stages of a call, by the launch table of `arch` (of one not in it: the rows for 99 KB).

    With `split`, every stage that has more than one chunk and is not RESIDENT is split. Of the buffers only what
    backward carries differs then, so that who allocates the others need not know.
    """
    return _plan(tuple(stages), _table(dtype, arch), save, split)


def _table(dtype: torch.dtype, arch: int) -> tuple[Tile, ...]:
    return _FLOAT32 if dtype == torch.float32 else LAUNCH.get(arch, _SMALL_SHARED)


@cache
def _plan(stages: tuple[Stage, ...], table: tuple[Tile, ...], save: bool, split: bool) -> tuple[Plan, ...]:
    plans: list[Plan] = []
    program = meeting = gates = states = weights = partial = carry = column = 0
    outputs = sum(s.groups * s.hidden for s in stages)
    for groups, steps, hidden in stages:
        tile = next(row for row in table if hidden <= row.upto)
        chunks = -(-hidden // tile.units)
        if tile.mode == BLOCKED:  # a whole number of blocks
            chunks += -chunks % (tile.block // tile.units)
        padded, slots = chunks * tile.units, steps + 1 if save else 2
        parts = chunks if split and tile.mode != RESIDENT else 1
        plans.append(
            Plan(
                groups=groups,
                steps=steps,
                hidden=hidden,
                mode=tile.mode,
                parts=parts,
                units=tile.units,
                chunks=chunks,
                padded=padded,
                columns=4 * tile.units,
                block=tile.block,
                forward_depth=tile.forward_depth,
                backward_depth=tile.backward_depth,
                pieces=_powers_of_two(hidden, 16),
                wide=_powers_of_two(hidden, tile.units),
                positions=min(64, 1 << (max(hidden, 16) - 1).bit_length()),
                slots=slots,
                first_program=program,
                first_meeting=meeting,
                gates_at=gates,
                states_at=states,
                hidden_weights_at=weights,
                input_weights_at=weights + groups * 4 * padded**2,
                counters_at=0,
                partial_at=partial,
                carry_at=carry,
                column=column,
                outputs=outputs,
            )
        )
        program += groups * parts
        meeting += groups if parts > 1 else 0
        gates += groups * steps * 4 * padded
        states += groups * slots * padded
        weights += groups * 4 * padded * (padded + hidden)
        partial += groups * 4 * padded * (2 * hidden + 1)
        carry += _carried(plans[-1])
        column += groups * hidden
    return tuple(p._replace(counters_at=weights) for p in plans)


def _carried(p: Plan) -> int:
    """Elements per row of what backward carries from step to step through memory.

    Split: two halves used in turn of [G, tiles, C, BATCH_TILE, Hp], the parts' sums of dh. Else dh and dc, each
    [G, Bp, Hp], but for RESIDENT.
    """
    if p.mode == RESIDENT:
        return 0
    return 2 * p.groups * p.padded * p.parts


def decide(
    stages: Sequence[Stage], dtype: torch.dtype, arch: int, *, save: bool, tiles: int, processors: int
) -> tuple[Plan, ...]:
    """The plans of a call of so many batch tiles: split where all its programs fit the multiprocessors together."""
    most = programs_per_sm(arch) * max(0, processors - LEFT_FREE)
    split = plan(stages, dtype, arch, save=save, split=True)
    meetings = sum(p.groups for p in split if p.parts > 1) * tiles
    fits = 0 < meetings <= MEETINGS and programs(split) * tiles <= most
    return split if fits else plan(stages, dtype, arch, save=save)


def programs_per_sm(arch: int) -> int:
    """Programs of a launch with split stages that a multiprocessor holds at once.

    Two by their registers; the shared memory of a multiprocessor is 1 KB more than a block may have, and each block
    takes 1 KB besides its own (CUDA C++ Programming Guide, compute capabilities).
    """
    return min(2, (SHARED_KB.get(arch, 99) + 1) // (SPLIT_SHARED_KB + 1))


def programs(plans: Sequence[Plan]) -> int:
    """Of a recurrent launch, per tile of the batch."""
    return sum(p.groups * p.parts for p in plans)


def is_split(plans: Sequence[Plan]) -> bool:
    return any(p.parts > 1 for p in plans)


def architecture(device: torch.device) -> int:
    """10 * major + minor of a GPU; 80 where there is none (interpreter, fake tensors)."""
    return _capability(_index(device)) if device.type == "cuda" else 80


def multiprocessors(device: torch.device) -> int:
    """Of a GPU, or of the part of it that this process has; 0 where there is none."""
    return _multiprocessors(_index(device)) if device.type == "cuda" else 0


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


@cache
def _capability(index: int) -> int:
    if not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 0


def plans_for(x: Tensor, stages: Sequence[Stage], *, save: bool) -> tuple[Plan, ...]:
    """The plans for a feature map of a call: split where all programs of a launch fit x's GPU together."""
    arch, processors = architecture(x.device), multiprocessors(x.device)
    tiles = padded_batch(x.shape[0]) // BATCH_TILE
    return decide(stages, x.dtype, arch, save=save, tiles=tiles, processors=processors)


def _powers_of_two(size: int, least: int) -> tuple[tuple[int, int], ...]:
    """`size` rounded up to a multiple of `least`, as descending powers of two of at most 128: (start, width)."""
    pieces, start, left = [], 0, size + -size % least
    while left:
        width = min(128, 1 << (left.bit_length() - 1))
        pieces.append((start, width))
        start, left = start + width, left - width
    return tuple(pieces)


def padded_batch(batch: int) -> int:
    return (batch + BATCH_TILE - 1) // BATCH_TILE * BATCH_TILE


class Sizes(NamedTuple):
    """Elements of a call's buffers: gates, h and c each, packed weights and counters, one part's partial sums, what
    backward carries."""

    gates: int
    states: int
    weights: int
    partial: int
    carry: int


def sizes(plans: Sequence[Plan], bp: int) -> Sizes:
    p = plans[-1]
    return Sizes(
        gates=bp * (p.gates_at + p.groups * p.steps * 4 * p.padded),
        states=bp * (p.states_at + p.groups * p.slots * p.padded),
        weights=p.counters_at + COUNTER_ELEMENTS,
        partial=p.partial_at + p.groups * 4 * p.padded * (2 * p.hidden + 1),
        carry=bp * (p.carry_at + _carried(p)),
    )
