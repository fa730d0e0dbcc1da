"""Tests of ptxrun. Run with: pytest test_ptxrun.py (needs numpy, torch, triton; no GPU)."""

import math
import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ptxrun import BarrierError, MemoryFault, PtxError, compile_triton, launch, run_triton

SCHEDULES = pytest.mark.parametrize("schedule", ["lockstep", "random"])
WARPS = pytest.mark.parametrize("num_warps", [4, 8])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def clean(stats):
    assert stats.races == [] and stats.cta_races == [] and stats.uninit_reads == 0, str(stats)
    return stats


# ---------------------------------------------------------------- kernels


@triton.jit
def add_kernel(X, Y, Z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Z + i, tl.load(X + i, mask=i < n) + tl.load(Y + i, mask=i < n), mask=i < n)


@triton.jit
def softmax_kernel(X, Y, n, stride, BLOCK: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + c, mask=c < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * stride + c, (e / tl.sum(e, 0)).to(Y.dtype.element_ty), mask=c < n)


@triton.jit
def matmul_kernel(
    A, B, C, M, N, K, sam, sbk, scm, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr
):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        a = tl.load(
            A + rm[:, None] * sam + rk[None, :], mask=(rm[:, None] < M) & (rk[None, :] < K), other=0.0
        )
        b = tl.load(
            B + rk[:, None] * sbk + rn[None, :], mask=(rk[:, None] < K) & (rn[None, :] < N), other=0.0
        )
        acc = tl.dot(a, b, acc, input_precision=PREC)
    tl.store(
        C + rm[:, None] * scm + rn[None, :],
        acc.to(C.dtype.element_ty),
        mask=(rm[:, None] < M) & (rn[None, :] < N),
    )


@triton.jit
def recurrent_kernel(H, W, Y, T, BB: tl.constexpr, D: tl.constexpr):
    b, d = tl.arange(0, BB), tl.arange(0, D)
    h = tl.load(H + b[:, None] * D + d[None, :])
    w = tl.load(W + d[:, None] * D + d[None, :])
    for t in range(T):
        h = tl.sigmoid(tl.dot(h, w)).to(w.dtype)
    tl.store(Y + b[:, None] * D + d[None, :], h)


@triton.jit
def rotate_kernel(X, S, Y, B: tl.constexpr, BARRIER: tl.constexpr):
    """Write a tile to global scratch and read it back transposed, rows reversed."""
    p = tl.program_id(0) * B * B
    r, c = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    tl.store(S + p + r * B + c, tl.load(X + p + r * B + c) * 2)
    if BARRIER:
        tl.debug_barrier()
    tl.store(Y + p + r * B + c, tl.load(S + p + (B - 1 - c) * B + r))


