"""The weights on their way into the other kernels' layout, and their gradients on the way back.

Parameters are nn.LSTM's, stacked: W_ih [G, 4H, S] and W_hh [G, 4H, H], gates in the order i, f, g, o. Legend and
packed columns as in plan.py. Kernels of all stages at once take a tuple with each stage's tensor; their programs
are the first stage's, then the second's, and so on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .plan import COUNTER_ELEMENTS

COUNTERS = tl.constexpr(COUNTER_ELEMENTS)


@triton.jit
def gate_rows(j, P: tl.constexpr):
    """The rows of nn.LSTM's matrices [N] that are the packed columns of chunk j, and whether they exist."""
    n = tl.arange(0, P.columns)
    unit = j * P.units + n % P.units
    return n // P.units * P.hidden + unit, unit < P.hidden


@triton.jit
def pack_tile(pid, ih, hh, packed, P: tl.constexpr, BK: tl.constexpr):
    """W_hh -> [G, C, Hp, N] with zeros beyond H, W_ih -> [G, S, 4*Hp]: one tile of BK inputs x one chunk."""
    BLOCKS: tl.constexpr = (P.padded + BK - 1) // BK
    j = pid // BLOCKS % P.chunks
    g = (pid // (BLOCKS * P.chunks) % P.groups).to(tl.int64)
    k = pid % BLOCKS * BK + tl.arange(0, BK)
    n = tl.arange(0, P.columns)[None, :]
    row, live = gate_rows(j, P)
    source = g * (4 * P.hidden * P.hidden) + row[None, :] * P.hidden + k[:, None]
    inside = live[None, :] & (k < P.hidden)[:, None]
    dtype = packed.dtype.element_ty
    if pid < BLOCKS * P.chunks * P.groups:
        w = tl.load(hh + source, mask=inside, other=0).to(dtype)
        to = P.hidden_weights_at + ((g * P.chunks + j) * P.padded + k)[:, None] * P.columns + n
        tl.store(packed + to, w, mask=(k < P.padded)[:, None])
    else:
        w = tl.load(ih + source, mask=inside, other=0).to(dtype)
        to = P.input_weights_at + (g * P.hidden + k)[:, None] * (4 * P.padded) + j * P.columns + n
        tl.store(packed + to, w, mask=(k < P.hidden)[:, None])


@triton.jit
def pack_kernel(ih, hh, packed, PLANS: tl.constexpr, BK: tl.constexpr):
    """Grid: per stage K blocks x chunks x groups x (W_hh, W_ih). Zeroes the counters behind the weights too."""
    pid = tl.program_id(0)
    if pid == 0:
        counters = packed + PLANS[0].counters_at + tl.arange(0, COUNTERS)
        tl.store(counters, tl.full((COUNTERS,), 0, packed.dtype.element_ty))
    for s in tl.static_range(len(PLANS)):
        count = (PLANS[s].padded + BK - 1) // BK * (PLANS[s].chunks * PLANS[s].groups * 2)
        if (pid >= 0) & (pid < count):
            pack_tile(pid, ih[s], hh[s], packed, P=PLANS[s], BK=BK)
        pid -= count


@triton.jit
def unpack_tile(pid, partial, d_ih, d_hh, d_bias_ih, d_bias_hh, parts, P: tl.constexpr, BK: tl.constexpr):
    """Adds partial sums part by part: one tile of BK inputs x one chunk.

    The programs of W_hh's first K block also add the biases'.
    """
    BLOCKS: tl.constexpr = (P.hidden + BK - 1) // BK
    j = pid // BLOCKS % P.chunks
    g = (pid // (BLOCKS * P.chunks) % P.groups).to(tl.int64)
    hidden = pid // (BLOCKS * P.chunks * P.groups)  # 0: W_ih, 1: W_hh
    k = pid % BLOCKS * BK + tl.arange(0, BK)[None, :]
    row, live = gate_rows(j, P)
    inside = live[:, None] & (k < P.hidden)

    column = g * (4 * P.padded) + j * P.columns + tl.arange(0, P.columns)  # within a part
    part_size = P.groups * 4 * P.padded
    partial += parts.to(tl.int64) * P.partial_at
    source = partial + hidden.to(tl.int64) * parts * (part_size * P.hidden) + column[:, None] * P.hidden + k
    total = tl.full((P.columns, BK), 0, tl.float32)
    for _ in range(parts):
        total += tl.load(source, mask=inside, other=0)
        source += part_size * P.hidden
    to = g * (4 * P.hidden * P.hidden) + row[:, None] * P.hidden + k
    if hidden == 0:
        tl.store(d_ih + to, total.to(d_ih.dtype.element_ty), mask=inside)
    else:
        tl.store(d_hh + to, total.to(d_hh.dtype.element_ty), mask=inside)
        if pid % BLOCKS == 0:
            bias = partial + 2 * parts.to(tl.int64) * (part_size * P.hidden) + column
            total_bias = tl.full((P.columns,), 0, tl.float32)
            for _ in range(parts):
                total_bias += tl.load(bias)
                bias += part_size
            to_bias = g * (4 * P.hidden) + row
            tl.store(d_bias_ih + to_bias, total_bias.to(d_bias_ih.dtype.element_ty), mask=live)
            tl.store(d_bias_hh + to_bias, total_bias.to(d_bias_hh.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["parts"])
def unpack_kernel(
    partial, d_ih, d_hh, d_bias_ih, d_bias_hh, parts, PLANS: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Gradients of the weights from the partial sums of weight_gradient_kernel.

    Grid: per stage K blocks x chunks x groups x (W_ih, W_hh).
    """
    pid = tl.program_id(0)
    for s in tl.static_range(len(PLANS)):
        count = (PLANS[s].hidden + BK - 1) // BK * (PLANS[s].chunks * PLANS[s].groups * 2)
        if (pid >= 0) & (pid < count):
            unpack_tile(pid, partial, d_ih[s], d_hh[s], d_bias_ih[s], d_bias_hh[s], parts, P=PLANS[s], BK=BK)
        pid -= count
