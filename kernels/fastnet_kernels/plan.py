"""How the fused kernels lay out a call in memory and cut it into tiles; the launch table.

Legend: B batch, Bp batch rounded up to BATCH_TILE, G groups, T steps, H hidden size = input size, U units per
chunk, C chunks, Hp = C*U padded hidden size, N = 4*U columns of a chunk (gate major: i, f, g, o).
Packed columns run over (chunk, gate, unit), so that a chunk's four gates lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .naive import Stage, Weights

BATCH_TILE = 16  # rows of the batch per program, the M of one tensor-core instruction

# Where a program keeps W_hh: in registers over all steps; streamed through shared memory, a chunk's columns at
# once; or in blocks of K as well, for what a chunk's columns do not fit (large H, float32).
RESIDENT, STREAMED, BLOCKED = 0, 1, 2


class Tile(NamedTuple):
    """A row of the launch table: it serves hidden sizes up to `upto`."""

    upto: int
    mode: int
    units: int  # hidden units per chunk; 8 * warps keeps a unit's four gates in one warp
    block: int  # K per block of mode BLOCKED
    forward_stages: int  # pipeline depth; in shared memory lie forward_stages - 1 tiles of W_hh
    backward_stages: int


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
    89: _SMALL_SHARED,
    90: _LARGE_SHARED,
    100: _LARGE_SHARED,
    120: _SMALL_SHARED,
}
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # what one CUDA thread block may have


class Plan(NamedTuple):
    """One stage of a call: its tile and where its parts begin. A compile-time constant of the kernels."""

    groups: int
    steps: int
    hidden: int
    mode: int
    units: int
    chunks: int
    block: int
    forward_stages: int
    backward_stages: int
    pieces: tuple[tuple[int, int], ...]  # (start, width) powers of two that cover K = H in the forward dots
    wide: tuple[tuple[int, int], ...]  # the same for the N = H of the backward dots, at least a chunk wide
    slots: int  # of h and c: T + 1 where backward needs them, else 2
    first_group: int
    gates_at: int  # elements per row of the batch before this stage's gates [G, T, Bp, 4*Hp]
    states_at: int  # the same for h and c [G, slots, Bp, Hp]
    weights_at: int  # elements before this stage's packed W_hh [G, C, Hp, N]
    carry_at: (
        int  # elements per row before backward's dh and dc [G, Bp, Hp]; RESIDENT keeps them in registers
    )
    column: int  # of the output
    outputs: int  # columns of the output

    @property
    def padded(self) -> int:
        return self.units * self.chunks


def plan(stages: Sequence[Stage], dtype: torch.dtype, arch: int, *, save: bool) -> tuple[Plan, ...]:
    """The stages of a call, by the launch table of `arch` (of one not in it: the rows for 99 KB)."""
    table = _FLOAT32 if dtype == torch.float32 else LAUNCH.get(arch, _SMALL_SHARED)
    plans: list[Plan] = []
    group = gates = states = weights = carry = column = 0
    outputs = sum(s.groups * s.hidden for s in stages)
    for groups, steps, hidden in stages:
        tile = next(row for row in table if hidden <= row.upto)
        chunks = -(-hidden // tile.units)
        if tile.mode == BLOCKED:  # a whole number of blocks
            chunks += -chunks % (tile.block // tile.units)
        padded, slots = chunks * tile.units, steps + 1 if save else 2
        plans.append(
            Plan(
                groups, steps, hidden, tile.mode, tile.units, chunks, tile.block,
                tile.forward_stages, tile.backward_stages,
                _powers_of_two(hidden, 16), _powers_of_two(hidden, tile.units), slots,
                group, gates, states, weights, carry, column, outputs,
            )
        )  # fmt: skip
        group += groups
        gates += groups * steps * 4 * padded
        states += groups * slots * padded
        weights += groups * 4 * padded * padded
        carry += 0 if tile.mode == RESIDENT else groups * padded
        column += groups * hidden
    return tuple(plans)


def architecture(device: torch.device) -> int:
    """10 * major + minor of a GPU; 80 where there is none (interpreter, fake tensors)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def plans_for(x: Tensor, stages: Sequence[Stage], *, save: bool) -> tuple[Plan, ...]:
    return plan(stages, x.dtype, architecture(x.device), save=save)


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
    """Elements of the buffers of a call: gates, h and c each, packed W_hh, dh and dc each."""

    gates: int
    states: int
    weights: int
    carry: int


def sizes(plans: Sequence[Plan], bp: int) -> Sizes:
    p = plans[-1]
    return Sizes(
        bp * (p.gates_at + p.groups * p.steps * 4 * p.padded),
        bp * (p.states_at + p.groups * p.slots * p.padded),
        p.weights_at + p.groups * 4 * p.padded**2,
        bp * (p.carry_at + (0 if p.mode == RESIDENT else p.groups * p.padded)),
    )


def pack_columns(weight: Tensor, p: Plan) -> Tensor:
    """[G, 4H, K] -> a view [G, K, C, 4, U] of it, padded with zero units."""
    groups, _, k = weight.shape
    w = F.pad(weight.view(groups, 4, p.hidden, k), (0, 0, 0, p.padded - p.hidden))
    return w.view(groups, 4, p.chunks, p.units, k).permute(0, 4, 2, 1, 3)


def pack(weights: Weights, p: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A stage's parameters as the kernels read them, every row a multiple of 16 bytes.

    Returns:
        W_ih [G, S, 4*Hp] and W_hh [G, C, Hp, N] in `dtype` (rows of W_hh beyond H are zero), the sum of the
        biases [G, 4*Hp] in float32.
    """
    ih = weights.ih.new_empty(p.groups, p.hidden, p.chunks, 4, p.units, dtype=dtype)
    ih.copy_(pack_columns(weights.ih, p))
    hh = weights.hh.new_zeros(p.groups, p.chunks, p.padded, 4, p.units, dtype=dtype)
    hh[:, :, : p.hidden].copy_(pack_columns(weights.hh, p).transpose(1, 2))
    bias = (weights.bias_ih.float() + weights.bias_hh.float())[..., None]
    return ih.flatten(2), hh.flatten(3), pack_columns(bias, p).flatten(1)


def unpack(packed: Tensor, p: Plan) -> Tensor:
    """[G, 4*Hp, K] in packed columns -> [G, 4H, K] in nn.LSTM's order."""
    groups, _, k = packed.shape
    w = packed.view(groups, p.chunks, 4, p.units, k).transpose(1, 2).reshape(groups, 4, p.padded, k)
    return w[:, :, : p.hidden].reshape(groups, 4 * p.hidden, k)
