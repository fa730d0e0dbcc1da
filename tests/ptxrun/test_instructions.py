"""Single PTX instructions against references on Python integers and NumPy."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from ptxrun import PtxError
from tests.ptxrun.snippets import run_ptx

SCHEDULES = pytest.mark.parametrize("schedule", ["lockstep", "random"])


def signed(v: int, bits: int = 32) -> int:
    v &= (1 << bits) - 1
    return v - (1 << bits) if v >> bits - 1 else v


def ref_prmt(a: int, b: int, s: int) -> int:
    bts, out = (a | b << 32).to_bytes(8, "little"), 0
    for i in range(4):
        n = s >> 4 * i & 15
        v = bts[n & 7]
        out |= ((255 if v & 128 else 0) if n & 8 else v) << 8 * i
    return out


def ref_bfe(a: int, b: int, c: int, bits: int, sign: bool) -> int:
    pos, n = b & 255, c & 255
    msb = bits - 1
    fill = 0 if not sign or n == 0 else a >> min(pos + n - 1, msb) & 1
    return sum(((a >> pos + i & 1) if i < n and pos + i <= msb else fill) << i for i in range(bits))


def ref_bfi(a: int, b: int, c: int, d: int) -> int:
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
    "mov.b64 %rd5, {%r2, %r3}; bfe.u64 %rd6, %rd5, 70, 8; cvt.u32.u64 %r5, %rd6": lambda a, b, c: 0,
    # a carry of lanes that the predicate leaves out stays
    "add.cc.u32 %r6, 1, -1; setp.lt.u32 %p1, %r1, 16; @%p1 add.cc.u32 %r6, 0, 0; addc.u32 %r5, 0, 0; "
    "setp.lt.u32 %p2, %r1, 16; @%p2 add.u32 %r5, %r5, 1": lambda a, b, c: 1,
    "{ .reg .b32 %r2; mov.b32 %r2, 5; add.u32 %r5, %r2, %r3; } add.u32 %r5, %r5, %r2": lambda a, b, c: (
        a + b + 5
    ),
}


@pytest.mark.parametrize("code", INTEGER)
def test_integer_instruction(code: str) -> None:
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
SPLIT_R6 = "mov.b32 {%rs1, %rs2}, %r6"
TO_BF16 = "cvt.rn.bf16.f32 %rs1, %r2; cvt.rn.bf16.f32 %rs2, %r3"


def f16(x: np.ndarray) -> np.ndarray:
    return x.astype("f2").astype("f4")


def bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.asarray(x, "f8")).to(torch.bfloat16).float().numpy()


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
    "cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r5, %rs1": lambda a, b: f16(a),
    "cvt.rz.f16.f32 %rs1, %r2; cvt.f32.f16 %r5, %rs1": lambda a, b: trunc16(a),
    # .ftz concerns float32 only, so the subnormal float16 numbers among these stay
    "cvt.rn.ftz.f16.f32 %rs1, %r2; cvt.ftz.f32.f16 %r5, %rs1": lambda a, b: np.where(
        np.abs(a) < 1.2e-38, np.copysign(np.float32(0), a), f16(a)
    ),
    "cvt.rn.bf16.f32 %rs1, %r2; cvt.f32.bf16 %r5, %rs1": lambda a, b: bf16(a),
    f"cvt.rn.bf16x2.f32 %r6, %r2, %r3; {SPLIT_R6}; cvt.f32.bf16 %r5, %rs2": lambda a, b: bf16(a),
    f"cvt.rn.f16x2.f32 %r6, %r2, %r3; {SPLIT_R6}; cvt.f32.f16 %r5, %rs1": lambda a, b: f16(b),
    f"{TO_BF16}; fma.rn.bf16 %rs3, %rs1, %rs2, %rs1; cvt.f32.bf16 %r5, %rs3": lambda a, b: bf16(
        bf16(a).astype("f8") * bf16(b) + bf16(a)
    ),
    # 1.0625^2 lies half-way between two numbers, and 2^-40 decides
    "mov.b16 %rs1, 0x3f88; mov.b16 %rs4, 0x2b80; fma.rn.bf16 %rs3, %rs1, %rs1, %rs4; "
    "cvt.f32.bf16 %r5, %rs3": lambda a, b: np.full(32, 1.1328125, np.float32),
    # 32.75 units of the smallest subnormal: rounded, not cut
    "mov.b16 %rs1, 0x3f83; mov.b16 %rs2, 0x0020; mov.b16 %rs4, 0; fma.rn.bf16 %rs3, %rs1, %rs2, %rs4; "
    "cvt.f32.bf16 %r5, %rs3": lambda a, b: np.full(32, 33 * 2.0**-133, np.float32),
    f"cvt.rn.f16x2.f32 %r6, %r2, %r3; add.f16x2 %r6, %r6, %r6; {SPLIT_R6}; cvt.f32.f16 %r5, %rs2": (
        lambda a, b: (a.astype("f2") + a.astype("f2")).astype("f4")
    ),
    "cvt.f64.f32 %rd5, %r2; cvt.rzi.s32.f64 %r5, %rd5": lambda a, b: saturate(
        np.trunc(a), -(2**31), 2**31 - 1, nan=1 << 31
    ),
    "cvt.rzi.s64.f32 %rd5, %r2; shr.s64 %rd5, %rd5, 32; cvt.u32.u64 %r5, %rd5": lambda a, b: np.array(
        [1 << 31 if math.isnan(v) else int(max(min(v, 2**63 - 1), -(2**63))) >> 32 & M32 for v in a.tolist()],
        np.uint32,
    ),
    "setp.ltu.f32 %p1, %r2, %r3; selp.b32 %r5, 1, 0, %p1": lambda a, b: (~(a >= b)).astype("u4"),
    "setp.ne.f32 %p1, %r2, %r3; selp.b32 %r5, 1, 0, %p1": lambda a, b: ((a < b) | (a > b)).astype("u4"),
    "setp.nan.f32 %p1, %r2, %r3; selp.b32 %r5, 1, 0, %p1": lambda a, b: (np.isnan(a) | np.isnan(b)).astype(
        "u4"
    ),
}


def saturate(x: np.ndarray, low: int, high: int, nan: int = 0) -> np.ndarray:
    values = [nan if math.isnan(v) else int(min(max(v, low), high)) & M32 for v in x.tolist()]
    return np.array(values, np.uint32)


def trunc32(x: np.ndarray) -> np.ndarray:
    y = x.astype("f4")
    return np.where(np.abs(y.astype("f8")) > np.abs(x), np.nextafter(y, np.float32(0)), y)


def trunc16(x: np.ndarray) -> np.ndarray:
    y = x.astype("f2")
    return np.where(np.abs(y.astype("f4")) > np.abs(x), np.nextafter(y, np.float16(0)), y).astype("f4")


@pytest.mark.parametrize("code", FLOAT)
def test_float_instruction(code: str) -> None:
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


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"line \d+: frobnicate\.b32"):
        run_ptx("frobnicate.b32 %r2, %r3; ret;", np.zeros(4, np.float32))
    for code in (
        "mul.lo.s128 %r2, %r3, %r4",
        "min.xorsign.abs.f32 %r2, %r3, %r4",
        "add.sat.s32 %r2, %r3, %r4",
        "fma.rn.relu.f16 %rs1, %rs2, %rs3, %rs4",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r2}, {%r3}",
        "cvt.rn.satfinite.f16.f32 %rs1, %r2",
        "ld.shared::cluster.b32 %r2, [%r3]",
        "cvt.rn.f16.s32.wide %rs1, %r2",
        "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r3]",
        "ld.global.v2.b32 %r2, [%rd1]",
        "mov.b32 %r2, %rs1",
        "add.f32 %r2, %r3, 0d3FF0000000000000",
    ):
        with pytest.raises(NotImplementedError, match=re.escape(code)):
            run_ptx(code + "; ret;", np.zeros(4, np.float32))


@SCHEDULES
def test_shuffles_votes_redux(schedule: str) -> None:
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
def test_atomic_instruction(op: str, space: str) -> None:
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


def test_packed_atomics() -> None:
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


def test_local_memory_and_signed_loads() -> None:
    out = np.zeros(64, np.uint32)
    run_ptx(
        """.local .align 4 .b8 depot[16];
        mov.b64 %rd5, depot; cvt.u32.u64 %r2, %rd5; add.u32 %r3, %r1, 7;
        st.local.v2.b32 [%r2+8], {%r1, %r3}; ld.local.b32 %r4, [%r2+12]; st.global.b32 [%rd10], %r4; ret;""",
        out,
    )
    assert out.tolist()[:32] == [i + 7 for i in range(32)]
    run_ptx(
        """.local .align 4 .b8 depot[16]; mov.b64 %rd5, depot; ld.local.b32 %r4, [%rd5];
        st.global.b32 [%rd10], %r4; ret;""",
        out,
    )
    assert (out[:32] == M32).all()  # poisoned
    x = np.arange(-16, 16, dtype=np.int8)
    run_ptx(
        """cvt.u64.u32 %rd5, %r1; add.s64 %rd5, %rd5, %rd2; ld.global.s8 %r2, [%rd5]; st.global.b32 [%rd10], %r2;
        ld.global.u8 %r3, [%rd5]; st.global.b32 [%rd10+128], %r3; ret;""",
        out,
        x,
    )
    assert out[:32].view(np.int32).tolist() == x.tolist() and out[32:].tolist() == x.view(np.uint8).tolist()


def lanes_of_mma(m: np.ndarray) -> np.ndarray:
    """A [16, 8] float16 matrix as the two registers of each lane: rows lane / 4 and lane / 4 + 8."""
    pairs = np.ascontiguousarray(m.astype(np.float16)).view(np.uint32)  # [16, 4]
    return np.stack([pairs[:8].ravel(), pairs[8:].ravel()], 1)


def test_mma_that_feed_each_other() -> None:
    """Accumulators passed on (and each sum rounded), their halves swapped, one as operand A, one overwritten."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-64, 65, (16, 8)) / 8, rng.integers(-64, 65, (8, 8)) / 8  # exact sums of products
    b_lanes = np.ascontiguousarray(b.T.astype(np.float16)).view(np.uint32).ravel()  # column lane / 4
    x = np.concatenate([lanes_of_mma(a), b_lanes[:, None]], 1).astype(np.uint32)
    out = np.zeros((32, 8), np.uint32)
    mma = "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16"
    run_ptx(
        f"""mad.wide.u32 %rd5, %r1, 12, %rd1; mad.wide.u32 %rd6, %r1, 32, %rd2;
        ld.global.b32 %r2, [%rd5]; ld.global.b32 %r3, [%rd5+4]; ld.global.b32 %r4, [%rd5+8];
        mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r9, 0; mov.b32 %r10, 0;
        {mma} {{%r5, %r6}}, {{%r2, %r3}}, {{%r4}}, {{%r5, %r6}};
        {mma} {{%r7, %r8}}, {{%r2, %r3}}, {{%r4}}, {{%r5, %r6}};
        {mma} {{%r5, %r6}}, {{%r2, %r3}}, {{%r4}}, {{%r7, %r8}};
        {mma} {{%r11, %r12}}, {{%r2, %r3}}, {{%r4}}, {{%r6, %r5}};
        {mma} {{%r9, %r10}}, {{%r7, %r8}}, {{%r4}}, {{%r9, %r10}};
        st.global.v2.b32 [%rd6], {{%r5, %r6}}; st.global.v2.b32 [%rd6+8], {{%r7, %r8}};
        st.global.v2.b32 [%rd6+16], {{%r9, %r10}}; st.global.v2.b32 [%rd6+24], {{%r11, %r12}}; ret;""",
        x,
        out,
    )
    once = (a @ b).astype(np.float16)
    twice = (a @ b + once).astype(np.float16)
    thrice = (a @ b + twice).astype(np.float16)
    swapped = (a @ b + np.roll(thrice, 8, 0)).astype(np.float16)
    assert (thrice != 3 * (a @ b)).any()
    want = [lanes_of_mma(m) for m in (thrice, twice, swapped)]
    assert (out[:, [0, 1, 2, 3, 6, 7]] == np.concatenate(want, 1)).all()
    # sums of 8 products below 2^13, which float32 does not hold exactly, and one float16 rounding
    product = twice.astype(np.float64) @ b
    np.testing.assert_allclose(
        out[:, 4:6].copy().view("f2"), lanes_of_mma(product).view("f2"), rtol=2**-10, atol=2**-5
    )


@pytest.mark.parametrize("saturate", [True, False])
def test_integer_mma_overflow(saturate: bool) -> None:
    out = np.zeros(32, np.int32)
    ones, accumulators = "{%r2, %r2}, {%r2}", "{%r3, %r3, %r3, %r3}"
    run_ptx(
        f"""mov.b32 %r2, 0x01010101; mov.b32 %r3, 0x7ffffff8;
        mma.sync.aligned.m16n8k16.row.col{".satfinite" * saturate}.s32.s8.s8.s32 {{%r5, %r6, %r7, %r8}},
            {ones}, {accumulators};
        st.global.b32 [%rd10], %r5; ret;""",
        out,
    )
    assert (out == (2**31 - 1 if saturate else 2**31 - 8 + 16 - 2**32)).all()


def test_calls_under_a_predicate() -> None:
    body = ".reg .pred %q; setp.gt.u32 %q, %r1, {last}; @%q call.uni __assertfail, (x); ret;"
    run_ptx(body.format(last=31), np.zeros(4, np.uint32))
    with pytest.raises(PtxError, match="assertion"):
        run_ptx(body.format(last=30), np.zeros(4, np.uint32))
