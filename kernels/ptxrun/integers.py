"""Integer arithmetic, bit operations, comparison, selection and moves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ptxrun.operands import Operands, Step, instruction
from ptxrun.parser import BFLOATS, FLOATS, TYPES, Instr, unpack
from ptxrun.rounding import I64, U32, U64, mul_high

INT: dict[str, np.ufunc] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.absolute,
}
COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
COMPARE_FLOATS: dict[str, Callable[..., np.ndarray]] = {
    **COMPARE,
    "ne": lambda a, b: (a < b) | (a > b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@instruction("add sub min max and or xor not neg abs", "cc", kind="int")
def arithmetic(o: Operands, ins: Instr) -> Step:
    if "cc" in ins.mods:
        return with_carry(o, ins)
    f = np.logical_not if (ins.op, ins.t) == ("not", "pred") else INT[ins.op]
    return partial(f, *[o.src(a, ins.t) for a in ins.args[1:]], out=o.dst(ins.args[0], ins.t))


@instruction("mul mad", "lo hi wide cc", kind="int")
def multiply(o: Operands, ins: Instr) -> Step:
    if "cc" in ins.mods:
        return with_carry(o, ins)
    mul, out = product(ins)
    args = [o.src(a, out if i == 2 else ins.t) for i, a in enumerate(ins.args[1:])]
    d = o.dst(ins.args[0], out)
    if ins.op == "mul" and "hi" not in ins.mods:
        return partial(mul, *args, out=d)

    def run() -> None:
        x = mul(*args[:2])
        d[...] = x + args[2] if ins.op == "mad" else x

    return run


def product(ins: Instr) -> tuple[Callable[..., np.ndarray], str]:
    """The function and the type of its result, for .wide, .hi and .lo."""
    t, bits = ins.t, TYPES[ins.t][1]
    wide = f"{t[0]}{2 * bits}"
    if "wide" in ins.mods:
        return partial(np.multiply, dtype=TYPES[wide][0]), wide
    if "hi" not in ins.mods:
        return np.multiply, t
    if bits == 64:
        return mul_high, t
    return lambda a, b: (np.multiply(a, b, dtype=TYPES[wide][0]) >> bits).astype(a.dtype), t


@instruction("addc subc madc", "lo hi cc", kind="int")
def with_carry(o: Operands, ins: Instr) -> Step:
    """32-bit add, sub and mad with carry in (addc, subc, madc) and carry out (.cc)."""
    if TYPES[ins.t][1] != 32:
        raise NotImplementedError(f"form not covered: {ins}")
    xs, d = [o.src(a, "u32") for a in ins.args[1:]], o.dst(ins.args[0], "u32")
    op, carry, low = ins.op, o.carry, U64(0xFFFFFFFF)
    if "cc" in ins.mods:
        o.written.append(carry)

    def run() -> None:
        v = [x.astype(U64) for x in xs]
        if op.startswith("mad"):
            p = v[0] * v[1]
            s = (p >> U64(32) if "hi" in ins.mods else p & low) + v[2]
        else:
            s = v[0] - v[1] if op.startswith("sub") else v[0] + v[1]
        if op.endswith("c"):
            s = s - carry if op == "subc" else s + carry
        d[...] = s & low
        if "cc" in ins.mods:
            carry[...] = (s >> U64(32)) & U64(1)

    return run


@instruction("shl shr", kind="int")
def shift(o: Operands, ins: Instr) -> Step:
    """Counts beyond the width act like the width (or width - 1 with sign)."""
    f, t, bits = np.left_shift if ins.op == "shl" else np.right_shift, ins.t, TYPES[ins.t][1]
    a, n, d = o.src(ins.args[1], t), o.src(ins.args[2], "u32"), o.dst(ins.args[0], t)
    if o.is_constant(ins.args[2]):
        return partial(f, a, np.minimum(n, U32(bits)).astype(a.dtype), d)
    return lambda: f(a, np.minimum(n, U32(bits)).astype(a.dtype), d)


# -- plain functions: arrays of the operand types given -> the result, cut to the type of the destination


def function(op: str, types: str, mods: str = "") -> Callable[[Callable[..., np.ndarray]], Callable]:
    """Register an instruction that is a function of (ins, operands); 't' stands for its type."""

    def register(f: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        @instruction(op, mods, kind="int")
        def decode(o: Operands, ins: Instr) -> Step:
            want = [ins.t if t == "t" else t for t in types.split()]
            args = [o.src(a, t) for a, t in zip(ins.args[1:], want[1:], strict=True)]
            d = o.dst(ins.args[0], want[0])

            def run() -> None:
                d[...] = f(ins, *args)

            return run

        return f

    return register


@function("div", "t t t")
def divide(ins: Instr, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    one, zero = a.dtype.type(1), a.dtype.type(0)
    q = np.where(b == 0, zero, a // np.where(b == 0, one, b))
    q = q + ((q * b != a) & ((a < 0) != (b < 0)))  # floor -> truncation
    return np.where(b == 0, ~zero, q)


@function("rem", "t t t")
def remainder(ins: Instr, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b == 0, a, a - divide(ins, a, b) * b)


@function("shf", "b32 b32 b32 b32", "l r wrap clamp")
def funnel_shift(ins: Instr, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    n = (c & U32(31) if "wrap" in ins.mods else np.minimum(c, U32(32))).astype(U64)
    both = b.astype(U64) << U64(32) | a
    return (both << n) >> U64(32) if "l" in ins.mods else both >> n


@function("bfe", "t t u32 u32")
def bit_extract(ins: Instr, a: np.ndarray, pos: np.ndarray, n: np.ndarray) -> np.ndarray:
    wide = I64 if a.dtype.kind == "i" else U64
    pos, n = (pos & U32(255)).astype(wide), (n & U32(255)).astype(wide)
    x = np.right_shift(a.astype(wide), pos)  # from 64 on NumPy gives 0, or the sign
    up = np.where(n < 64, wide(64) - n, wide(0))
    return np.where(n == 0, wide(0), np.right_shift(np.left_shift(x, up), up))


@function("bfi", "t t t u32 u32")
def bit_insert(ins: Instr, a: np.ndarray, b: np.ndarray, pos: np.ndarray, n: np.ndarray) -> np.ndarray:
    pos, n = (np.minimum(x & U32(255), U32(64)).astype(U64) for x in (pos, n))
    hole = ((U64(1) << n) - U64(1)) << pos
    return b.astype(U64) & ~hole | (a.astype(U64) << pos) & hole


@function("lop3", "b32 b32 b32 b32 u32")
def logic3(ins: Instr, a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.zeros_like(a)
    for i in range(8):
        if table[0] >> U32(i) & U32(1):
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


@function("prmt", "b32 b32 b32 b32")
def permute_bytes(ins: Instr, a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both, out = b.astype(U64) << U64(32) | a, np.zeros_like(a)
    for i in range(4):
        s = selector >> U32(4 * i)
        byte = (both >> (U64(8) * (s & U32(7)))).astype(U32) & U32(255)
        out |= np.where(s & U32(8), (byte >> U32(7)) * U32(255), byte) << U32(8 * i)
    return out


@function("popc", "u32 t")
def population(ins: Instr, a: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a)


@function("bfind", "u32 t", "shiftamt")
def top_bit(ins: Instr, a: np.ndarray) -> np.ndarray:
    """Index of the highest set bit, -1 if none."""
    if a.dtype.kind == "i":
        a = np.where(a < 0, ~a, a).view(f"u{a.itemsize}")
    half = 4 * a.itemsize  # 32 bits and less are exact in float64, where frexp finds the exponent
    high, low = a >> a.dtype.type(half), a & a.dtype.type((1 << half) - 1)
    top = (
        np.where(high != 0, np.frexp(high.astype(np.float64))[1] + half, np.frexp(low.astype(np.float64))[1])
        - 1
    )
    return np.where(top < 0, -1, 8 * a.itemsize - 1 - top) if "shiftamt" in ins.mods else top


@function("clz", "u32 t")
def leading_zeros(ins: Instr, a: np.ndarray) -> np.ndarray:
    return 8 * a.itemsize - 1 - top_bit(ins, a)


@function("brev", "t t")
def reverse_bits(ins: Instr, a: np.ndarray) -> np.ndarray:
    b = np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(len(a), -1), axis=1, bitorder="little")
    return np.packbits(b[:, ::-1], axis=1, bitorder="little").view(a.dtype)[:, 0]


# -- comparison, selection, moves


@instruction("setp", " ".join(COMPARE_FLOATS) + " and or xor ftz")
def set_predicate(o: Operands, ins: Instr) -> Step:
    t, ftz = ins.t, "ftz" in ins.mods
    if t in ("f16x2", "bf16x2"):
        raise NotImplementedError(f"form not covered: {ins}")
    f = (COMPARE_FLOATS if t in FLOATS else COMPARE)[next(m for m in ins.mods if m in COMPARE_FLOATS)]
    join = next((INT[m] for m in ins.mods if m in ("and", "or", "xor")), None)
    outs = [o.dst(x, "pred") for x in ins.args[0].split("|")]
    if join is None and len(outs) == 1 and isinstance(f, np.ufunc) and t not in BFLOATS and not ftz:
        return partial(f, o.src(ins.args[1], t), o.src(ins.args[2], t), outs[0])
    a, b = (o.reader(x, t, ftz) for x in ins.args[1:3])
    extra = o.src(ins.args[3].lstrip("!") if join else "0", "pred")

    def run() -> None:
        p = f(a(), b())
        results = (p, ~p)[: len(outs)]
        if join:
            third = ~extra if ins.args[3][0] == "!" else extra
            results = tuple(join(x, third) for x in results)
        for d, x in zip(outs, results, strict=True):
            d[...] = x

    return run


@instruction("selp")
def select(o: Operands, ins: Instr) -> Step:
    a, b, d = o.src(ins.args[1], ins.t), o.src(ins.args[2], ins.t), o.dst(ins.args[0], ins.t)
    p = o.src(ins.args[3], "pred")

    def run() -> None:
        d[...] = np.where(p, a, b)

    return run


@instruction("mov cvta", "to shared global local const")
def move(o: Operands, ins: Instr) -> Step:
    """mov, and cvta: there is one address space for each kind of access."""
    to, frm, t = ins.args[0], ins.args[1], ins.t
    if "{" in to or "{" in frm:
        return split_or_join(o, to, frm, t)
    d = o.dst(to, t)
    if frm.startswith(("%clock", "%globaltimer")):

        def tick() -> None:
            o.run.clock += 1
            d[...] = o.run.clock

        return tick
    return partial(np.copyto, d, o.src(frm, t), casting="unsafe")


def split_or_join(o: Operands, to: str, frm: str, t: str) -> Step:
    """Between a register and a vector of narrower ones, low part first."""
    split = "{" in to
    parts = unpack(to if split else frm)
    bits = TYPES[t][1] // len(parts)
    whole = (o.src(frm, t) if split else o.dst(to, t)).view(f"u{bits // 8}").reshape(o.n, -1)
    pairs = []
    for i, p in enumerate(parts):
        if p != "_":
            pairs.append(
                (o.dst(p, f"b{bits}"), whole[:, i]) if split else (whole[:, i], o.src(p, f"b{bits}"))
            )

    def run() -> None:
        for d, s in pairs:
            d[...] = s

    return run if len(pairs) > 1 else partial(np.copyto, *pairs[0])
