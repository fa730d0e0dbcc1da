"""The parallel part of the LSTM: everything that does not wait for the step before, as batched GEMMs.

The feature map is read and written where it lies: in channels_last it is [B, S, G*T], the T steps of a group
next to each other, so tiles of rows (b, t) with t fastest are copied 16 bytes at a time along the steps.
Legend and packed columns as in plan.py. The batch's padding rows repeat the last sample; their gradient is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gates import activate, merge


@triton.jit
def sample_and_step(m, count, T: tl.constexpr, ROWS: tl.constexpr):
    """The rows of tile m: sample b < count [ROWS] int64, step t [ROWS], and whether the row exists."""
    r = m * ROWS + tl.arange(0, ROWS)
    b = r // T
    return tl.minimum(b, count - 1).to(tl.int64), r % T, b < count


@triton.jit(do_not_specialize=["batch", "padded_batch"])
def project_kernel(
    x, w_ih, bias, h, w_hh, gates, batch, padded_batch,
    P: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, RECOMPUTE: tl.constexpr,
):  # fmt: skip
    """gates[g, t, b, n] = sum_s x[b, s, g*T + t] W_ih[g, s, n] + bias[g, n]: one tile of ROWS x one chunk.

    With RECOMPUTE also + sum_k h[g, t, b, k] W_hh[g, c, k, n] (slot t holds h_{t-1}), then activated: the gates
    that the recurrent forward did not save.
    """
    U: tl.constexpr = P.units
    N: tl.constexpr = 4 * U
    HP: tl.constexpr = U * P.chunks
    pid = tl.program_id(0)
    j = pid % P.chunks
    g = (pid // P.chunks % P.groups).to(tl.int64)
    b, t, live = sample_and_step(pid // (P.chunks * P.groups), padded_batch, P.steps, ROWS)
    row = (g * P.steps + t) * padded_batch + b  # of gates
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, BK)

    x += tl.minimum(b, batch - 1)[:, None] * (P.hidden * P.groups * P.steps) + (g * P.steps + t)[:, None]
    w_ih += g * (P.hidden * 4 * HP) + j * N + n
    a = tl.full((ROWS, N), 0, tl.float32) + tl.load(bias + g * (4 * HP) + j * N + n)
    for k0 in range(0, P.hidden, BK):
        s = k0 + k
        x_tile = tl.load(x + s[None, :] * (P.groups * P.steps), mask=s[None, :] < P.hidden, other=0)
        w_tile = tl.load(w_ih + s[:, None] * (4 * HP), mask=s[:, None] < P.hidden, other=0)
        a = tl.dot(x_tile, w_tile, a, input_precision="ieee")
    if RECOMPUTE:
        h_row = (g * P.slots + t) * padded_batch + b
        h += h_row[:, None] * HP
        w_hh += (g * P.chunks + j) * (HP * N) + n
        for k0 in range(0, HP, BK):
            h_tile = tl.load(h + (k0 + k)[None, :])
            a = tl.dot(h_tile, tl.load(w_hh + (k0 + k)[:, None] * N), a, input_precision="ieee")
        i, f, gg, o = activate(a, ROWS, U)
        a = merge(i, f, gg, o, ROWS, U)
    tl.store(gates + row[:, None] * (4 * HP) + j * N + n, a.to(gates.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["batch", "padded_batch"])
def input_gradient_kernel(
    dgates, w_ih, dx, batch, padded_batch,
    P: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx[b, s, g*T + t] = sum_n dgates[g, t, b, n] W_ih[g, s, n]: one tile of ROWS x BN positions."""
    HP: tl.constexpr = P.units * P.chunks
    BLOCKS: tl.constexpr = (P.hidden + BN - 1) // BN
    pid = tl.program_id(0)
    g = (pid // BLOCKS % P.groups).to(tl.int64)
    b, t, live = sample_and_step(pid // (BLOCKS * P.groups), batch, P.steps, ROWS)
    row = (g * P.steps + t) * padded_batch + b
    s = pid % BLOCKS * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)

    dgates += row[:, None] * (4 * HP) + k[None, :]
    w_ih += (g * P.hidden + tl.minimum(s, P.hidden - 1))[:, None] * (4 * HP) + k[None, :]
    acc = tl.full((ROWS, BN), 0, tl.float32)
    for k0 in range(0, 4 * HP, BK):
        acc = tl.dot(tl.load(dgates + k0), tl.trans(tl.load(w_ih + k0)), acc, input_precision="ieee")
    dx += b[:, None] * (P.hidden * P.groups * P.steps) + (g * P.steps + t)[:, None]
    out = dx + s[None, :] * (P.groups * P.steps)
    tl.store(out, acc.to(dx.dtype.element_ty), mask=live[:, None] & (s < P.hidden)[None, :])


@triton.jit(do_not_specialize=["batch", "padded_batch", "tiles"])
def weight_gradient_kernel(
    dgates, source, partial, batch, padded_batch, tiles,
    P: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """partial[p, g, n, k] = sum over part p's rows (b, t) of dgates[g, t, b, n] * source[b, t, k].

    The source is the feature map (k a position), or with HIDDEN h (slot t holds h_{t-1}). Each part takes `tiles`
    tiles of rows; the parts are added afterwards in a fixed order, so the result does not vary from run to run.
    """
    U: tl.constexpr = P.units
    N: tl.constexpr = 4 * U
    HP: tl.constexpr = U * P.chunks
    BLOCKS: tl.constexpr = (P.hidden + BK - 1) // BK
    pid = tl.program_id(0)
    j = pid // BLOCKS % P.chunks
    g = (pid // (BLOCKS * P.chunks) % P.groups).to(tl.int64)
    part = pid // (BLOCKS * P.chunks * P.groups)
    n = j * N + tl.arange(0, N)
    k = pid % BLOCKS * BK + tl.arange(0, BK)
    k_in = tl.minimum(k, P.hidden - 1)[None, :]

    acc = tl.full((N, BK), 0, tl.float32)
    for m in range(part * tiles, part * tiles + tiles):
        b, t, live = sample_and_step(m, padded_batch, P.steps, ROWS)
        row = (g * P.steps + t) * padded_batch + b
        d = tl.load(dgates + row[:, None] * (4 * HP) + n[None, :], mask=live[:, None], other=0)
        if HIDDEN:
            at = ((g * P.slots + t) * padded_batch + b)[:, None] * HP
            y = tl.load(source + at + k[None, :], mask=k[None, :] < HP, other=0)
        else:
            at = (
                tl.minimum(b, batch - 1)[:, None] * (P.hidden * P.groups * P.steps)
                + (g * P.steps + t)[:, None]
            )
            y = tl.load(source + at + k_in * (P.groups * P.steps))
        acc = tl.dot(tl.trans(d), y, acc, input_precision="ieee")
    out = partial + ((part * P.groups + g) * (4 * HP) + n)[:, None] * P.hidden + k[None, :]
    tl.store(out, acc, mask=(k < P.hidden)[None, :])
