# ruff: noqa: RUF005 - the Triton compiler knows tuple + tuple, not (*tuple, element)
# Tuples grow in loops that the Triton compiler unrolls, which mypy does not know either.
# mypy: ignore-errors
"""The recurrent part of the LSTM in Triton: one launch for all groups of all stages, forward and backward.

A program owns one group and BATCH_TILE rows of the batch, for all steps; programs never read what another wrote.
What lies where, per program (legend in plan.py):

    registers       accumulators, h_{t-1} as the operand of the dots; RESIDENT also W_hh, h, c and their gradients
    shared memory   tiles in flight from global memory: of W_hh, the gates, c
    global memory   gates [G, T, Bp, 4*Hp]   pre-activations in, activated gates out, in place
                    h, c  [G, slots, Bp, Hp] slot t holds h_{t-1}, c_{t-1}; slot 0 zeros; inference has two slots
                    W_hh  [G, C, Hp, N]      packed, so that every copy of it is 16 bytes wide

The batch is padded to whole tiles in all of these, so nothing but the output and its gradient needs a mask. The
padding rows repeat the last sample; with a zero gradient of the output their gradients are zero.

Triton orders nothing between threads in global memory: wherever a thread reads there what another thread of the
program wrote, a tl.debug_barrier() stands between. It stands in the loop over the steps, never in a pipelined
loop, where it would stop the pipelining; and a pipelined loop never loads what it has stored itself, because its
loads run ahead of its stores. Some of these barriers are doubled by one that the compiler puts at the end of a
pipelined loop for its own use of shared memory; nothing promises that one. All copies are cp.async, which a barrier
orders; bulk copies (TMA) of what the program has just stored would need a proxy fence besides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gates import activate, merge, tanh
from .plan import BLOCKED, RESIDENT

_RESIDENT = tl.constexpr(RESIDENT)
_BLOCKED = tl.constexpr(BLOCKED)


@triton.jit
def forward_resident(
    gates, h, c, w, out, rows, bp, P: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, R: tl.constexpr
):
    """W_hh, h and c stay in registers; h and c are stored for backward alone (STATES), as are the gates (GATES).

    The pre-activations of the next two steps are loaded ahead.
    """
    U: tl.constexpr = P.units
    N: tl.constexpr = 4 * U
    HP: tl.constexpr = U * P.chunks
    r = tl.arange(0, R)[:, None]
    u = tl.arange(0, U)[None, :]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, U)[:, None]
    dtype = h.dtype.element_ty
    w_tiles = ()  # [chunk][K piece], K in pieces of U, so that a chunk of h is a piece of K
    h_tiles = ()
    c_tiles = ()
    for j in tl.static_range(P.chunks):
        h_tiles = h_tiles + (tl.full((R, U), 0, dtype),)
        c_tiles = c_tiles + (tl.full((R, U), 0, tl.float32),)
        for i in tl.static_range(P.chunks):
            w_tiles = w_tiles + (tl.load(w + (j * HP + i * U + k) * N + n),)
        if STATES:
            tl.store(h + r * HP + j * U + u, h_tiles[j])
            tl.store(c + r * HP + j * U + u, c_tiles[j])
    for _ in tl.range(P.steps, num_stages=P.forward_stages):
        h += bp * HP
        c += bp * HP
        h_next = ()
        c_next = ()
        for j in tl.static_range(P.chunks):
            at = r * (4 * HP) + j * N + n
            a = tl.load(gates + at).to(tl.float32)
            for i in tl.static_range(P.chunks):
                a = tl.dot(h_tiles[i], w_tiles[j * P.chunks + i], a, input_precision="ieee")
            gi, gf, gg, go = activate(a, R, U)
            c_j = gf * c_tiles[j] + gi * gg
            h_j = (go * tanh(c_j)).to(dtype)
            h_next = h_next + (h_j,)
            c_next = c_next + (c_j,)
            if STATES:
                tl.store(h + r * HP + j * U + u, h_j)
                tl.store(c + r * HP + j * U + u, c_j)
            if GATES:
                tl.store(gates + at, merge(gi, gf, gg, go, R, U).to(dtype))
        h_tiles = h_next
        c_tiles = c_next
        gates += bp * (4 * HP)
    for j in tl.static_range(P.chunks):
        store_output(out, h_tiles[j], j, rows, P, R)


@triton.jit
def store_output(out, h_tile, j, rows, P: tl.constexpr, R: tl.constexpr):
    r = tl.arange(0, R)[:, None]
    unit = j * P.units + tl.arange(0, P.units)[None, :]
    tl.store(out + r * P.outputs + unit, h_tile, mask=(r < rows) & (unit < P.hidden))


@triton.jit
def forward_streamed(
    gates, h, c, w, out, rows, bp, P: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, R: tl.constexpr
):
    """h_{t-1} is held in registers as the operand of the dots, W_hh streams by, one chunk's columns at a time.

    With BLOCKED both come block by block of K instead: no limit on H, no operand kept.
    """
    U: tl.constexpr = P.units
    N: tl.constexpr = 4 * U
    HP: tl.constexpr = U * P.chunks
    r = tl.arange(0, R)[:, None]
    u = tl.arange(0, U)[None, :]
    n = tl.arange(0, N)[None, :]
    kb = tl.arange(0, P.block)
    dtype = h.dtype.element_ty
    slot = bp * HP
    for j in tl.range(P.chunks):
        tl.store(h + r * HP + j * U + u, tl.full((R, U), 0, dtype))
        tl.store(c + r * HP + j * U + u, tl.full((R, U), 0, tl.float32))
    for t in range(P.steps):
        # Slots differ between what this step reads and writes: warps that are ahead store h_t while others
        # still load h_{t-1}. The barrier: h_{t-1} and c_{t-1} were stored by other threads.
        read = t % P.slots * slot
        write = (t + 1) % P.slots * slot
        tl.debug_barrier()
        h_tiles = ()
        if P.mode != _BLOCKED:
            for i in tl.static_range(len(P.pieces)):
                k = P.pieces[i][0] + tl.arange(0, P.pieces[i][1])
                h_tiles = h_tiles + (tl.load(h + read + r * HP + k[None, :]),)
        for j in tl.range(P.chunks, num_stages=P.forward_stages):
            at = r * HP + j * U + u
            gates_at = r * (4 * HP) + j * N + n
            a = tl.load(gates + gates_at).to(tl.float32)
            c_old = tl.load(c + read + at)
            if P.mode == _BLOCKED:
                for k0 in tl.range(0, HP, P.block, num_stages=P.forward_stages):
                    h_tile = tl.load(h + read + r * HP + (k0 + kb)[None, :])
                    w_tile = tl.load(w + (j * HP + k0 + kb)[:, None] * N + n)
                    a = tl.dot(h_tile, w_tile, a, input_precision="ieee")
            else:
                for i in tl.static_range(len(P.pieces)):
                    k = P.pieces[i][0] + tl.arange(0, P.pieces[i][1])
                    w_tile = tl.load(w + (j * HP + k[:, None]) * N + n)
                    a = tl.dot(h_tiles[i], w_tile, a, input_precision="ieee")
            gi, gf, gg, go = activate(a, R, U)
            c_new = gf * c_old + gi * gg
            tl.store(c + write + at, c_new)
            tl.store(h + write + at, (go * tanh(c_new)).to(dtype))
            if GATES:
                tl.store(gates + gates_at, merge(gi, gf, gg, go, R, U).to(dtype))
        gates += slot * 4
    tl.debug_barrier()  # h_T was stored by other threads
    last = P.steps % P.slots * slot
    for j in tl.range(P.chunks):
        store_output(out, tl.load(h + last + r * HP + j * U + u), j, rows, P, R)


@triton.jit
def forward_group(
    gates, h, c, w, out, batch, P: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, R: tl.constexpr
):
    """Runs the program if its group belongs to stage P."""
    HP: tl.constexpr = P.units * P.chunks
    tiles = (batch + R - 1) // R
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    g = (tl.program_id(0) // tiles).to(tl.int64) - P.first_group
    if (g >= 0) & (g < P.groups):
        bp = tiles.to(tl.int64) * R
        gates += bp * P.gates_at + (g * P.steps * bp + tile * R) * (4 * HP)
        states = bp * P.states_at + (g * P.slots * bp + tile * R) * HP
        w += P.weights_at + g * (4 * HP * HP)
        out += tile * R * P.outputs + P.column + g * P.hidden
        rows = batch - tile * R
        if P.mode == _RESIDENT:
            forward_resident(gates, h + states, c + states, w, out, rows, bp, P, STATES, GATES, R)
        else:
            forward_streamed(gates, h + states, c + states, w, out, rows, bp, P, STATES, GATES, R)


@triton.jit(do_not_specialize=["batch"])
def forward_kernel(
    gates, h, c, w, out, batch, PLANS: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, R:
    tl.constexpr,
):  # fmt: skip
    """Grid: groups of all stages x batch tiles, the tiles of a group next to each other (W_hh stays in L2)."""
    for s in tl.static_range(len(PLANS)):
        forward_group(gates, h, c, w, out, batch, PLANS[s], STATES, GATES, R)


@triton.jit
def cell_gradient(gates, c, c_next, dh, dc, U: tl.constexpr):
    """Gradients of a tile's pre-activations i, f, g, o and of c_{t-1}, each [R, U] float32.

    gates points at the tile's gate i; c and c_next at c_{t-1} and c_t; dh and dc are those of h_t and c_t.
    """
    i = tl.load(gates).to(tl.float32)
    f = tl.load(gates + U).to(tl.float32)
    g = tl.load(gates + 2 * U).to(tl.float32)
    o = tl.load(gates + 3 * U).to(tl.float32)
    y = tanh(tl.load(c_next))
    dc += dh * o * (1 - y * y)
    di = dc * g * i * (1 - i)
    df = dc * tl.load(c) * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * y * o * (1 - o)
    return di, df, dg, do, dc * f


@triton.jit
def load_output_gradient(dout, j, rows, P: tl.constexpr, R: tl.constexpr):
    r = tl.arange(0, R)[:, None]
    unit = j * P.units + tl.arange(0, P.units)[None, :]
    d = tl.load(dout + r * P.outputs + unit, mask=(r < rows) & (unit < P.hidden), other=0)
    return d.to(tl.float32)


@triton.jit
def backward_resident(gates, c, w, dout, dgates, rows, bp, P: tl.constexpr, R: tl.constexpr):
    """W_hh, dh and dc stay in registers; gates and c come in two steps ahead, the gate gradients go out."""
    U: tl.constexpr = P.units
    N: tl.constexpr = 4 * U
    HP: tl.constexpr = U * P.chunks
    r = tl.arange(0, R)[:, None]
    u = tl.arange(0, U)[None, :]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, U)[:, None]
    dtype = dgates.dtype.element_ty
    w_tiles = ()
    dh_tiles = ()
    dc_tiles = ()
    for j in tl.static_range(P.chunks):
        dh_tiles = dh_tiles + (load_output_gradient(dout, j, rows, P, R),)
        dc_tiles = dc_tiles + (tl.full((R, U), 0, tl.float32),)
        for i in tl.static_range(P.chunks):
            w_tiles = w_tiles + (tl.load(w + (j * HP + i * U + k) * N + n),)
    for s in tl.range(P.steps, num_stages=P.backward_stages):
        t = P.steps - 1 - s
        dh_next = ()
        dc_next = ()
        for _ in tl.static_range(P.chunks):
            dh_next = dh_next + (tl.full((R, U), 0, tl.float32),)
        for j in tl.static_range(P.chunks):
            at = t * bp * (4 * HP) + r * (4 * HP) + j * N
            c_at = c + t * bp * HP + r * HP + j * U + u
            di, df, dg, do, dc = cell_gradient(
                gates + at + u, c_at, c_at + bp * HP, dh_tiles[j], dc_tiles[j], U
            )
            dc_next = dc_next + (dc,)
            d = merge(di, df, dg, do, R, U).to(dtype)
            tl.store(dgates + at + n, d)
            dh_sum = ()
            for i in tl.static_range(P.chunks):
                w_t = tl.trans(w_tiles[j * P.chunks + i])
                dh_sum = dh_sum + (tl.dot(d, w_t, dh_next[i], input_precision="ieee"),)
            dh_next = dh_sum
        dh_tiles = dh_next
        dc_tiles = dc_next


@triton.jit
def backward_streamed(gates, c, w, dout, dgates, dh, dc, rows, bp, P: tl.constexpr, R: tl.constexpr):
    """Two loops a step: elementwise to the gate gradients, then their product with W_hh, streamed by chunk.

    In one loop every warp would repeat the elementwise part for the whole tile, the dots' left operand. dh and dc
    [Bp, Hp] float32 carry the state's gradient between the loops through global memory (L1 and L2 in effect).
    """
    U: tl.constexpr = P.units
    N: tl.constexpr = 4 * U
    HP: tl.constexpr = U * P.chunks
    r = tl.arange(0, R)[:, None]
    u = tl.arange(0, U)[None, :]
    n = tl.arange(0, N)[None, :]
    kb = tl.arange(0, P.block)
    dtype = dgates.dtype.element_ty
    slot = bp * HP
    for j in tl.range(P.chunks):
        tl.store(dh + r * HP + j * U + u, load_output_gradient(dout, j, rows, P, R))
        tl.store(dc + r * HP + j * U + u, tl.full((R, U), 0, tl.float32))
    for s in range(P.steps):
        t = P.steps - 1 - s
        tl.debug_barrier()  # dh was stored by other threads
        d_t = dgates + t * slot * 4 + r * (4 * HP)
        for j in tl.range(P.chunks, num_stages=1):
            at = r * HP + j * U + u
            c_at = c + t * slot + at
            gates_at = gates + t * slot * 4 + r * (4 * HP) + j * N + u
            di, df, dg, do, dc_new = cell_gradient(
                gates_at, c_at, c_at + slot, tl.load(dh + at), tl.load(dc + at), U
            )
            tl.store(dc + at, dc_new)
            tl.store(d_t + j * N + u, di.to(dtype))
            tl.store(d_t + j * N + U + u, df.to(dtype))
            tl.store(d_t + j * N + 2 * U + u, dg.to(dtype))
            tl.store(d_t + j * N + 3 * U + u, do.to(dtype))
        tl.debug_barrier()  # the gate gradients were stored by other threads; dh has been read
        if t > 0:
            if P.mode == _BLOCKED:
                for k0 in tl.range(0, HP, P.block, num_stages=1):
                    acc = tl.full((R, P.block), 0, tl.float32)
                    for j in tl.range(P.chunks, num_stages=P.backward_stages):
                        w_tile = tl.load(w + (j * HP + k0 + kb)[:, None] * N + n)
                        acc = tl.dot(tl.load(d_t + j * N + n), tl.trans(w_tile), acc, input_precision="ieee")
                    tl.store(dh + r * HP + (k0 + kb)[None, :], acc)
            else:
                sums = ()
                for i in tl.static_range(len(P.wide)):
                    sums = sums + (tl.full((R, P.wide[i][1]), 0, tl.float32),)
                for j in tl.range(P.chunks, num_stages=P.backward_stages):
                    d = tl.load(d_t + j * N + n)
                    added = ()
                    for i in tl.static_range(len(P.wide)):
                        k = P.wide[i][0] + tl.arange(0, P.wide[i][1])
                        w_tile = tl.load(w + (j * HP + k[:, None]) * N + n)
                        added = added + (tl.dot(d, tl.trans(w_tile), sums[i], input_precision="ieee"),)
                    sums = added
                for i in tl.static_range(len(P.wide)):
                    k = P.wide[i][0] + tl.arange(0, P.wide[i][1])
                    tl.store(dh + r * HP + k[None, :], sums[i])


@triton.jit
def backward_group(gates, c, w, dout, dgates, dh, dc, batch, P: tl.constexpr, R: tl.constexpr):
    """Runs the program if its group belongs to stage P."""
    HP: tl.constexpr = P.units * P.chunks
    tiles = (batch + R - 1) // R
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    g = (tl.program_id(0) // tiles).to(tl.int64) - P.first_group
    if (g >= 0) & (g < P.groups):
        bp = tiles.to(tl.int64) * R
        gates_at = bp * P.gates_at + (g * P.steps * bp + tile * R) * (4 * HP)
        c += bp * P.states_at + (g * P.slots * bp + tile * R) * HP
        w += P.weights_at + g * (4 * HP * HP)
        dout += tile * R * P.outputs + P.column + g * P.hidden
        rows = batch - tile * R
        if P.mode == _RESIDENT:
            backward_resident(gates + gates_at, c, w, dout, dgates + gates_at, rows, bp, P, R)
        else:
            at = bp * P.carry_at + (g * bp + tile * R) * HP
            backward_streamed(
                gates + gates_at, c, w, dout, dgates + gates_at, dh + at, dc + at, rows, bp, P, R
            )


@triton.jit(do_not_specialize=["batch"])
def backward_kernel(gates, c, w, dout, dgates, dh, dc, batch, PLANS: tl.constexpr, R: tl.constexpr):
    """The grid of forward_kernel; the steps in reverse."""
    for s in tl.static_range(len(PLANS)):
        backward_group(gates, c, w, dout, dgates, dh, dc, batch, PLANS[s], R)
