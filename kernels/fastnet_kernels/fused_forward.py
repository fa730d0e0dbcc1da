# ruff: noqa: RUF005 - the Triton compiler knows tuple + tuple, not (*tuple, element)
# Tuples grow in loops that the Triton compiler unrolls, which mypy does not know.
# mypy: ignore-errors
"""The recurrent part of the forward pass in Triton: one launch for all groups of all stages.

A program owns one group and R = BATCH_TILE rows of the batch, for all steps; or, where the group is split, one chunk of
its units, and then reads what the others of the group wrote after it has met them (meeting.py). No other programs do.
What lies where, per program (legend in plan.py):

    registers       accumulators, h_{t-1} as the operand of the dots; RESIDENT also W_hh, h and c; split also c
    shared memory   tiles in flight from global memory: of W_hh, the gates, c; split a chunk's columns of W_hh to stay
    global memory   gates [G, T, Bp, 4*Hp]   pre-activations in, activated gates out, in place
                    h, c  [G, slots, Bp, Hp] slot t holds h_{t-1}, c_{t-1}; slot 0 zeros; inference has two slots
                    W_hh  [G, C, Hp, N]      packed, so that every copy of it is 16 bytes wide

The batch is padded to whole tiles in all of these, so only the output and its gradient need a mask. The padding
rows repeat the last sample; with a zero gradient of the output their gradients are zero.

Triton orders nothing between threads in global memory: wherever a thread reads what another thread of the program
wrote there, a tl.debug_barrier() stands between. It stands in the loop over the steps, never in a pipelined loop,
where it would stop the pipelining; and a pipelined loop never loads what it has stored itself, because its loads run
ahead of its stores. At the end of a pipelined loop the compiler puts a barrier of its own, for shared memory, next to
some of these; nothing promises that it always will. All copies are cp.async, which a barrier orders; bulk copies (TMA)
of data that the program has just stored would also need a proxy fence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gates import activate, merge, tanh
from .meeting import arrive, leave, wait
from .tiles import (
    IS_BLOCKED,
    IS_RESIDENT,
    counter_of,
    load_resident_weights,
    locate,
    output_tile,
    tile_indices,
)


@triton.jit
def forward_resident(
    gates, h, c, w, out, rows, bp, P: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, R: tl.constexpr
):
    """W_hh, h and c stay in registers; h and c are stored only for backward (STATES), and so are the gates (GATES).

    The pre-activations of the next two steps are loaded ahead.
    """
    r, u, n = tile_indices(P, R)
    dtype = h.dtype.element_ty
    w_tiles = load_resident_weights(w, P)
    h_tiles = ()
    c_tiles = ()
    for j in tl.static_range(P.chunks):
        h_tiles = h_tiles + (tl.full((R, P.units), 0, dtype),)
        c_tiles = c_tiles + (tl.full((R, P.units), 0, tl.float32),)
        if STATES:
            tl.store(h + r * P.padded + j * P.units + u, h_tiles[j])
            tl.store(c + r * P.padded + j * P.units + u, c_tiles[j])
    for _ in tl.range(P.steps, num_stages=P.forward_depth):
        h += bp * P.padded
        c += bp * P.padded
        h_next = ()
        c_next = ()
        for j in tl.static_range(P.chunks):
            at = r * (4 * P.padded) + j * P.columns + n
            a = tl.load(gates + at).to(tl.float32)
            for i in tl.static_range(P.chunks):
                a = tl.dot(h_tiles[i], w_tiles[j * P.chunks + i], a, input_precision="ieee")
            gi, gf, gg, go = activate(a, R, P.units)
            c_j = gf * c_tiles[j] + gi * gg
            h_j = (go * tanh(c_j)).to(dtype)
            h_next = h_next + (h_j,)
            c_next = c_next + (c_j,)
            if STATES:
                tl.store(h + r * P.padded + j * P.units + u, h_j)
                tl.store(c + r * P.padded + j * P.units + u, c_j)
            if GATES:
                tl.store(gates + at, merge(gi, gf, gg, go, R, P.units).to(dtype))
        h_tiles = h_next
        c_tiles = c_next
        gates += bp * (4 * P.padded)
    for j in tl.static_range(P.chunks):
        at, inside = output_tile(j, rows, P, R)
        tl.store(out + at, h_tiles[j], mask=inside)


@triton.jit
def forward_streamed(
    gates, h, c, w, out, rows, bp, P: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, R: tl.constexpr
):
    """h_{t-1} is held in registers as the operand of the dots; W_hh streams by, one chunk's columns at a time.

    With BLOCKED both come in blocks of K instead: no limit on H, and no operand is kept.
    """
    r, u, n = tile_indices(P, R)
    kb = tl.arange(0, P.block)
    dtype = h.dtype.element_ty
    slot = bp * P.padded
    for j in tl.range(P.chunks):
        tl.store(h + r * P.padded + j * P.units + u, tl.full((R, P.units), 0, dtype))
        tl.store(c + r * P.padded + j * P.units + u, tl.full((R, P.units), 0, tl.float32))
    for t in range(P.steps):
        # This step reads one slot and writes another: warps that are ahead store h_t while others still load
        # h_{t-1}. The barrier: h_{t-1} and c_{t-1} were stored by other threads.
        read = t % P.slots * slot
        write = (t + 1) % P.slots * slot
        tl.debug_barrier()
        h_tiles = ()
        if P.mode != IS_BLOCKED:
            for i in tl.static_range(len(P.pieces)):
                k = P.pieces[i][0] + tl.arange(0, P.pieces[i][1])
                h_tiles = h_tiles + (tl.load(h + read + r * P.padded + k[None, :]),)
        for j in tl.range(P.chunks, num_stages=P.forward_depth):
            at = r * P.padded + j * P.units + u
            gates_at = r * (4 * P.padded) + j * P.columns + n
            a = tl.load(gates + gates_at).to(tl.float32)
            c_old = tl.load(c + read + at)
            if P.mode == IS_BLOCKED:
                for k0 in tl.range(0, P.padded, P.block, num_stages=P.forward_depth):
                    h_tile = tl.load(h + read + r * P.padded + (k0 + kb)[None, :])
                    w_tile = tl.load(w + (j * P.padded + k0 + kb)[:, None] * P.columns + n)
                    a = tl.dot(h_tile, w_tile, a, input_precision="ieee")
            else:
                for i in tl.static_range(len(P.pieces)):
                    k = P.pieces[i][0] + tl.arange(0, P.pieces[i][1])
                    w_tile = tl.load(w + (j * P.padded + k[:, None]) * P.columns + n)
                    a = tl.dot(h_tiles[i], w_tile, a, input_precision="ieee")
            gi, gf, gg, go = activate(a, R, P.units)
            c_new = gf * c_old + gi * gg
            tl.store(c + write + at, c_new)
            tl.store(h + write + at, (go * tanh(c_new)).to(dtype))
            if GATES:
                tl.store(gates + gates_at, merge(gi, gf, gg, go, R, P.units).to(dtype))
        gates += slot * 4
    tl.debug_barrier()  # h_T was stored by other threads
    last = P.steps % P.slots * slot
    for j in tl.range(P.chunks):
        at, inside = output_tile(j, rows, P, R)
        tl.store(out + at, tl.load(h + last + r * P.padded + j * P.units + u), mask=inside)


@triton.jit
def forward_split(
    gates, h, c, w, out, counter, j, rows, bp,
    P: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Chunk j of the hidden units; the other chunks' h_{t-1} come from the programs that own them.

    One meeting a step is enough for the two slots of inference too: a program stores into a slot only after it has met
    the others, and they had read that slot before. Between arriving and waiting comes what nobody waits for.
    """
    HALF: tl.constexpr = P.block // 2  # with whole blocks the float32 kernel spills
    r, u, n = tile_indices(P, R)
    kb = tl.arange(0, HALF)
    dtype = h.dtype.element_ty
    slot = bp * P.padded
    at = r * P.padded + j * P.units + u
    gates_at = r * (4 * P.padded) + j * P.columns + n
    w += j * (P.padded * P.columns)
    w_tiles = ()
    if P.mode != IS_BLOCKED:
        for i in tl.static_range(len(P.pieces)):
            k = P.pieces[i][0] + tl.arange(0, P.pieces[i][1])
            w_tiles = w_tiles + (tl.load(w + k[:, None] * P.columns + n),)
    h_tile = tl.full((R, P.units), 0, dtype)
    c_tile = tl.full((R, P.units), 0, tl.float32)
    tl.store(h + at, h_tile)
    arrive(counter)
    if STATES:
        tl.store(c + at, c_tile)
    x = tl.load(gates + gates_at)
    for t in tl.range(P.steps, num_stages=1):
        read = t % P.slots * slot
        write = (t + 1) % P.slots * slot
        a = x.to(tl.float32)
        wait(counter, (t + 1) * P.parts)
        if P.mode == IS_BLOCKED:
            for k0 in tl.range(0, P.padded, HALF, num_stages=P.forward_depth):
                h_piece = tl.load(h + read + r * P.padded + (k0 + kb)[None, :], cache_modifier=".cg")
                w_tile = tl.load(w + (k0 + kb)[:, None] * P.columns + n)
                a = tl.dot(h_piece, w_tile, a, input_precision="ieee")
        else:
            h_tiles = ()  # all of them on their way before the first is needed
            for i in tl.static_range(len(P.pieces)):
                k = P.pieces[i][0] + tl.arange(0, P.pieces[i][1])
                h_tiles = h_tiles + (tl.load(h + read + r * P.padded + k[None, :], cache_modifier=".cg"),)
            for i in tl.static_range(len(P.pieces)):
                a = tl.dot(h_tiles[i], w_tiles[i], a, input_precision="ieee")
        gi, gf, gg, go = activate(a, R, P.units)
        c_tile = gf * c_tile + gi * gg
        h_tile = (go * tanh(c_tile)).to(dtype)
        tl.store(h + write + at, h_tile)
        arrive(counter)
        if STATES:
            tl.store(c + write + at, c_tile)
        if GATES:
            tl.store(gates + gates_at, merge(gi, gf, gg, go, R, P.units).to(dtype))
        gates += slot * 4
        x = tl.load(gates + gates_at, mask=(t + 1 < P.steps) & (r >= 0), other=0)
    at, inside = output_tile(j, rows, P, R)
    tl.store(out + at, h_tile, mask=inside)
    leave(counter, (P.steps + 1) * P.parts, P.parts)


