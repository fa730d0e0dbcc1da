# ruff: noqa: RUF005 - the Triton compiler knows tuple + tuple, not (*tuple, element)
# Tuples grow in loops that the Triton compiler unrolls, which mypy does not know.
# mypy: ignore-errors
"""The recurrent part of the backward pass in Triton: one launch, the steps in reverse, gates to gate gradients.

Programs, buffers and the rules for barriers are those of fused_forward.py. The gate gradients [G, T, Bp, 4*Hp] have
the layout of the gates; the products that need no step before (weights, biases, input) are left to gemm.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gates import merge, tanh
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
def cell_gradient(i, f, g, o, c, c_next, dh, dc):
    """Gradients of a tile's pre-activations i, f, g, o and of c_{t-1}, each [R, U] float32.

    Of the gates, c_{t-1} and c_t, and the gradients of h_t and c_t.
    """
    i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
    y = tanh(c_next)
    dc += dh * o * (1 - y * y)
    di = dc * g * i * (1 - i)
    df = dc * c * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = dh * y * o * (1 - o)
    return di, df, dg, do, dc * f


@triton.jit
def load_gates(gates, U: tl.constexpr):
    """i, f, g, o of a tile, whose gate i `gates` points at."""
    return tl.load(gates), tl.load(gates + U), tl.load(gates + 2 * U), tl.load(gates + 3 * U)


@triton.jit
def load_output_gradient(dout, j, rows, P: tl.constexpr, R: tl.constexpr):
    at, inside = output_tile(j, rows, P, R)
    return tl.load(dout + at, mask=inside, other=0).to(tl.float32)


@triton.jit
def backward_resident(gates, c, w, dout, dgates, rows, bp, P: tl.constexpr, R: tl.constexpr):
    """W_hh, dh and dc stay in registers; gates and c come in two steps ahead, the gate gradients go out."""
    r, u, n = tile_indices(P, R)
    dtype = dgates.dtype.element_ty
    w_tiles = load_resident_weights(w, P)
    dh_tiles = ()
    dc_tiles = ()
    for j in tl.static_range(P.chunks):
        dh_tiles = dh_tiles + (load_output_gradient(dout, j, rows, P, R),)
        dc_tiles = dc_tiles + (tl.full((R, P.units), 0, tl.float32),)
    for s in tl.range(P.steps, num_stages=P.backward_depth):
        t = P.steps - 1 - s
        dh_next = ()
        dc_next = ()
        for _ in tl.static_range(P.chunks):
            dh_next = dh_next + (tl.full((R, P.units), 0, tl.float32),)
        for j in tl.static_range(P.chunks):
            at = t * bp * (4 * P.padded) + r * (4 * P.padded) + j * P.columns
            c_at = c + t * bp * P.padded + r * P.padded + j * P.units + u
            gi, gf, gg, go = load_gates(gates + at + u, P.units)
            c_old, c_new = tl.load(c_at), tl.load(c_at + bp * P.padded)
            di, df, dg, do, dc = cell_gradient(gi, gf, gg, go, c_old, c_new, dh_tiles[j], dc_tiles[j])
            dc_next = dc_next + (dc,)
            d = merge(di, df, dg, do, R, P.units).to(dtype)
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
    r, u, n = tile_indices(P, R)
    kb = tl.arange(0, P.block)
    dtype = dgates.dtype.element_ty
    slot = bp * P.padded
    for j in tl.range(P.chunks):
        tl.store(dh + r * P.padded + j * U + u, load_output_gradient(dout, j, rows, P, R))
        tl.store(dc + r * P.padded + j * U + u, tl.full((R, U), 0, tl.float32))
    for s in range(P.steps):
        t = P.steps - 1 - s
        tl.debug_barrier()  # dh was stored by other threads
        d_t = dgates + t * slot * 4 + r * (4 * P.padded)
        for j in tl.range(P.chunks, num_stages=1):
            at = r * P.padded + j * U + u
            c_at = c + t * slot + at
            gates_at = gates + t * slot * 4 + r * (4 * P.padded) + j * P.columns + u
            gi, gf, gg, go = load_gates(gates_at, U)
            c_old, c_new = tl.load(c_at), tl.load(c_at + slot)
            di, df, dg, do, dc_new = cell_gradient(
                gi, gf, gg, go, c_old, c_new, tl.load(dh + at), tl.load(dc + at)
            )
            tl.store(dc + at, dc_new)
            tl.store(d_t + j * P.columns + u, di.to(dtype))
            tl.store(d_t + j * P.columns + U + u, df.to(dtype))
            tl.store(d_t + j * P.columns + 2 * U + u, dg.to(dtype))
            tl.store(d_t + j * P.columns + 3 * U + u, do.to(dtype))
        tl.debug_barrier()  # the gate gradients were stored by other threads; dh has been read
        if t > 0:
            if P.mode == IS_BLOCKED:
                for k0 in tl.range(0, P.padded, P.block, num_stages=1):
                    acc = tl.full((R, P.block), 0, tl.float32)
                    for j in tl.range(P.chunks, num_stages=P.backward_depth):
                        d = tl.load(d_t + j * P.columns + n)
                        w_tile = tl.load(w + (j * P.padded + k0 + kb)[:, None] * P.columns + n)
                        acc = tl.dot(d, tl.trans(w_tile), acc, input_precision="ieee")
                    tl.store(dh + r * P.padded + (k0 + kb)[None, :], acc)
            else:
                sums = ()
                for i in tl.static_range(len(P.wide)):
                    sums = sums + (tl.full((R, P.wide[i][1]), 0, tl.float32),)
                for j in tl.range(P.chunks, num_stages=P.backward_depth):
                    d = tl.load(d_t + j * P.columns + n)
                    added = ()
                    for i in tl.static_range(len(P.wide)):
                        k = P.wide[i][0] + tl.arange(0, P.wide[i][1])
                        w_tile = tl.load(w + (j * P.padded + k[:, None]) * P.columns + n)
                        added = added + (tl.dot(d, tl.trans(w_tile), sums[i], input_precision="ieee"),)
                    sums = added
                for i in tl.static_range(len(P.wide)):
                    k = P.wide[i][0] + tl.arange(0, P.wide[i][1])
                    tl.store(dh + r * P.padded + k[None, :], sums[i])


@triton.jit
def backward_split(gates, c, w, dout, dgates, sums, counter, j, rows, bp, P: tl.constexpr, R: tl.constexpr):
    """Chunk j of the gates: their gradients, and these times chunk j of W_hh, one of C sums that make dh.

    The programs exchange the sums [C, R, Hp] through two buffers used in turn, which makes one meeting a step enough,
    and each adds the C of its own units, always in the same order.
    """
    r, u, n = tile_indices(P, R)
    kb = tl.arange(0, P.block)
    dtype = dgates.dtype.element_ty
    slot = bp * P.padded
    at = r * P.padded + j * P.units + u
    gates_at = r * (4 * P.padded) + j * P.columns
    w += j * (P.padded * P.columns)
    w_tiles = ()
    if P.mode != IS_BLOCKED:
        for i in tl.static_range(len(P.wide)):
            k = P.wide[i][0] + tl.arange(0, P.wide[i][1])
            w_tiles = w_tiles + (tl.load(w + k[:, None] * P.columns + n),)
    c += (P.steps - 1) * slot
    gates += (P.steps - 1) * slot * 4
    dgates += (P.steps - 1) * slot * 4
    gi, gf, gg, go = load_gates(gates + gates_at + u, P.units)
    c_old, c_new = tl.load(c + at), tl.load(c + slot + at)
    dh = load_output_gradient(dout, j, rows, P, R)
    dc = tl.full((R, P.units), 0, tl.float32)
    for s in tl.range(P.steps - 1, num_stages=1):
        di, df, dg, do, dc = cell_gradient(gi, gf, gg, go, c_old, c_new, dh, dc)
        d = merge(di, df, dg, do, R, P.units).to(dtype)
        half = sums + s % 2 * (P.groups * P.parts) * slot
        if P.mode == IS_BLOCKED:
            for k0 in tl.range(0, P.padded, P.block, num_stages=P.backward_depth):
                acc = tl.full((R, P.block), 0, tl.float32)
                w_tile = tl.load(w + (k0 + kb)[:, None] * P.columns + n)
                acc = tl.dot(d, tl.trans(w_tile), acc, input_precision="ieee")
                tl.store(half + (j * R + r) * P.padded + (k0 + kb)[None, :], acc)
        else:
            for i in tl.static_range(len(P.wide)):
                k = P.wide[i][0] + tl.arange(0, P.wide[i][1])
                acc = tl.full((R, P.wide[i][1]), 0, tl.float32)
                acc = tl.dot(d, tl.trans(w_tiles[i]), acc, input_precision="ieee")
                tl.store(half + (j * R + r) * P.padded + k[None, :], acc)
        arrive(counter)
        tl.store(dgates + gates_at + n, d)
        dgates -= slot * 4
        gates -= slot * 4
        c -= slot
        gi, gf, gg, go = load_gates(gates + gates_at + u, P.units)
        c_new = c_old
        c_old = tl.load(c + at)
        wait(counter, (s + 1) * P.parts)
        dh = tl.full((R, P.units), 0, tl.float32)
        for i in tl.static_range(P.chunks):
            dh += tl.load(half + (i * R + r) * P.padded + j * P.units + u, cache_modifier=".cg")
    di, df, dg, do, dc = cell_gradient(gi, gf, gg, go, c_old, c_new, dh, dc)
    tl.store(dgates + gates_at + n, merge(di, df, dg, do, R, P.units).to(dtype))
    leave(counter, (P.steps - 1) * P.parts, P.parts)


@triton.jit
def backward_group(gates, c, packed, dout, dgates, carry, batch, P: tl.constexpr, R: tl.constexpr):
    """Runs the program if its group belongs to stage P."""
    g, row, part, bp = locate(batch, P, R)
    if (g >= 0) & (g < P.groups):
        gates_at = bp * P.gates_at + (g * P.steps * bp + row) * (4 * P.padded)
        gates += gates_at
        dgates += gates_at
        c += bp * P.states_at + (g * P.slots * bp + row) * P.padded
        w = packed + P.hidden_weights_at + g * (4 * P.padded * P.padded)
        dout += row * P.outputs + P.column + g * P.hidden
        carry += bp * P.carry_at + (g * bp + row) * (P.padded * P.parts)
        rows = batch - row
        if P.parts > 1:
            counter = counter_of(packed, g, row, bp, P, True, R)
            backward_split(gates, c, w, dout, dgates, carry, counter, part, rows, bp, P=P, R=R)
        elif P.mode == IS_RESIDENT:
            backward_resident(gates, c, w, dout, dgates, rows, bp, P=P, R=R)
        else:
            dc = carry + P.groups * bp * P.padded
            backward_streamed(gates, c, w, dout, dgates, carry, dc, rows, bp, P=P, R=R)


@triton.jit(do_not_specialize=["batch"])
def backward_kernel(gates, c, packed, dout, dgates, carry, batch, PLANS: tl.constexpr, R: tl.constexpr):
    """The grid of forward_kernel; the steps in reverse."""
    for s in tl.static_range(len(PLANS)):
        backward_group(gates, c, packed, dout, dgates, carry, batch, P=PLANS[s], R=R)
