"""Triton kernels end to end: results, counts, and broken kernels that must be noticed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ptxrun import MemoryFault, PtxError, Stats, compile_triton, launch, run_triton

SCHEDULES = pytest.mark.parametrize("schedule", ["lockstep", "random"])
MODES = pytest.mark.parametrize(("num_warps", "schedule"), [(4, "lockstep"), (8, "random")])


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def clean(stats: Stats) -> Stats:
    assert stats.races == [] and stats.cta_races == [] and stats.uninit_reads == 0, str(stats)
    return stats


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
    for _ in range(T):
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
def polled_barrier_kernel(X, Flag, Y, B: tl.constexpr, ACQUIRE: tl.constexpr):
    """The same, every thread reading the flag itself, so that no barrier is needed behind the wait."""
    p, n, i = tl.program_id(0), tl.num_programs(0), tl.arange(0, B)
    tl.store(X + p * B + i, i + p * B)
    tl.debug_barrier()
    tl.atomic_add(Flag, 1, sem="release")
    seen = 0
    while seen < n:
        seen = tl.inline_asm_elementwise(
            "ld." + ACQUIRE + ".gpu.global.s32 $0, [$1];",
            "=r,l",
            [Flag],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
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


# -- Triton kernels, end to end


@MODES
@pytest.mark.parametrize("n", [1, 1000, 1024])
def test_vector_add(n: int, num_warps: int, schedule: str) -> None:
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
    assert st.sectors_per_ideal == pytest.approx(2 if num_warps == 4 and n == 1000 else 1, abs=0.03)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(dtype: torch.dtype, num_warps: int, schedule: str) -> None:
    x = torch.randn(5, 700).to(dtype)
    y = torch.empty_like(x)
    clean(
        run_triton(softmax_kernel, (5,), x, y, 700, 700, BLOCK=1024, num_warps=num_warps, schedule=schedule)
    )
    torch.testing.assert_close(y, torch.softmax(x.float(), 1).to(dtype))


def matmul(M: int, N: int, K: int, dtype: torch.dtype, prec: str = "tf32", **kw: Any) -> tuple[Stats, float]:
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    c = torch.full((M, N), float("nan")).to(dtype)
    grid = (triton.cdiv(M, 64), triton.cdiv(N, 64))
    kw |= {"BM": 64, "BN": 64, "BK": 32, "PREC": prec}
    st = run_triton(matmul_kernel, grid, a, b, c, M, N, K, K, N, N, **kw)
    return st, (c.double() - a.double() @ b.double()).abs().max().item()


@MODES
@pytest.mark.parametrize(
    "dtype,prec,tol",
    [
        (torch.bfloat16, "tf32", 0.15),
        (torch.float16, "tf32", 0.02),
        (torch.float32, "tf32", 0.06),
        (torch.float32, "ieee", 5e-5),
    ],
)
@pytest.mark.parametrize("M,N,K", [(64, 64, 128), pytest.param(65, 33, 47, marks=pytest.mark.slow)])
def test_matmul(
    M: int, N: int, K: int, dtype: torch.dtype, prec: str, tol: float, num_warps: int, schedule: str
) -> None:
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


def test_tf32_operands_are_truncated() -> None:
    a, b, c = torch.randn(32, 64), torch.randn(64, 32), torch.zeros(32, 32)
    run_triton(dot_kernel, (1,), a, b, c, M=32, N=32, K=64, OUT=tl.float32)
    cut = [(x.view(torch.int32) & -8192).view(torch.float32).double() for x in (a, b)]
    torch.testing.assert_close(c.double(), cut[0] @ cut[1], rtol=0, atol=1e-5)
    assert (c.double() - a.double() @ b.double()).abs().max() > 1e-3


def test_matmul_notices_wrong_data() -> None:
    """The reference check above has to be able to fail: flip one bit of one mma operand."""
    a, b = torch.randn(64, 32).bfloat16(), torch.randn(32, 64).bfloat16()
    c = torch.zeros(64, 64).bfloat16()
    st = run_triton(matmul_kernel, (1, 1), a, b, c, 64, 64, 32, 32, 64, 64, BM=64, BN=64, BK=32, PREC="tf32")
    good = c.clone()
    swapped = re.sub(r"(mma[^{]*\{[^}]*\}, )\{ (%r\d+), (%r\d+),", r"\1{ \3, \2,", st.ptx, count=1)
    assert swapped != st.ptx
    launch(swapped, (1, 1, 1), [a, b, c, 64, 64, 32, 32, 64, 64], 4, st.metadata.shared)
    assert not torch.equal(c, good)


@MODES
@pytest.mark.parametrize("dtype,tol", [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_recurrent_dot(dtype: torch.dtype, tol: float, num_warps: int, schedule: str) -> None:
    h, w = torch.randn(16, 64).to(dtype), torch.randn(64, 64).to(dtype)
    y, ref = torch.empty_like(h), h
    clean(
        run_triton(recurrent_kernel, (1,), h, w, y, 12, BB=16, D=64, num_warps=num_warps, schedule=schedule)
    )
    for _ in range(12):
        ref = torch.sigmoid(ref.float() @ w.float()).to(dtype)
    assert (y.float() - ref.float()).abs().max() < tol


@MODES
def test_scratch_round_trip(num_warps: int, schedule: str) -> None:
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


@MODES
def test_atomics(num_warps: int, schedule: str) -> None:
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


def test_ticket_order() -> None:
    for seed in range(3):
        ticket, out = torch.zeros(1, dtype=torch.int32), torch.full((6,), -1, dtype=torch.int32)
        clean(run_triton(ticket_kernel, (6,), ticket, out, schedule="random", seed=seed))
        assert ticket.item() == 6 and sorted(out.tolist()) == list(range(6))


@SCHEDULES
def test_races_between_programs(schedule: str) -> None:
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
def test_programs_that_wait_for_each_other(schedule: str) -> None:
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
@pytest.mark.parametrize("order", ["acquire", "relaxed"])
def test_cooperative_launches(schedule: str, order: str) -> None:
    """All programs are there at once without being told so; what was not acquired may not be read."""
    x, y = torch.zeros(4 * 128, dtype=torch.int32), torch.zeros(4 * 128, dtype=torch.int32)
    flag = torch.zeros(1, dtype=torch.int32)
    st = run_triton(
        polled_barrier_kernel, (4,), x, flag, y, B=128, ACQUIRE=order, schedule=schedule,
        launch_cooperative_grid=True,
    )  # fmt: skip
    assert torch.equal(y, torch.arange(512, dtype=torch.int32).roll(-128)) and st.races == []
    assert {r.array for r in st.cta_races} == (set() if order == "acquire" else {"X"})


@SCHEDULES
def test_loops_and_branches(schedule: str) -> None:
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
def test_math(op: str, ref: Callable[[torch.Tensor], torch.Tensor]) -> None:
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


FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]


@pytest.mark.parametrize(
    ("a", "b"),
    [(a, b) for a in FLOATS for b in FLOATS if a != b]
    + [pair for t in INTEGERS for pair in ((torch.float32, t), (t, torch.float32))]
    + [(torch.int64, torch.bfloat16), (torch.float16, torch.int8), (torch.int8, torch.int64)],
)
def test_casts(a: torch.dtype, b: torch.dtype) -> None:
    low, high = (0, 120) if torch.uint8 in (a, b) else (-120, 120)
    x = (torch.rand(512, dtype=torch.float64) * (high - low) + low).to(a)
    y = torch.zeros(512, dtype=b)
    clean(run_triton(cast_kernel, (1,), x, y, BLOCK=512))
    assert torch.equal(y, x.to(b))


@pytest.mark.slow
@MODES
def test_scan_sort_argmax(num_warps: int, schedule: str) -> None:
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
def test_other_mma_types(dtype: torch.dtype, out: torch.dtype, tl_out: tl.dtype, tol: float) -> None:
    a, b = [
        torch.randint(-120, 120, s).to(dtype) if dtype == torch.int8 else torch.randn(s).to(dtype)
        for s in ((32, 64), (64, 32))
    ]
    c = torch.zeros(32, 32, dtype=out)
    st = clean(run_triton(dot_kernel, (1,), a, b, c, M=32, N=32, K=64, OUT=tl_out))
    assert (c.double() - a.double() @ b.double()).abs().max() <= tol
    assert st.mma_flops == 2 * 32 * 32 * 64


def test_coalescing_figure() -> None:
    x, y = torch.randn(128 * 8), torch.zeros(128)
    for stride, ratio in ((1, 1.0), (2, 1.5), (8, 4.5)):  # the store stays at 1: (ratio of loads + 1) / 2
        st = run_triton(strided_kernel, (1,), x, y, STRIDE=stride, BLOCK=128)
        assert torch.equal(y, x[::stride][:128])
        assert st.sectors_per_ideal == pytest.approx(ratio)
        assert any(v["touched"] == 16 * stride for v in st.access.values())


def test_arguments() -> None:
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


def test_out_of_bounds_and_misaligned() -> None:
    x = torch.randn(256)
    with pytest.raises(MemoryFault, match=r"offset 400 of 'Z' \(400 bytes\)"):
        run_triton(add_kernel, (1,), x, x, torch.zeros(100), 101, BLOCK=256)
    with pytest.raises(MemoryFault, match="'Y'"):
        run_triton(add_kernel, (1,), x, torch.randn(200), torch.zeros(256), 256, BLOCK=256)
    sig = {"X": "*fp32", "Y": "*fp32", "Z": "*fp32", "n": "i32"}
    attrs = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    ptx, meta = compile_triton(add_kernel, sig, {"BLOCK": 512}, attrs)
    buf = torch.randn(1040)
    args: list[Any] = [buf[0:512], buf[512:1024], torch.zeros(512), 512]
    launch(ptx, (1, 1, 1), args, 4, meta.shared)
    assert torch.equal(args[2], args[0] + args[1])
    with pytest.raises(MemoryFault, match="misaligned"):  # promised 16-byte alignment, not kept
        launch(ptx, (1, 1, 1), [buf[1:513], *args[1:]], 4, meta.shared)


def test_device_assert() -> None:
    x = torch.rand(128) + 1
    run_triton(assert_kernel, (1,), x, BLOCK=128, debug=True)
    x[77] = -1
    with pytest.raises(PtxError, match="must be positive"):
        run_triton(assert_kernel, (1,), x, BLOCK=128, debug=True)


# -- broken kernels must be noticed


def pipelined() -> tuple[Stats, torch.Tensor, list[Any]]:
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
def test_missing_cp_async_wait(schedule: str) -> None:
    st, c, args = pipelined()
    good = c.clone()
    weak = re.sub(r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 9;", st.ptx)
    bad = launch(weak, (1, 1, 1), args, 4, st.metadata.shared, schedule=schedule)
    assert not torch.equal(c, good) and "cp.async-read" in {r.kind for r in bad.races}
    assert bad.uninit_reads > 0 and bad.total["cp.async never waited for"] > 0


@SCHEDULES
def test_every_missing_barrier_that_matters(schedule: str) -> None:
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
