"""The parallel part of the LSTM: everything that does not wait for the step before, as batched GEMMs.

The feature map is read and written where it lies: in channels_last it is [B, S, G*T], the T steps of a group
next to each other, so tiles of rows (b, t) with t fastest are copied 16 bytes at a time along the steps.
Legend and packed columns as in plan.py. The batch's padding rows repeat the last sample; their gradient is zero.

Each kernel serves all stages of a call: it takes a tuple with each stage's tensor where there is one for each, and
its programs are the first stage's, then the second's, and so on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gates import activate, merge
from .packing import gate_rows


@triton.jit
def sample_and_step(m, count, T: tl.constexpr, ROWS: tl.constexpr):
    """The rows of tile m: sample b < count [ROWS] int64, step t [ROWS], and whether the row exists."""
    r = m * ROWS + tl.arange(0, ROWS)
    b = r // T
    return tl.minimum(b, count - 1).to(tl.int64), r % T, b < count


@triton.jit
def project_tile(
    pid, x, packed, bias_ih, bias_hh, h, gates, batch, padded_batch,
    P: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, RECOMPUTE: tl.constexpr,
):  # fmt: skip
    """gates[g, t, b, n] = sum_s x[b, s, g*T + t] W_ih[g, s, n] + bias[g, n]: one tile of ROWS x one chunk.

    With RECOMPUTE also + sum_k h[g, t, b, k] W_hh[g, c, k, n] (slot t holds h_{t-1}), then activated: the gates
    that the recurrent forward did not save.
    """
    BK: tl.constexpr = P.padded if P.padded < MOST else MOST
    j = pid % P.chunks
    g = (pid // P.chunks % P.groups).to(tl.int64)
    b, t, live = sample_and_step(pid // (P.chunks * P.groups), padded_batch, P.steps, ROWS)
    bp = padded_batch.to(tl.int64)
    n = tl.arange(0, P.columns)[None, :]
    k = tl.arange(0, BK)

    x += tl.minimum(b, batch - 1)[:, None] * (P.hidden * P.groups * P.steps) + (g * P.steps + t)[:, None]
    w_ih = packed + P.input_weights_at + g * (P.hidden * 4 * P.padded) + j * P.columns + n
    bias_row, real = gate_rows(j, P)
    bias_row += g * (4 * P.hidden)
    bias = tl.load(bias_ih + bias_row, mask=real, other=0).to(tl.float32)
    bias += tl.load(bias_hh + bias_row, mask=real, other=0).to(tl.float32)
    a = tl.full((ROWS, P.columns), 0, tl.float32) + bias[None, :]
    for k0 in range(0, P.hidden, BK):
        s = k0 + k
        x_tile = tl.load(x + s[None, :] * (P.groups * P.steps), mask=s[None, :] < P.hidden, other=0)
        w_tile = tl.load(w_ih + s[:, None] * (4 * P.padded), mask=s[:, None] < P.hidden, other=0)
        a = tl.dot(x_tile, w_tile, a, input_precision="ieee")
    if RECOMPUTE:
        h += bp * P.states_at + ((g * P.slots + t) * bp + b)[:, None] * P.padded
        w_hh = packed + P.hidden_weights_at + (g * P.chunks + j) * (P.padded * P.columns) + n
        for k0 in range(0, P.padded, BK):
            h_tile = tl.load(h + (k0 + k)[None, :])
            a = tl.dot(h_tile, tl.load(w_hh + (k0 + k)[:, None] * P.columns), a, input_precision="ieee")
        i, f, gg, o = activate(a, ROWS, P.units)
        a = merge(i, f, gg, o, ROWS, P.units)
    gates += bp * P.gates_at + ((g * P.steps + t) * bp + b)[:, None] * (4 * P.padded)
    tl.store(gates + j * P.columns + n, a.to(gates.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["batch", "padded_batch"])
def project_kernel(
    x, packed, bias_ih, bias_hh, h, gates, batch, padded_batch,
    PLANS: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, RECOMPUTE: tl.constexpr,
):  # fmt: skip
    """Grid: per stage chunks x groups x tiles of ROWS rows; K in blocks of at most MOST."""
    pid = tl.program_id(0)
    for s in tl.static_range(len(PLANS)):
        count = (padded_batch * PLANS[s].steps + ROWS - 1) // ROWS * (PLANS[s].chunks * PLANS[s].groups)
        if (pid >= 0) & (pid < count):
            project_tile(
                pid, x[s], packed, bias_ih[s], bias_hh[s], h, gates, batch, padded_batch,
                P=PLANS[s], ROWS=ROWS, MOST=MOST, RECOMPUTE=RECOMPUTE,
            )  # fmt: skip
        pid -= count


@triton.jit
def input_gradient_tile(
    pid, dgates, packed, dx, batch, padded_batch, P: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    """dx[b, s, g*T + t] = sum_n dgates[g, t, b, n] W_ih[g, s, n]: one tile of ROWS x BN positions."""
    BN: tl.constexpr = P.positions
    BK: tl.constexpr = P.padded if P.padded < MOST else MOST
    BLOCKS: tl.constexpr = (P.hidden + BN - 1) // BN
    g = (pid // BLOCKS % P.groups).to(tl.int64)
    b, t, live = sample_and_step(pid // (BLOCKS * P.groups), batch, P.steps, ROWS)
    bp = padded_batch.to(tl.int64)
    s = pid % BLOCKS * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)

    dgates += bp * P.gates_at + ((g * P.steps + t) * bp + b)[:, None] * (4 * P.padded) + k[None, :]
    w_ih = packed + P.input_weights_at
    w_ih += (g * P.hidden + tl.minimum(s, P.hidden - 1))[:, None] * (4 * P.padded) + k[None, :]
    acc = tl.full((ROWS, BN), 0, tl.float32)
    for k0 in range(0, 4 * P.padded, BK):
        acc = tl.dot(tl.load(dgates + k0), tl.trans(tl.load(w_ih + k0)), acc, input_precision="ieee")
    dx += b[:, None] * (P.hidden * P.groups * P.steps) + (g * P.steps + t)[:, None]
    out = dx + s[None, :] * (P.groups * P.steps)
    tl.store(out, acc.to(dx.dtype.element_ty), mask=live[:, None] & (s < P.hidden)[None, :])


@triton.jit(do_not_specialize=["batch", "padded_batch"])
def input_gradient_kernel(
    dgates, packed, dx, batch, padded_batch, PLANS: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    """Grid: per stage blocks of positions x groups x tiles of ROWS rows; K in blocks of at most MOST."""
    pid = tl.program_id(0)
    for s in tl.static_range(len(PLANS)):
        blocks = (PLANS[s].hidden + PLANS[s].positions - 1) // PLANS[s].positions
        count = (batch * PLANS[s].steps + ROWS - 1) // ROWS * (blocks * PLANS[s].groups)
        if (pid >= 0) & (pid < count):
            input_gradient_tile(
                pid, dgates, packed, dx[s], batch, padded_batch, P=PLANS[s], ROWS=ROWS, MOST=MOST
            )
        pid -= count


@triton.jit
def weight_gradient_tile(
    pid, dgates, source, partial, batch, padded_batch, parts,
    P: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, HIDDEN: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """partial[p, g, n, k] = sum over part p's rows (b, t) of dgates[g, t, b, n] * source[b, t, k].

    The source is the feature map (k a position), or with HIDDEN h (slot t holds h_{t-1}), whose sums come after the
    map's. After both come the biases' [p, g, n], the sums of dgates, with BIAS: by a dot with ones, for which dgates
    is in shared memory already in the right layout.
    """
    BK: tl.constexpr = P.positions if P.positions < MOST else MOST
    BLOCKS: tl.constexpr = (P.hidden + BK - 1) // BK
    j = pid // BLOCKS % P.chunks
    g = (pid // (BLOCKS * P.chunks) % P.groups).to(tl.int64)
    part = pid // (BLOCKS * P.chunks * P.groups)
    bp = padded_batch.to(tl.int64)
    n = j * P.columns + tl.arange(0, P.columns)
    k = pid % BLOCKS * BK + tl.arange(0, BK)
    k_in = tl.minimum(k, P.hidden - 1)[None, :]
    tiles = ((padded_batch * P.steps + ROWS - 1) // ROWS + parts - 1) // parts

    dgates += bp * P.gates_at
    if HIDDEN:
        source += bp * P.states_at
    acc = tl.full((P.columns, BK), 0, tl.float32)
    bias = tl.full((P.columns, 16), 0, tl.float32)  # 16 equal columns, the fewest that a dot has
    ones = tl.full((ROWS, 16), 1, dgates.dtype.element_ty)
    for m in range(part * tiles, part * tiles + tiles):
        b, t, live = sample_and_step(m, padded_batch, P.steps, ROWS)
        row = (g * P.steps + t) * bp + b
        d = tl.load(dgates + row[:, None] * (4 * P.padded) + n[None, :], mask=live[:, None], other=0)
        if HIDDEN:
            at = ((g * P.slots + t) * bp + b)[:, None] * P.padded
            y = tl.load(source + at + k[None, :], mask=k[None, :] < P.padded, other=0)
        else:
            at = tl.minimum(b, batch - 1)[:, None] * (P.hidden * P.groups * P.steps)
            at += (g * P.steps + t)[:, None]
            y = tl.load(source + at + k_in * (P.groups * P.steps))
        acc = tl.dot(tl.trans(d), y, acc, input_precision="ieee")
        if BIAS:
            bias = tl.dot(tl.trans(d), ones, bias, input_precision="ieee")
    column = (part * P.groups + g) * (4 * P.padded) + n
    sums = parts.to(tl.int64) * (P.groups * 4 * P.padded * P.hidden)  # of one source
    partial += parts.to(tl.int64) * P.partial_at
    if HIDDEN:
        partial += sums
    tl.store(partial + column[:, None] * P.hidden + k[None, :], acc, mask=(k < P.hidden)[None, :])
    if BIAS:
        copy = tl.arange(0, 16)[None, :]
        tl.store(partial + sums + column[:, None] + copy * 0, bias, mask=copy == 0)


@triton.jit(do_not_specialize=["batch", "padded_batch", "parts"])
def weight_gradient_kernel(
    dgates, x, h, partial, batch, padded_batch, parts,
    PLANS: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Grid: per stage, for the map and then for h, blocks of at most MOST positions x chunks x groups x parts.

    The rows are cut into `parts`; unpack_kernel adds their sums in a fixed order, so the result does not vary from
    run to run.
    """
    pid = tl.program_id(0)
    for s in tl.static_range(len(PLANS)):
        width = PLANS[s].positions if PLANS[s].positions < MOST else MOST
        blocks = (PLANS[s].hidden + width - 1) // width
        count = blocks * (PLANS[s].chunks * PLANS[s].groups) * parts
        if (pid >= 0) & (pid < count):
            weight_gradient_tile(
                pid, dgates, x[s], partial, batch, padded_batch, parts,
                P=PLANS[s], ROWS=ROWS, MOST=MOST, HIDDEN=False, BIAS=False,
            )  # fmt: skip
        pid -= count
        if (pid >= 0) & (pid < count):
            if pid % blocks == 0:
                weight_gradient_tile(
                    pid, dgates, h, partial, batch, padded_batch, parts,
                    P=PLANS[s], ROWS=ROWS, MOST=MOST, HIDDEN=True, BIAS=True,
                )  # fmt: skip
            else:
                weight_gradient_tile(
                    pid, dgates, h, partial, batch, padded_batch, parts,
                    P=PLANS[s], ROWS=ROWS, MOST=MOST, HIDDEN=True, BIAS=False,
                )  # fmt: skip
        pid -= count