@triton.jit
def atomic_kernel(X, Sum, Count, Best, Half, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    x = tl.load(X + i, mask=m, other=0.0)
    tl.atomic_add(Sum + i % BINS, x, mask=m)
    tl.atomic_add(Count + i % BINS, 1, mask=m)
    tl.atomic_max(Best + i % BINS, x, mask=m)
    tl.atomic_add(Half + i // 2, x.to(tl.float16), mask=m)


@triton.jit
def ticket_kernel(Ticket, Out):
    t = tl.atomic_add(Ticket, 1)
    tl.store(Out + t, tl.program_id(0))


@triton.jit
def locked_sum_kernel(X, Acc, Lock, B: tl.constexpr, LOCK: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + tl.program_id(0) * B + i)
    if LOCK:
        while tl.atomic_cas(Lock, 0, 1) == 1:
            pass
    tl.store(Acc + i, tl.load(Acc + i) + x)
    if BARRIER:
        tl.debug_barrier()
    if LOCK:
        tl.atomic_xchg(Lock, 0)


@triton.jit
def grid_barrier_kernel(X, Flag, Y, B: tl.constexpr):
    """Every program publishes a block, waits for all others, then reads its neighbour's block."""
    p, n, i = tl.program_id(0), tl.num_programs(0), tl.arange(0, B)
    tl.store(X + p * B + i, i + p * B)
    tl.debug_barrier()
    tl.atomic_add(Flag, 1)
    while tl.atomic_add(Flag, 0) < n:
        pass
    tl.store(Y + p * B + i, tl.load(X + ((p + 1) % n) * B + i))


@triton.jit
def loops_kernel(X, Y, n, BLOCK: tl.constexpr):
    p, o = tl.program_id(0), tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    i = p
    while i < n:
        x = tl.load(X + i * BLOCK + o, eviction_policy="evict_last")
        if i % 3 == 0:
            acc += x
        elif i % 3 == 1:
            acc = acc * 0.5 - x
        else:
            acc = tl.maximum(acc, x)
        i += tl.num_programs(0)
    tl.store(Y + p * BLOCK + o, acc)


@triton.jit
def unary_kernel(X, Y, BLOCK: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    if OP == "exp":
        y = tl.exp(x)
    elif OP == "log":
        y = tl.log(tl.abs(x))
    elif OP == "sin":
        y = tl.sin(x)
    elif OP == "erf":
        y = tl.erf(x)
    elif OP == "rsqrt":
        y = tl.rsqrt(tl.abs(x))
    elif OP == "floor":
        y = tl.floor(x)
    elif OP == "tanh.approx":
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    tl.store(Y + i, y)


@triton.jit
def cast_kernel(X, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@triton.jit
def scan_sort_kernel(X, Y, Z, A, R: tl.constexpr, N: tl.constexpr):
    r, c = tl.arange(0, R)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(X + r * N + c)
    tl.store(Y + r * N + c, tl.cumsum(x, 1) + tl.cumsum(x, 0))
    tl.store(Z + r * N + c, tl.sort(x, dim=1))
    tl.store(A + tl.arange(0, R), tl.argmax(x, 1))


@triton.jit
def strided_kernel(X, Y, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i * STRIDE))


@triton.jit
def select_pointer_kernel(X, Y, Z, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(Z + i, tl.load(tl.where(i < n, X + i, Y + i)))


@triton.jit
def assert_kernel(X, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    tl.device_assert(x > 0, "must be positive")
    tl.store(X + tl.arange(0, BLOCK), x)


@triton.jit
def dot_kernel(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + m[:, None] * K + k[None, :]), tl.load(B + k[:, None] * N + n[None, :])
    tl.store(C + m[:, None] * N + n[None, :], tl.dot(a, b, out_dtype=OUT))


# ---------------------------------------------------------------- Triton kernels, end to end


@SCHEDULES
@WARPS
@pytest.mark.parametrize("n", [1, 127, 1000, 1024])
def test_vector_add(n, num_warps, schedule):
    x, y, z = torch.randn(n), torch.randn(n), torch.full((n + 8,), 7.0)
    st = clean(
        run_triton(
            add_kernel, (triton.cdiv(n, 256),), x, y, z, n, BLOCK=256, num_warps=num_warps, schedule=schedule
        )
    )
    assert torch.equal(z[:n], x + y) and (z[n:] == 7).all()
    assert st.unique["X"] == (4 * n, 0) and st.unique["Z"] == (0, 4 * n)
    assert st.global_load_bytes == 8 * n and st.global_store_bytes == 4 * n
    assert len(st.per_cta) == triton.cdiv(n, 256)
    # with a mask that is not a multiple of 16, a thread still owns two neighbours but loads them one by one
    assert st.sectors_per_ideal == pytest.approx(2 if num_warps == 4 and n in (127, 1000) else 1, abs=0.03)


@SCHEDULES
@WARPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(dtype, num_warps, schedule):
    x = torch.randn(5, 700).to(dtype)
    y = torch.empty_like(x)
    clean(
        run_triton(softmax_kernel, (5,), x, y, 700, 700, BLOCK=1024, num_warps=num_warps, schedule=schedule)
    )
    torch.testing.assert_close(y, torch.softmax(x.float(), 1).to(dtype))


def matmul(M, N, K, dtype, prec="tf32", **kw):
    a, b, c = (
        torch.randn(M, K).to(dtype),
        torch.randn(K, N).to(dtype),
        torch.full((M, N), float("nan")).to(dtype),
    )
    st = run_triton(
        matmul_kernel,
        (triton.cdiv(M, 64), triton.cdiv(N, 64)),
        a,
        b,
        c,
        M,
        N,
        K,
        K,
        N,
        N,
        BM=64,
        BN=64,
        BK=32,
        PREC=prec,
        **kw,
    )
    return st, (c.double() - a.double() @ b.double()).abs().max().item()


@SCHEDULES
@WARPS
@pytest.mark.parametrize(
    "dtype,prec,tol",
    [
        (torch.bfloat16, "tf32", 0.15),
        (torch.float16, "tf32", 0.02),
        (torch.float32, "tf32", 0.06),
        (torch.float32, "ieee", 5e-5),
    ],
)
@pytest.mark.parametrize("M,N,K", [(64, 64, 128), (96, 80, 100), (65, 33, 47)])
def test_matmul(M, N, K, dtype, prec, tol, num_warps, schedule):
    st, err = matmul(
        M, N, K, dtype, prec, num_warps=num_warps, num_stages=4 if K == 128 else 3, schedule=schedule
    )
    clean(st)
    assert err < tol
    if prec == "tf32":
        tiles = triton.cdiv(M, 64) * triton.cdiv(N, 64) * triton.cdiv(K, 32)
        assert st.mma_flops == tiles * 2 * 64 * 64 * 32
        assert st.mma == st.mma_flops // (2 * 16 * 8 * (8 if dtype == torch.float32 else 16))
    else:
        assert st.mma == 0 and err > 0
    if K == 128:
        size = dtype.itemsize
        assert st.unique["A"] == (M * K * size, 0) and st.unique["C"] == (0, M * N * size)
        assert prec == "ieee" or st.cp_async_bytes == (M * K + K * N) * size


def test_tf32_operands_are_truncated():
    a, b, c = torch.randn(32, 64), torch.randn(64, 32), torch.zeros(32, 32)
    run_triton(dot_kernel, (1,), a, b, c, M=32, N=32, K=64, OUT=tl.float32)
    cut = [(x.view(torch.int32) & -8192).view(torch.float32).double() for x in (a, b)]
    torch.testing.assert_close(c.double(), cut[0] @ cut[1], rtol=0, atol=1e-5)
    assert (c.double() - a.double() @ b.double()).abs().max() > 1e-3


def test_matmul_notices_wrong_data():
    """The reference check above has to be able to fail: flip one bit of one mma operand."""
    a, b = torch.randn(64, 32).bfloat16(), torch.randn(32, 64).bfloat16()
    c = torch.zeros(64, 64).bfloat16()
    st = run_triton(matmul_kernel, (1, 1), a, b, c, 64, 64, 32, 32, 64, 64, BM=64, BN=64, BK=32, PREC="tf32")
    good = c.clone()
    swapped = re.sub(r"(mma[^{]*\{[^}]*\}, )\{ (%r\d+), (%r\d+),", r"\1{ \3, \2,", st.ptx, count=1)
    assert swapped != st.ptx
    launch(swapped, (1, 1, 1), [a, b, c, 64, 64, 32, 32, 64, 64], 4, st.metadata.shared)
    assert not torch.equal(c, good)


@SCHEDULES
@WARPS
@pytest.mark.parametrize("dtype,tol", [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_recurrent_dot(dtype, tol, num_warps, schedule):
    h, w = torch.randn(16, 64).to(dtype), torch.randn(64, 64).to(dtype)
    y, ref = torch.empty_like(h), h
    clean(
        run_triton(recurrent_kernel, (1,), h, w, y, 12, BB=16, D=64, num_warps=num_warps, schedule=schedule)
    )
    for _ in range(12):
        ref = torch.sigmoid(ref.float() @ w.float()).to(dtype)
    assert (y.float() - ref.float()).abs().max() < tol


@SCHEDULES
@WARPS
def test_scratch_round_trip(num_warps, schedule):
    x = torch.randn(2, 32, 32)
    ref = (2 * x).flip(1).transpose(1, 2)
    for barrier in (True, False):
        s, y = torch.zeros_like(x), torch.zeros_like(x)
        st = run_triton(
            rotate_kernel, (2,), x, s, y, B=32, BARRIER=barrier, num_warps=num_warps, schedule=schedule
        )
        if barrier:
            assert torch.equal(y, ref)
            clean(st)
        else:
            race = st.races[0]
            assert (race.array, race.kind) in {("S", "write-read"), ("S", "read-write")} and not st.cta_races
            assert race.warps[0] != race.warps[1] and "global" in race.first + race.second
            if schedule == "random":
                assert not torch.equal(y, ref)


@SCHEDULES
@WARPS
def test_atomics(num_warps, schedule):
    n, bins = 1000, 7
    x = torch.randint(-50, 50, (n,)).float()
    total, count = torch.zeros(bins), torch.zeros(bins, dtype=torch.int32)
    best, half = torch.full((bins,), -1e9), torch.zeros(n // 2, dtype=torch.float16)
    st = clean(
        run_triton(
            atomic_kernel,
            (4,),
            x,
            total,
            count,
            best,
            half,
            n,
            BINS=bins,
            BLOCK=256,
            num_warps=num_warps,
            schedule=schedule,
        )
    )
    i = torch.arange(n) % bins
    assert torch.equal(total, torch.zeros(bins).index_add_(0, i, x))
    assert torch.equal(count, torch.bincount(i).int())
    assert torch.equal(best, torch.stack([x[i == b].max() for b in range(bins)]))
    assert torch.equal(half, x.view(-1, 2).sum(1).half())
    assert st.total["atom.global bytes"] >= n * 12


def test_ticket_order():
    for seed in range(3):
        ticket, out = torch.zeros(1, dtype=torch.int32), torch.full((6,), -1, dtype=torch.int32)
        clean(run_triton(ticket_kernel, (6,), ticket, out, schedule="random", seed=seed))
        assert ticket.item() == 6 and sorted(out.tolist()) == list(range(6))


@SCHEDULES
def test_races_between_programs(schedule):
    x = torch.randn(5, 256)

    def run(lock, barrier):
        acc, flag = torch.zeros(256), torch.zeros(1, dtype=torch.int32)
        return acc, run_triton(
            locked_sum_kernel, (5,), x, acc, flag, B=256, LOCK=lock, BARRIER=barrier, schedule=schedule
        )

    acc, st = run(True, True)
    torch.testing.assert_close(acc, x.sum(0))
    clean(st)
    for lock, barrier in ((False, True), (True, False)):  # no lock; lock released before all warps are done
        _, st = run(lock, barrier)
        assert {r.array for r in st.cta_races} == {"Acc"} and st.races == []
        assert st.cta_races[0].ctas[0] != st.cta_races[0].ctas[1]


@SCHEDULES
def test_programs_that_wait_for_each_other(schedule):
    def run(resident, **kw):
        x, y = torch.zeros(4 * 128, dtype=torch.int32), torch.zeros(4 * 128, dtype=torch.int32)
        flag = torch.zeros(1, dtype=torch.int32)
        return y, run_triton(
            grid_barrier_kernel, (4,), x, flag, y, B=128, schedule=schedule, resident=resident, **kw
        )

    y, st = run(4)
    clean(st)
    assert torch.equal(y, torch.arange(512, dtype=torch.int32).roll(-128))
    with pytest.raises(PtxError, match="resident"):
        run(1, max_steps=2000)


@SCHEDULES
def test_loops_and_branches(schedule):
    x, y, ref = torch.randn(30, 256), torch.zeros(7, 256), torch.zeros(7, 256)
    clean(run_triton(loops_kernel, (7,), x, y, 30, BLOCK=256, schedule=schedule))
    for p in range(7):
        for i in range(p, 30, 7):
            ref[p] = [ref[p] + x[i], ref[p] * 0.5 - x[i], torch.maximum(ref[p], x[i])][i % 3]
    torch.testing.assert_close(y, ref)


@pytest.mark.parametrize(
    "op,ref",
    [
        ("exp", torch.exp),
        ("log", lambda x: x.abs().log()),
        ("sin", torch.sin),
        ("erf", torch.erf),
        ("rsqrt", lambda x: x.abs().rsqrt()),
        ("floor", torch.floor),
        ("tanh.approx", torch.tanh),
    ],
)
def test_math(op, ref):
    """sin at large arguments runs libdevice's slow path: local memory, carries, a constant table."""
    x = torch.cat(
        [
            torch.randn(1000) * 4,
            torch.tensor([1e5, -3e4, 1e-30, 0.5, -0.5, 2.5, -2.5, 80.0]),
            torch.linspace(0.1, 1, 16),
        ]
    )
    y = torch.zeros_like(x)
    run_triton(unary_kernel, (1,), x, y, BLOCK=1024, OP=op)
    torch.testing.assert_close(y.double(), ref(x.double()), rtol=5e-6, atol=1e-6)


TYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
]


@pytest.mark.parametrize("a", TYPES)
@pytest.mark.parametrize("b", TYPES)
def test_casts(a, b):
    lo, hi = (0, 120) if torch.uint8 in (a, b) else (-120, 120)
    x = (torch.rand(512, dtype=torch.float64) * (hi - lo) + lo).to(a)
    y = torch.zeros(512, dtype=b)
    clean(run_triton(cast_kernel, (1,), x, y, BLOCK=512))
    assert torch.equal(y, x.to(b))


@SCHEDULES
@WARPS
def test_scan_sort_argmax(num_warps, schedule):
    x = torch.stack([torch.randperm(64) for _ in range(32)]).int()
    y, z, a = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(32, dtype=torch.int32)
    clean(run_triton(scan_sort_kernel, (1,), x, y, z, a, R=32, N=64, num_warps=num_warps, schedule=schedule))
    assert torch.equal(y, (x.cumsum(1) + x.cumsum(0)).int())
    assert torch.equal(z, x.sort(1)[0]) and torch.equal(a, x.argmax(1).int())


@pytest.mark.parametrize(
    "dtype,out,tl_out,tol",
    [
        (torch.int8, torch.int32, tl.int32, 0),
        (torch.float64, torch.float64, tl.float64, 1e-12),
        (torch.float16, torch.float16, tl.float16, 0.05),
        (torch.float8_e5m2, torch.float32, tl.float32, 1e-4),
    ],
)
def test_other_mma_types(dtype, out, tl_out, tol):
    a, b = [
        torch.randint(-120, 120, s).to(dtype) if dtype == torch.int8 else torch.randn(s).to(dtype)
        for s in ((32, 64), (64, 32))
    ]
    c = torch.zeros(32, 32, dtype=out)
    st = clean(run_triton(dot_kernel, (1,), a, b, c, M=32, N=32, K=64, OUT=tl_out))
    assert (c.double() - a.double() @ b.double()).abs().max() <= tol
    assert st.mma_flops == 2 * 32 * 32 * 64


def test_coalescing_figure():
    x, y = torch.randn(128 * 8), torch.zeros(128)
    for stride, ratio in ((1, 1.0), (2, 1.5), (8, 4.5)):  # the store stays at 1: (ratio of loads + 1) / 2
        st = run_triton(strided_kernel, (1,), x, y, STRIDE=stride, BLOCK=128)
        assert torch.equal(y, x[::stride][:128])
        assert st.sectors_per_ideal == pytest.approx(ratio)
        assert any(v["touched"] == 16 * stride for v in st.access.values())


def test_arguments():
    # NumPy arrays, uint16 as bfloat16
    x = torch.randn(256).bfloat16()
    y = np.zeros(256, np.uint16)
    run_triton(
        add_kernel, (1,), x.view(torch.uint16).numpy(), x.view(torch.uint16).numpy(), y, 256, BLOCK=256
    )
    assert torch.equal(torch.from_numpy(y).view(torch.bfloat16), x + x)
    # in place, a view that is not 16-byte aligned, a strided view, n == 1 as a constexpr
    buf = torch.randn(300)
    ref = buf[3:259] * 2
    st = run_triton(add_kernel, (1,), buf[3:], buf[3:], buf[3:], 256, BLOCK=256)
    assert torch.equal(buf[3:259], ref) and st.unique["X|Y|Z"] == (1024, 1024)
    assert not any("v4" in op for op in st.ops)
    assert any("v2" in op for op in run_triton(add_kernel, (1,), ref, ref, ref, 256, BLOCK=256).ops)
    m = torch.randn(64, 8)
    out = torch.zeros(64)
    run_triton(strided_kernel, (1,), m[:, 2], out, STRIDE=8, BLOCK=64)
    assert torch.equal(out, m[:, 2])
    st = run_triton(add_kernel, (1,), ref, ref, out, 1, BLOCK=256)
    assert st.ptx.count(".param .u32") == 0 and out[0] == 2 * ref[0]
    # one instruction whose lanes address two arrays
    a, b, c = torch.randn(128), torch.randn(128), torch.zeros(128)
    clean(run_triton(select_pointer_kernel, (1,), a, b, c, 50, BLOCK=128))
    assert torch.equal(c, torch.cat([a[:50], b[50:]]))
    with pytest.raises(MemoryFault, match="read-only"):
        fixed = np.zeros(256, np.float32)
        fixed.flags.writeable = False
        ptx, meta = compile_triton(
            add_kernel, {"X": "*fp32", "Y": "*fp32", "Z": "*fp32", "n": "i32"}, {"BLOCK": 256}
        )
        launch(ptx, (1, 1, 1), [buf, buf, fixed, 256], 4, meta.shared)


def test_out_of_bounds_and_misaligned():
    x = torch.randn(256)
    with pytest.raises(MemoryFault, match=r"offset 400 of 'Z' \(400 bytes\)"):
        run_triton(add_kernel, (1,), x, x, torch.zeros(100), 101, BLOCK=256)
    with pytest.raises(MemoryFault, match="'Y'"):
        run_triton(add_kernel, (1,), x, torch.randn(200), torch.zeros(256), 256, BLOCK=256)
    sig = {"X": "*fp32", "Y": "*fp32", "Z": "*fp32", "n": "i32"}
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    ptx, meta = compile_triton(add_kernel, sig, {"BLOCK": 512}, attrs)
    buf = torch.randn(1040)
    args = [buf[0:512], buf[512:1024], torch.zeros(512), 512]
    launch(ptx, (1, 1, 1), args, 4, meta.shared)
    assert torch.equal(args[2], args[0] + args[1])
    with pytest.raises(MemoryFault, match="misaligned"):  # promised 16-byte alignment, not kept
        launch(ptx, (1, 1, 1), [buf[1:513]] + args[1:], 4, meta.shared)


def test_device_assert():
    x = torch.rand(128) + 1
    run_triton(assert_kernel, (1,), x, BLOCK=128, debug=True)
    x[77] = -1
    with pytest.raises(PtxError, match="must be positive"):
        run_triton(assert_kernel, (1,), x, BLOCK=128, debug=True)


# ---------------------------------------------------------------- broken kernels must be noticed


def pipelined():
    a, b, c = torch.randn(64, 160).bfloat16(), torch.randn(160, 64).bfloat16(), torch.zeros(64, 64).bfloat16()
    st = clean(
        run_triton(
            matmul_kernel,
            (1, 1),
            a,
            b,
            c,
            64,
            64,
            160,
            160,
            64,
            64,
            BM=64,
            BN=64,
            BK=32,
            PREC="tf32",
            num_stages=3,
        )
    )
    return st, c, [a, b, c, 64, 64, 160, 160, 64, 64]


@SCHEDULES
def test_missing_cp_async_wait(schedule):
    st, c, args = pipelined()
    good = c.clone()
    weak = re.sub(r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 9;", st.ptx)
    bad = launch(weak, (1, 1, 1), args, 4, st.metadata.shared, schedule=schedule)
    assert not torch.equal(c, good) and "cp.async-read" in {r.kind for r in bad.races}
    assert bad.uninit_reads > 0 and bad.total["cp.async never waited for"] > 0


@SCHEDULES
def test_every_missing_barrier_that_matters(schedule):
    """Remove one bar.sync at a time: wherever the result goes wrong a race must have been reported."""
    st, c, args = pipelined()
    good, racy, wrong = c.clone(), 0, 0
    spots = list(re.finditer(r"bar\.sync[^;]*;", st.ptx))
    for m in spots:
        got = launch(
            st.ptx[: m.start()] + st.ptx[m.end() :], (1, 1, 1), args, 4, st.metadata.shared, schedule=schedule
        )
        broken = not torch.equal(c, good)
        racy += bool(got.races)
        wrong += broken
        assert got.races or not broken
    assert racy >= len(spots) - 2 and (wrong >= 3 or schedule == "lockstep")


# ---------------------------------------------------------------- single PTX instructions


def ptx_kernel(body, regs="", params=1):
    """A kernel whose %rd1, %rd2... are its pointer parameters, %r1 the thread id, %rd10 = %rd1 + 4 * tid."""
    ps = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(params))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(params))
    return f"""
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{ps}
)
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<60>;
    .reg .b64 %rd<40>;
    {regs}
    {loads}
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd10, %r1, 4, %rd1;
{body}
}}
"""


def run_ptx(body, *arrays, warps=1, shared=1024, **kw):
    return launch(ptx_kernel(body, params=len(arrays)), (1, 1, 1), list(arrays), warps, shared, **kw)


def signed(v, bits=32):
    v &= (1 << bits) - 1
    return v - (1 << bits) if v >> bits - 1 else v


def ref_prmt(a, b, s):
    bts, out = (a | b << 32).to_bytes(8, "little"), 0
    for i in range(4):
        n = s >> 4 * i & 15
        v = bts[n & 7]
        out |= ((255 if v & 128 else 0) if n & 8 else v) << 8 * i
    return out


def ref_bfe(a, b, c, bits, sign):
    pos, n = b & 255, c & 255
    msb = bits - 1
    fill = 0 if not sign or n == 0 else a >> min(pos + n - 1, msb) & 1
    return sum(((a >> pos + i & 1) if i < n and pos + i <= msb else fill) << i for i in range(bits))


def ref_bfi(a, b, c, d):
    pos, n = c & 255, d & 255
    for i in range(n):
        if pos + i < 32:
            b = b & ~(1 << pos + i) | (a >> i & 1) << pos + i
    return b


M32, M64 = (1 << 32) - 1, (1 << 64) - 1
INTEGER = {  # instruction on %r2, %r3, %r4 -> %r5, with a reference on Python integers
    "add.s32 %r5, %r2, %r3": lambda a, b, c: a + b,
    "sub.u32 %r5, %r2, %r3": lambda a, b, c: a - b,
    "mul.lo.s32 %r5, %r2, %r3": lambda a, b, c: a * b,
    "mul.hi.s32 %r5, %r2, %r3": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul.hi.u32 %r5, %r2, %r3": lambda a, b, c: a * b >> 32,
    "mad.lo.s32 %r5, %r2, %r3, %r4": lambda a, b, c: a * b + c,
    "mad.hi.u32 %r5, %r2, %r3, %r4": lambda a, b, c: (a * b >> 32) + c,
    "div.s32 %r5, %r2, %r4": lambda a, b, c: (signed(a) - int(math.fmod(signed(a), signed(c)))) // signed(c),
    "rem.s32 %r5, %r2, %r4": lambda a, b, c: int(math.fmod(signed(a), signed(c))),
    "div.u32 %r5, %r2, %r4": lambda a, b, c: a // c,
    "rem.u32 %r5, %r2, %r4": lambda a, b, c: a % c,
    "min.s32 %r5, %r2, %r3": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %r5, %r2, %r3": lambda a, b, c: max(a, b),
    "abs.s32 %r5, %r2": lambda a, b, c: abs(signed(a)),
    "neg.s32 %r5, %r2": lambda a, b, c: -a,
    "not.b32 %r5, %r2": lambda a, b, c: ~a,
    "shl.b32 %r5, %r2, %r4": lambda a, b, c: a << c if c < 32 else 0,
    "shr.u32 %r5, %r2, %r4": lambda a, b, c: a >> c,
    "shr.s32 %r5, %r2, %r4": lambda a, b, c: signed(a) >> c,
    "shr.s32 %r5, %r2, 40": lambda a, b, c: signed(a) >> 31,
    "shf.l.wrap.b32 %r5, %r2, %r3, %r4": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32 %r5, %r2, %r3, %r4": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.r.clamp.b32 %r5, %r2, %r3, %r4": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 %r5, %r2, %r4, 9": lambda a, b, c: ref_bfe(a, c, 9, 32, False),
    "bfe.s32 %r5, %r2, %r4, 9": lambda a, b, c: ref_bfe(a, c, 9, 32, True),
    "bfe.s32 %r5, %r2, 3, %r4": lambda a, b, c: ref_bfe(a, 3, c, 32, True),
    "bfi.b32 %r5, %r2, %r3, %r4, 7": lambda a, b, c: ref_bfi(a, b, c, 7),
    "lop3.b32 %r5, %r2, %r3, %r4, 0xca": lambda a, b, c: a & b | ~a & c,
    "lop3.b32 %r5, %r2, %r3, %r4, 0x96": lambda a, b, c: a ^ b ^ c,
    "prmt.b32 %r5, %r2, %r3, 0x5410U": lambda a, b, c: ref_prmt(a, b, 0x5410),
    "prmt.b32 %r5, %r2, %r3, 0xb97a": lambda a, b, c: ref_prmt(a, b, 0xB97A),
    "prmt.b32 %r5, %r2, %r3, %r4": lambda a, b, c: ref_prmt(a, b, c & 0xFFFF),
    "popc.b32 %r5, %r2": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %r5, %r2": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r5, %r2": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 %r5, %r2": lambda a, b, c: a.bit_length() - 1,
    "bfind.shiftamt.u32 %r5, %r2": lambda a, b, c: 32 - a.bit_length() if a else -1,
    "add.cc.u32 %r6, %r2, %r3; addc.u32 %r5, %r4, 0": lambda a, b, c: c + (a + b >> 32),
    "sub.cc.u32 %r6, %r2, %r3; subc.u32 %r5, %r4, 0": lambda a, b, c: c - (a < b),
    "mad.lo.cc.u32 %r6, %r2, %r3, %r4; madc.hi.u32 %r5, %r2, %r3, 7": lambda a, b, c: (
        (a * b + c + (7 << 32)) >> 32
    ),
    "mul.wide.s32 %rd5, %r2, %r3; mov.b64 {_, %r5}, %rd5": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mov.b64 %rd5, {%r2, %r3}; shr.s64 %rd6, %rd5, 20; cvt.u32.u64 %r5, %rd6": lambda a, b, c: (
        signed(b << 32 | a, 64) >> 20
    ),
    "mov.b64 %rd5, {%r2, %r3}; mul.hi.u64 %rd6, %rd5, %rd5; cvt.u32.u64 %r5, %rd6": lambda a, b, c: (
        (b << 32 | a) ** 2 >> 64
    ),
    "mov.b64 %rd5, {%r2, %r3}; mul.hi.s64 %rd6, %rd5, -7; cvt.u32.u64 %r5, %rd6": lambda a, b, c: (
        signed(b << 32 | a, 64) * -7 >> 64
    ),
    "mov.b32 {%rs1, %rs2}, %r2; mul.wide.s16 %r5, %rs1, %rs2": lambda a, b, c: (
        signed(a, 16) * signed(a >> 16, 16)
    ),
    "cvt.s32.s8 %r5, %r2": lambda a, b, c: signed(a, 8),
    "cvt.sat.u8.s32 %r5, %r2": lambda a, b, c: min(max(signed(a), 0), 255),
    "setp.lt.and.s32 %p1|%p2, %r2, %r3, !%p3; selp.b32 %r5, %r2, %r3, %p1": lambda a, b, c: (
        a if signed(a) < signed(b) else b
    ),
    "setp.lt.s32 %p1|%p2, %r2, %r3; selp.b32 %r5, %r2, %r3, %p2": lambda a, b, c: (
        b if signed(a) < signed(b) else a
    ),
    "setp.hi.u32 %p1, %r2, %r3; selp.b32 %r5, 1, 0, %p1": lambda a, b, c: int(a > b),
    "{ .reg .b32 %r2; mov.b32 %r2, 5; add.u32 %r5, %r2, %r3; } add.u32 %r5, %r5, %r2": lambda a, b, c: (
        a + b + 5
    ),
}


@pytest.mark.parametrize("code", INTEGER)
def test_integer_instruction(code):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 1 << 32, (3, 32), dtype=np.uint32)
    x[:, :4] = [[0, M32, 0x80000000, 1], [0, M32, 7, 0x80000000], [1, 31, 32, 5]]
    x[2, 4:20] = rng.integers(1, 40, 16)
    x[2][x[2] == 0] = 3
    out = np.zeros(32, np.uint32)
    if "shl" in code or "shr" in code or "bf" in code:  # %r4 is a shift count
        x[2] %= 45
    run_ptx(
        f"""ld.global.b32 %r2, [%rd10]; ld.global.b32 %r3, [%rd10+128]; ld.global.b32 %r4, [%rd10+256];
        setp.ne.s32 %p3, 0, 0;
        {code};
        mad.wide.u32 %rd11, %r1, 4, %rd2; st.global.b32 [%rd11], %r5; ret;""",
        x,
        out,
    )
    want = [INTEGER[code](*(int(v) for v in col)) & M32 for col in x.T]
    assert out.tolist() == want


SPECIAL = np.array(
    [
        0.0,
        -0.0,
        1,
        -1.5,
        np.inf,
        -np.inf,
        np.nan,
        1e-40,
        2.5,
        -3.5,
        65504,
        65520,
        1e10,
        -1e10,
        0.1,
        3e38,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-8 + 2**-20,
        6e-8,
        1e-7,
        -2.7,
        255.9,
        300,
        0.5,
        1.5,
        -0.5,
        7,
        2147483648,
        -2147483904,
        4.3e9,
        1e20,
    ],
    np.float32,
)
FLOAT = {  # instruction on f32 %r2, %r3 -> b32 %r5
    "min.f32 %r5, %r2, %r3": lambda a, b: np.fmin(a, b),
    "max.NaN.f32 %r5, %r2, %r3": lambda a, b: np.maximum(a, b),
    "fma.rn.f32 %r5, %r2, %r3, %r2": lambda a, b: (a.astype("f8") * b + a).astype("f4"),
    "add.rz.f32 %r5, %r2, 0f3F800001": lambda a, b: trunc32(a.astype("f8") + np.float32(1.0000001)),
    "add.ftz.f32 %r5, %r2, 0f00000000": lambda a, b: np.where(np.abs(a) < 1.2e-38, 0, a),
    "add.sat.f32 %r5, %r2, %r3": lambda a, b: np.clip(np.nan_to_num(a + b, nan=0), 0, 1),
    "copysign.f32 %r5, %r2, %r3": lambda a, b: np.copysign(b, a),
    "div.full.f32 %r5, %r2, %r3": lambda a, b: a / b,
    "rcp.approx.ftz.f32 %r5, %r2": lambda a, b: np.where(
        np.abs(a) > 1e38, 0, 1 / np.where(np.abs(a) < 1e-38, a * 0, a)
    ),
    "cvt.rzi.s32.f32 %r5, %r2": lambda a, b: saturate(np.trunc(a), -(2**31), 2**31 - 1),
    "cvt.rni.u32.f32 %r5, %r2": lambda a, b: saturate(np.rint(a), 0, 2**32 - 1),
    "cvt.rmi.f32.f32 %r5, %r2": lambda a, b: np.floor(a),
    "cvt.rna.tf32.f32 %r5, %r2": lambda a, b: np.where(
        np.isnan(a), np.uint32(0x7FFFFFFF), a.view("u4") + np.uint32(0x1000) & np.uint32(0xFFFFE000)
    ),
    "cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r5, %rs1": lambda a, b: a.astype("f2").astype("f4"),
    "cvt.rz.f16.f32 %rs1, %r2; cvt.f32.f16 %r5, %rs1": lambda a, b: trunc16(a),
    "cvt.rn.bf16.f32 %rs1, %r2; cvt.f32.bf16 %r5, %rs1": lambda a, b: (
        torch.from_numpy(a.copy()).bfloat16().float().numpy()
    ),
    "cvt.rn.bf16x2.f32 %r6, %r2, %r3; mov.b32 {%rs1, %rs2}, %r6; cvt.f32.bf16 %r5, %rs2": lambda a, b: (
        torch.from_numpy(a.copy()).bfloat16().float().numpy()
    ),
    "cvt.rn.f16x2.f32 %r6, %r2, %r3; mov.b32 {%rs1, %rs2}, %r6; cvt.f32.f16 %r5, %rs1": lambda a, b: b.astype(
        "f2"
    ).astype("f4"),
    "cvt.rn.bf16.f32 %rs1, %r2; cvt.rn.bf16.f32 %rs2, %r3; fma.rn.bf16 %rs3, %rs1, %rs2, %rs1; cvt.f32.bf16 %r5, %rs3": lambda a, b: (
        bf16(bf16(a).astype("f8") * bf16(b) + bf16(a))
    ),
    "cvt.rn.f16x2.f32 %r6, %r2, %r3; add.f16x2 %r7, %r6, %r6; mov.b32 {%rs1, %rs2}, %r7; cvt.f32.f16 %r5, %rs2": lambda a, b: (
        (a.astype("f2") + a.astype("f2")).astype("f4")
    ),
    "setp.ltu.f32 %p1, %r2, %r3; selp.b32 %r5, 1, 0, %p1": lambda a, b: (~(a >= b)).astype("u4"),
    "setp.ne.f32 %p1, %r2, %r3; selp.b32 %r5, 1, 0, %p1": lambda a, b: ((a < b) | (a > b)).astype("u4"),
    "setp.nan.f32 %p1, %r2, %r3; selp.b32 %r5, 1, 0, %p1": lambda a, b: (np.isnan(a) | np.isnan(b)).astype(
        "u4"
    ),
}


def bf16(x):
    return torch.from_numpy(np.asarray(x, "f8")).to(torch.bfloat16).float().numpy()


def saturate(x, lo, hi):
    return np.array(
        [0 if math.isnan(v) else int(min(max(v, lo), hi)) & M32 for v in x.astype("f8")], np.uint32
    )


def trunc32(x):
    y = x.astype("f4")
    return np.where(np.abs(y.astype("f8")) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def trunc16(x):
    y = x.astype("f2")
    return np.where(np.abs(y.astype("f4")) > np.abs(x), np.nextafter(y, np.float16(0)), y).astype("f4")


@pytest.mark.parametrize("code", FLOAT)
def test_float_instruction(code):
    for shift in (0, 5, 13):
        x = np.stack([SPECIAL, np.roll(SPECIAL, shift)])
        out = np.zeros(32, np.uint32)
        run_ptx(
            f"""ld.global.b32 %r2, [%rd10]; ld.global.b32 %r3, [%rd10+128];
            {code};
            mad.wide.u32 %rd11, %r1, 4, %rd2; st.global.b32 [%rd11], %r5; ret;""",
            x,
            out,
        )
        with np.errstate(all="ignore"):
            want = FLOAT[code](*x)
        if want.dtype.kind == "f":
            np.testing.assert_array_equal(out.view("f4"), want.astype("f4"))
            signs = ~np.isnan(want) & ("sat" not in code) & ("ftz" not in code)
            assert (
                (np.signbit(out.view("f4")) == np.signbit(want))[signs].all()
                or "min" in code
                or "max" in code
            )
        else:
            assert out.tolist() == want.tolist()


def test_unknown_instructions_are_named():
    with pytest.raises(NotImplementedError, match=r"line \d+: frobnicate\.b32"):
        run_ptx("frobnicate.b32 %r2, %r3; ret;", np.zeros(4, np.float32))
    for code in (
        "mul.lo.s128 %r2, %r3, %r4",
        "min.xorsign.abs.f32 %r2, %r3, %r4",
        "add.sat.s32 %r2, %r3, %r4",
        "fma.rn.relu.f16 %rs1, %rs2, %rs3, %rs4",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r2}, {%r3}",
    ):
        with pytest.raises(NotImplementedError, match=re.escape(code)):
            run_ptx(code + "; ret;", np.zeros(4, np.float32))


@SCHEDULES
def test_shuffles_votes_redux(schedule):
    code = {
        "shfl.sync.bfly.b32 %r5, %r1, 5, 31, -1": lambda i: i ^ 5,
        "shfl.sync.up.b32 %r5, %r1, 3, 0, -1": lambda i: i - 3 if i % 32 >= 3 else i,
        "shfl.sync.down.b32 %r5|%p1, %r1, 3, 31, -1": lambda i: i + 3 if i % 32 < 29 else i,
        "shfl.sync.idx.b32 %r5, %r1, 7, 31, -1": lambda i: i // 32 * 32 + 7,
        "shfl.sync.bfly.b32 %r5, %r1, 4, 0x1807, -1": lambda i: i ^ 4,  # segments of 8 lanes
        "and.b32 %r2, %r1, 3; shfl.sync.idx.b32 %r5, %r1, %r2, 31, -1": lambda i: i // 32 * 32 + i % 4,
        "setp.lt.u32 %p1, %r1, 40; vote.sync.ballot.b32 %r5, %p1, -1": lambda i: M32 if i < 32 else 255,
        "setp.lt.u32 %p1, %r1, 40; vote.sync.all.pred %p2, %p1, -1; selp.b32 %r5, 1, 0, %p2": lambda i: int(
            i < 32
        ),
        "redux.sync.add.s32 %r5, %r1, -1": lambda i: 496 + 1024 * (i // 32),
        "redux.sync.max.u32 %r5, %r1, -1": lambda i: i // 32 * 32 + 31,
    }
    for text, want in code.items():
        out = np.zeros(64, np.uint32)
        run_ptx(f"{text}; st.global.b32 [%rd10], %r5; ret;", out, warps=2, schedule=schedule)
        assert out.tolist() == [want(i) for i in range(64)], text


@SCHEDULES
def test_divergence(schedule):
    """Each lane loops tid % 7 times, an out-of-line block sits behind the exit, and lanes leave early."""
    out = np.full(64, 99, np.uint32)
    run_ptx(
        """
        rem.u32 %r2, %r1, 7; mov.b32 %r3, 0; setp.eq.u32 %p1, %r2, 0;
        setp.gt.u32 %p5, %r1, 60;
        @%p5 ret;
        @%p1 bra AWAY;
    LOOP:
        add.u32 %r3, %r3, 10; sub.u32 %r2, %r2, 1; setp.ne.u32 %p2, %r2, 0;
        @%p2 bra LOOP;
    JOIN:
        setp.lt.u32 %p4, %r1, 61;
        vote.sync.ballot.b32 %r4, %p4, -1;       // only complete if everybody has come back
        setp.lt.u32 %p3, %r1, 32; selp.b32 %r5, -1, 0x1fffffff, %p3; setp.eq.b32 %p6, %r4, %r5;
        selp.b32 %r6, 1, 0, %p6; add.u32 %r3, %r3, %r6; st.global.b32 [%rd10], %r3;
        ret;
    AWAY:
        mov.b32 %r3, 500;
        bra.uni JOIN;""",
        out,
        warps=2,
        schedule=schedule,
    )
    assert out.tolist() == [(10 * (i % 7) or 500) + 1 if i <= 60 else 99 for i in range(64)]


@SCHEDULES
def test_divergence_at_a_warp_wide_instruction(schedule):
    with pytest.raises(BarrierError, match="diverged"):
        run_ptx(
            """setp.lt.u32 %p1, %r1, 8; @%p1 bra A; ret;
                A: shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; bra.uni B;
                B: bar.sync 0; ret;""".replace(
                "ret;\n                A", "add.u32 %r5, %r1, 1; bra.uni B;\n A"
            ),
            np.zeros(64, np.uint32),
            warps=2,
            schedule=schedule,
        )
    with pytest.raises(BarrierError, match="diverged"):
        run_ptx(
            """setp.lt.u32 %p1, %r1, 8; @%p1 bra A; bra.uni B;
                A: bar.sync 0;
                B: ret;""",
            np.zeros(64, np.uint32),
            warps=2,
            schedule=schedule,
        )


@SCHEDULES
def test_barriers_between_warps(schedule):
    """Warps 0 and 1 exchange values through barrier 1 (64 threads); warps 2 and 3 do not take part."""
    body = """
        shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;
        setp.ge.u32 %p1, %r1, 64;
        @%p1 bra OUT;
        st.shared.b32 [%r4], %r1;
        bar.sync 1, 64;
        xor.b32 %r5, %r2, 128; add.u32 %r5, %r3, %r5; ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd10], %r6;
        bra.uni END;
    OUT:
        st.global.b32 [%rd10], %r1;
    END:
        bar.sync 0;
        ret;"""
    for seed in range(4):
        out = np.zeros(128, np.uint32)
        run_ptx(body, out, warps=4, schedule=schedule, seed=seed)
        assert out.tolist() == [i ^ 32 if i < 64 else i for i in range(128)]
    with pytest.raises(BarrierError, match="stuck"):
        run_ptx(
            body.replace("bar.sync 1, 64", "bar.sync 1, 96"),
            np.zeros(128, np.uint32),
            warps=4,
            schedule=schedule,
        )


def test_early_exit_does_not_block_a_barrier():
    for seed in range(8):
        out = np.zeros(128, np.uint32)
        run_ptx(
            """setp.ge.u32 %p1, %r1, 96; @%p1 ret; bar.sync 0; st.global.b32 [%rd10], %r1; ret;""",
            out,
            warps=4,
            schedule="random",
            seed=seed,
        )
        assert out.tolist() == [i if i < 96 else 0 for i in range(128)]


def test_random_schedule_interleaves():
    """Two tickets per warp, drawn in one basic block: warps come in any order and between each other's draws."""
    orders, apart = set(), 0
    for seed in range(12):
        out = np.zeros(260, np.uint32)
        run_ptx(
            """and.b32 %r2, %r1, 31; setp.eq.u32 %p1, %r2, 0; add.u32 %r3, %r1, 1; add.u32 %r4, %r1, 2;
            @%p1 atom.global.add.u32 %r5, [%rd1+1024], 1; xor.b32 %r3, %r3, %r4; xor.b32 %r3, %r3, %r4;
            @%p1 atom.global.add.u32 %r6, [%rd1+1024], 1;
            @%p1 st.global.b32 [%rd10], %r5; @%p1 st.global.b32 [%rd10+4], %r6; ret;""",
            out,
            warps=8,
            schedule="random",
            seed=seed,
        )
        first, second = out[0:256:32], out[1:256:32]
        assert sorted([*first, *second]) == list(range(16))
        orders.add(tuple(first))
        apart += (second != first + 1).any()
    assert len(orders) > 8 and apart >= 3


def test_readers_are_remembered():
    together = "ld.global.b32 %r2, [%rd1];"
    in_turn = "@!%p1 ld.global.b32 %r2, [%rd1]; @%p1 ld.global.b32 %r2, [%rd1];"
    for loads in (together, in_turn):
        for store, racy in (
            ("@%p1 st.global.b32 [%rd1], %r1;", True),
            ("@!%p1 st.global.b32 [%rd1], %r1;", True),
            ("bar.sync 0; @%p1 st.global.b32 [%rd1], 5;", False),
        ):
            st = run_ptx(f"setp.ge.u32 %p1, %r1, 32; {loads} {store} ret;", np.zeros(4, np.uint32), warps=2)
            assert ("read-write" in {r.kind for r in st.races}) == racy
    # CTA 0 reads; CTA 1 reads with two warps, passes a barrier and writes
    st = launch(
        ptx_kernel("""mov.u32 %r3, %ctaid.x; setp.eq.u32 %p2, %r3, 1; setp.eq.u32 %p3, %r1, 0;
        ld.global.b32 %r2, [%rd1]; bar.sync 0; and.pred %p2, %p2, %p3; @%p2 st.global.b32 [%rd1], 9; ret;"""),
        (2, 1, 1),
        [np.zeros(4, np.uint32)],
        2,
        16,
    )
    assert [(r.kind, r.ctas) for r in st.cta_races] == [("read-write", (0, 1))] and st.races == []


ATOMICS = {  # atomic with operand lane + 3 (cas: compare with the lane number) on one of three cells
    "add.u32": lambda o, v, i: o + v,
    "min.s32": lambda o, v, i: min(o, v),
    "max.u32": lambda o, v, i: max(o, v),
    "and.b32": lambda o, v, i: o & v,
    "or.b32": lambda o, v, i: o | v,
    "xor.b32": lambda o, v, i: o ^ v,
    "exch.b32": lambda o, v, i: v,
    "cas.b32": lambda o, v, i: v if o == i else o,
    "inc.u32": lambda o, v, i: 0 if o >= v else o + 1,
    "dec.u32": lambda o, v, i: v if o == 0 or o > v else o - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomic_instruction(op, space):
    """Old values and results as if the lanes of a warp came in order."""
    old, cells = np.zeros(32, np.uint32), np.array([0, 5, 20], np.uint32)
    want_old, want = [], cells.tolist()
    for i in range(32):
        want_old.append(want[i % 3])
        want[i % 3] = ATOMICS[op](want[i % 3], i + 3, i)
    extra = "%r1, %r3" if op == "cas.b32" else "%r3"
    run_ptx(
        f"""rem.u32 %r2, %r1, 3; add.u32 %r3, %r1, 3; mad.wide.u32 %rd5, %r2, 4, %rd2; shl.b32 %r4, %r2, 2;
        mov.b32 %r5, global_smem; add.u32 %r4, %r4, %r5;
        ld.global.b32 %r6, [%rd5]; st.shared.b32 [%r4], %r6;
        atom.acq_rel.gpu.{space}.{op} %r7, [{"%rd5" if space == "global" else "%r4"}], {extra};
        {"ld.shared.b32 %r8, [%r4]; st.global.b32 [%rd5], %r8;" if space == "shared" else ""}
        st.global.b32 [%rd10], %r7; ret;""",
        old,
        cells,
    )
    assert old.tolist() == want_old and cells.tolist() == want


def test_packed_atomics():
    for kind, dtype in (("noftz.f16x2", torch.float16), ("noftz.bf16x2", torch.bfloat16)):
        cells, add = torch.tensor([1.5, -2, 0.25, 8]).to(dtype), torch.arange(64).to(dtype)
        run_ptx(
            f"""rem.u32 %r2, %r1, 2; mad.wide.u32 %rd5, %r2, 4, %rd1; mad.wide.u32 %rd6, %r1, 4, %rd2;
            ld.global.b32 %r3, [%rd6]; red.global.add.{kind} [%rd5], %r3; ret;""",
            cells,
            add,
        )
        want = torch.tensor([1.5, -2, 0.25, 8]).to(dtype)
        for i in range(32):
            for half in range(2):
                want[i % 2 * 2 + half] += add[2 * i + half]
        assert torch.equal(cells, want)


def test_local_memory_and_signed_loads():
    out = np.zeros(64, np.uint32)
    run_ptx(
        """.local .align 4 .b8 depot[16];
        mov.b64 %rd5, depot; cvt.u32.u64 %r2, %rd5; add.u32 %r3, %r1, 7;
        st.local.v2.b32 [%r2+8], {%r1, %r3}; ld.local.b32 %r4, [%r2+12]; st.global.b32 [%rd10], %r4; ret;""",
        out,
    )
    assert out.tolist()[:32] == [i + 7 for i in range(32)]
    x = np.arange(-16, 16, dtype=np.int8)
    run_ptx(
        """cvt.u64.u32 %rd5, %r1; add.s64 %rd5, %rd5, %rd2; ld.global.s8 %r2, [%rd5]; st.global.b32 [%rd10], %r2;
        ld.global.u8 %r3, [%rd5]; st.global.b32 [%rd10+128], %r3; ret;""",
        out,
        x,
    )
    assert out[:32].view(np.int32).tolist() == x.tolist() and out[32:].tolist() == x.view(np.uint8).tolist()


def test_grid_order():
    out = np.zeros(12, np.uint32)
    launch(
        ptx_kernel("""mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %ctaid.z; mov.u32 %r5, %nctaid.x;
        mov.u32 %r6, %nctaid.y; mad.lo.u32 %r7, %r4, %r6, %r3; mad.lo.u32 %r7, %r7, %r5, %r2;
        mad.wide.u32 %rd5, %r7, 4, %rd1; mad.lo.u32 %r8, %r3, 10, %r2; mad.lo.u32 %r8, %r4, 100, %r8;
        st.global.b32 [%rd5], %r8; ret;"""),
        (3, 2, 2),
        [out],
        1,
        16,
    )
    assert out.tolist() == [x + 10 * y + 100 * z for z in range(2) for y in range(2) for x in range(3)]


CP_ASYNC = """
    shl.b32 %r2, %r1, 4; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;
    mad.wide.u32 %rd11, %r1, 16, %rd1; mad.wide.u32 %rd12, %r1, 16, %rd2;
    mov.b32 %r20, 7; st.shared.v4.b32 [%r4], {%r20, %r20, %r20, %r20};
    COPY
    cp.async.commit_group;
    WAIT
    ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r4]; st.global.v4.b32 [%rd12], {%r5, %r6, %r7, %r8}; ret;"""


@SCHEDULES
@pytest.mark.parametrize(
    "copy,keep",
    [
        ("cp.async.cg.shared.global [%r4], [%rd11], 16;", lambda i: 16),
        ("rem.u32 %r9, %r1, 17; cp.async.cg.shared.global [%r4], [%rd11], 0x10, %r9;", lambda i: i % 17),
        (
            "setp.lt.u32 %p1, %r1, 9; cp.async.cg.shared.global [%r4], [%rd11], 16, %p1;",
            lambda i: 0 if i < 9 else 16,
        ),
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 cp.async.cg.shared.global [%r4], [%rd11], 16;",
            lambda i: 16 if i < 9 else -1,
        ),
    ],
)
def test_cp_async(copy, keep, schedule):
    x = np.random.default_rng(0).integers(0, 256, (32, 16), dtype=np.uint8)
    want = np.full((32, 16), 0, np.uint8)
    for i in range(32):
        want[i, : max(keep(i), 0)] = x[i, : max(keep(i), 0)]
        if keep(i) < 0:
            want[i] = [7, 0, 0, 0] * 4
    out = np.zeros((32, 16), np.uint8)
    text = CP_ASYNC.replace("COPY", copy)
    # nothing is read past the source size: the array ends where lane 31's bytes end
    last = max(keep(31), 0)
    src = x.reshape(-1)[: 31 * 16 + last].copy() if keep(31) < 16 else x
    st = run_ptx(text.replace("WAIT", "cp.async.wait_group 0;"), src, out, schedule=schedule)
    assert (
        (out == want).all()
        and st.races == []
        and st.cp_async_bytes == sum(max(keep(i), 0) for i in range(32))
    )
    st = run_ptx(text.replace("WAIT", "cp.async.wait_group 1;"), src, out, schedule=schedule)
    assert (out.view(np.uint32) == 7).all() and {r.kind for r in st.races} == {"cp.async-read"}


def test_shared_memory_checks():
    out = np.zeros(32, np.uint32)
    head = "shl.b32 %r2, %r1, 2; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;"
    st = run_ptx(head + "ld.shared.b32 %r5, [%r4+64]; st.global.b32 [%rd10], %r5; ret;", out)
    assert st.uninit_reads == 32 and "ld.shared" in next(iter(st.uninit)) and np.isnan(out.view("f4")).all()
    st = run_ptx(
        head + "ld.shared.b32 %r5, [%r4+64]; st.global.b32 [%rd10], %r5; ret;", out, check_uninit=False
    )
    assert st.uninit_reads == 0
    with pytest.raises(MemoryFault, match="'shared'"):
        run_ptx(head + "st.shared.b32 [%r4+1000], %r1; ret;", out)
    # lanes of one store that disagree about a word are a race; writing the same value is not
    st = run_ptx(head + "st.shared.b32 [global_smem], %r1; ret;", out)
    assert st.races[0].kind == "write-write"
    assert run_ptx(head + "st.shared.b32 [global_smem], 5; ret;", out).races == []


@pytest.mark.parametrize("stride,extra", [(1, 0), (2, 1), (32, 31), (33, 0)])
def test_bank_conflicts(stride, extra):
    st = run_ptx(
        f"""mul.lo.u32 %r2, %r1, {4 * stride}; mov.b32 %r3, global_smem; add.u32 %r4, %r3, %r2;
        st.shared.b32 [%r4], %r1; ret;""",
        np.zeros(32, np.uint32),
        shared=8192,
    )
    assert st.shared_conflicts == extra


def test_counts():
    out = np.zeros(64, np.uint32)
    ptx = ptx_kernel("""mov.b32 %r2, 0;
        L: add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 10; @%p1 bra L;
        bar.sync 0; st.global.b32 [%rd10], %r2; ret;""")
    st = launch(ptx, (3, 2, 1), [out], 2, 16)
    assert (out == 10).all() and len(st.per_cta) == 6
    per_warp = 3 + 1 + 30 + 3  # head, mov, loop, tail
    assert st.instructions == 6 * 2 * per_warp and st.ops["add.u32"] == 120
    assert st.barriers == 6 and st.per_cta[5]["instructions"] == 2 * per_warp
    assert st.global_store_bytes == 6 * 256 and st.unique["arg0"] == (0, 256)
    assert st.cta_races == []  # all six programs store, but the same values