@triton.jit
def forward_group(
    gates,
    h,
    c,
    packed,
    out,
    batch,
    P: tl.constexpr,
    STATES: tl.constexpr,
    GATES: tl.constexpr,
    R: tl.constexpr,
):
    """Runs the program if its group belongs to stage P."""
    g, row, part, bp = locate(batch, P, R)
    if (g >= 0) & (g < P.groups):
        gates += bp * P.gates_at + (g * P.steps * bp + row) * (4 * P.padded)
        h += bp * P.states_at + (g * P.slots * bp + row) * P.padded
        c += bp * P.states_at + (g * P.slots * bp + row) * P.padded
        w = packed + P.hidden_weights_at + g * (4 * P.padded * P.padded)
        out += row * P.outputs + P.column + g * P.hidden
        rows = batch - row
        if P.parts > 1:
            counter = counter_of(packed, g, row, bp, P, False, R)
            forward_split(gates, h, c, w, out, counter, part, rows, bp, P=P, STATES=STATES, GATES=GATES, R=R)
        elif P.mode == IS_RESIDENT:
            forward_resident(gates, h, c, w, out, rows, bp, P=P, STATES=STATES, GATES=GATES, R=R)
        else:
            forward_streamed(gates, h, c, w, out, rows, bp, P=P, STATES=STATES, GATES=GATES, R=R)


@triton.jit(do_not_specialize=["batch"])
def forward_kernel(
    gates, h, c, packed, out, batch,
    PLANS: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Grid: groups of all stages x batch tiles, the tiles of a group next to each other (W_hh stays in L2)."""
    for s in tl.static_range(len(PLANS)):
        forward_group(gates, h, c, packed, out, batch, P=PLANS[s], STATES=STATES, GATES=GATES, R=R)
