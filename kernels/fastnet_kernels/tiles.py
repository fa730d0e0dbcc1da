# Tuples grow in loops that the Triton compiler unrolls, which mypy does not know.
# mypy: ignore-errors
"""What the recurrent kernels share, forward and backward: which program does what, and the indices within a tile."""

from __future__ import annotations

import triton
import triton.language as tl

from .plan import BLOCKED, COUNTER_STRIDE, MEETINGS, RESIDENT

IS_RESIDENT = tl.constexpr(RESIDENT)
IS_BLOCKED = tl.constexpr(BLOCKED)
MOST_MEETINGS = tl.constexpr(MEETINGS)
STRIDE = tl.constexpr(COUNTER_STRIDE)


@triton.jit
def locate(batch, P: tl.constexpr, R: tl.constexpr):
    """This program's group within stage P (outside 0..G-1 if it belongs to another), first row, part, and Bp."""
    tiles = (batch + R - 1) // R
    program = tl.program_id(0) - P.first_program * tiles
    row = program // P.parts % tiles * R
    group = tl.where(program < 0, -1, program // (P.parts * tiles))  # // alone rounds towards zero
    return group.to(tl.int64), row.to(tl.int64), program % P.parts, tiles.to(tl.int64) * R


@triton.jit
def counter_of(packed, g, row, bp, P: tl.constexpr, BACKWARD: tl.constexpr, R: tl.constexpr):
    """The counter at which the programs of group g and the rows from `row` on meet (see meeting.py)."""
    meeting = ((P.first_meeting + g) * bp + row) // R
    counters = (packed + P.counters_at).to(tl.pointer_type(tl.int32), bitcast=True)
    return counters + ((MOST_MEETINGS if BACKWARD else 0) + meeting) * STRIDE


@triton.jit
def tile_indices(P: tl.constexpr, R: tl.constexpr):
    """Rows [R, 1], units [1, U] and packed columns [1, N] of a chunk's tile."""
    return (
        tl.arange(0, R)[:, None],
        tl.arange(0, P.units)[None, :],
        tl.arange(0, P.columns)[None, :],
    )


@triton.jit
def load_resident_weights(w, P: tl.constexpr):
    """A group's whole W_hh as tiles [U, N]: tile j*C + i has chunk j's columns and piece i of K.

    K comes in pieces of U, so that a chunk of h is a piece of K.
    """
    k = tl.arange(0, P.units)[:, None]
    n = tl.arange(0, P.columns)[None, :]
    tiles = ()
    for j in tl.static_range(P.chunks):
        for i in tl.static_range(P.chunks):
            tiles = tiles + (tl.load(w + (j * P.padded + i * P.units + k) * P.columns + n),)  # noqa: RUF005
    return tiles


@triton.jit
def output_tile(j, rows, P: tl.constexpr, R: tl.constexpr):
    """Offsets [R, U] of chunk j in the output and whether they exist: `rows` of the tile are in the batch."""
    r, u, _ = tile_indices(P, R)
    unit = j * P.units + u
    return r * P.outputs + unit, (r < rows) & (unit < P.hidden)
