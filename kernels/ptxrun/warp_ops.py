"""Instructions in which the lanes of a warp take part together: shfl, vote, redux, mma, ldmatrix."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np

from ptxrun.integers import INT
from ptxrun.memory import ALL, Access
from ptxrun.operands import Operands, Step, instruction
from ptxrun.parser import TYPES, Instr, unpack
from ptxrun.rounding import F16, F32, F64, I64, U32, U64, widen

MMA_SHAPES = {  # (type of C and D, type of A and B) -> shapes
    ("f32", "f16"): {"m16n8k8", "m16n8k16"},
    ("f32", "bf16"): {"m16n8k8", "m16n8k16"},
    ("f16", "f16"): {"m16n8k8", "m16n8k16"},
    ("f32", "tf32"): {"m16n8k4", "m16n8k8"},
    ("s32", "s8"): {"m16n8k16", "m16n8k32"},
    ("s32", "u8"): {"m16n8k16", "m16n8k32"},
    ("f64", "f64"): {"m8n8k4"},
}


@instruction("shfl", "sync up down bfly idx")
def shuffle(o: Operands, ins: Instr) -> Step:
    mode = next(m for m in ins.mods if m in ("up", "down", "bfly", "idx"))
    out, *valid = ins.args[0].split("|")
    a, b, c = (o.src(x, "u32") for x in ins.args[1:4])
    d, p = o.dst(out, "b32"), o.dst(valid[0], "pred") if valid else None
    lane, first = o.every % 32, o.every // 32 * 32

    def source() -> tuple[np.ndarray, np.ndarray]:
        step, clamp, segment = (x.astype(I64) for x in (b & U32(31), c & U32(31), c >> U32(8) & U32(31)))
        limit = lane & segment | clamp & ~segment
        j = {
            "up": lane - step,
            "down": lane + step,
            "bfly": lane ^ step,
            "idx": lane & segment | step & ~segment,
        }[mode]
        ok = j >= limit if mode == "up" else j <= limit
        return first + np.where(ok, j, lane), ok

    fixed = source() if o.is_constant(ins.args[2]) and o.is_constant(ins.args[3]) else None

    def run() -> None:
        j, ok = fixed or source()
        d[...] = a[j]
        if p is not None:
            p[...] = ok

    return run


@instruction("vote activemask", "sync ballot any all uni")
def vote(o: Operands, ins: Instr) -> Step:
    arg = ins.args[1] if ins.op == "vote" else "1"
    p, ballot = o.src(arg.lstrip("!"), "pred"), ins.op == "activemask" or "ballot" in ins.mods
    d = o.dst(ins.args[0], "b32" if ballot else "pred")

    def run() -> None:
        m, x = o.g.warps(), (~p if arg[0] == "!" else p).reshape(-1, 32)
        some, every = (x & m).any(1), (x | ~m).all(1)
        if ballot:
            v = ((x & m).astype(U64) << np.arange(32, dtype=U64)).sum(1)
        elif "uni" in ins.mods:
            v = every | ~some
        else:
            v = some if "any" in ins.mods else every
        d[...] = np.repeat(v, 32)

    return run


@instruction("redux", "sync add min max and or xor", kind="int")
def reduce(o: Operands, ins: Instr) -> Step:
    op = next(m for m in ins.mods if m in INT)
    a, d = o.src(ins.args[1], ins.t), o.dst(ins.args[0], ins.t)
    info = np.iinfo(a.dtype)
    identity = {"min": info.max, "max": info.min, "and": -1 if info.min else info.max}.get(op, 0)
    unit = a.dtype.type(identity)

    def run() -> None:
        x = np.where(o.g.warps(), a.reshape(-1, 32), unit)
        d[...] = np.repeat(INT[op].reduce(x, axis=1, dtype=a.dtype), 32)

    return run


@instruction("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared", own_mask=True)
def load_matrix(o: Operands, ins: Instr) -> Step:
    g, outs = o.g, [o.dst(x, "b32") for x in unpack(ins.args[0])]
    num, addr = len(outs), o.address(ins.args[1])
    if not {"m8n8", f"x{num}", "b16"} <= set(ins.mods):
        raise NotImplementedError(f"form not covered: {ins}")
    giver = (o.every % 32 < 8 * num, False)  # lanes whose address is used: one for each row of 16 bytes
    at = Access(g, ins, "shared", "ld.shared", 4, 4)

    def run() -> None:
        lanes = g.active(giver)
        warps = ALL if g.mask is None else np.flatnonzero(g.warps().any(1))
        for span in at.spans(addr()[lanes], lanes):
            span.mem.shadow.read(span.touch)
            rows = span.mem.views[4].take(span.cells)  # [warps * matrices * 8, 4]
            if "trans" in ins.mods:
                rows = np.ascontiguousarray(rows.view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)).view(U32)
            got = rows.reshape(-1, num, 32)
            for k, d in enumerate(outs):
                d.reshape(-1, 32)[warps] = got[:, k]

    return run


# mma fragments: lane = 4 * g + t. Register r of A holds row g + 8 * (r & 1) and, with E elements to a
# register, columns E * t + e + 4 * E * (r >> 1); B and C likewise. A fragment is gathered by flat indices
# into the register bank seen as elements.


def count_fusible(body: Sequence[Instr]) -> int:
    """How many leading instructions can run as one: mmas of one kind whose A and B do not come from them.

    An accumulator may come from an earlier one, as in a sum over K.
    """
    results: set[tuple[str, ...]] = set()
    written: set[str] = set()
    count = 0
    for ins in body:
        if (ins.op, ins.mods, ins.pred, len(ins.args)) != ("mma", body[0].mods, None, 4):
            break
        d, a, b, c = (tuple(unpack(x)) for x in ins.args)
        if written & {*a, *b} or any(written & {*x} and x not in results for x in (c, d)):
            break
        results.add(d)
        written.update(d)
        count += 1
    return max(count, 1)


@instruction("mma", "sync aligned row col satfinite m8n8k4 m16n8k4 m16n8k8 m16n8k16 m16n8k32")
def single_mma(o: Operands, ins: Instr) -> Step:
    return mma(o, [ins])


def mma(o: Operands, group: Sequence[Instr]) -> Step:
    """Run fusible mmas: all products at once, then the sums in order, each rounded to the type of D."""
    ins, g = group[0], o.g
    td, ta, tb, tc = ins.types
    shape = next(m for m in ins.mods if m[0] == "m")
    saturate = "satfinite" in ins.mods
    if (
        (td, ta) != (tc, tb)
        or shape not in MMA_SHAPES.get((td, ta), ())
        or [m for m in ins.mods if m in ("row", "col")] != ["row", "col"]
        or (saturate and td != "s32")
    ):
        raise NotImplementedError(f"form not covered: {ins}")
    M, N, K = (int(x) for x in re.findall(r"\d+", shape))
    size = 64 if td == "f64" else 32
    bank = g.bank[size]
    a_at, b_at, cd_at = fragments(M, K, size // TYPES[ta][1], size // TYPES[td][1], o.n)
    args = [[tuple(unpack(x)) for x in i.args] for i in group]
    registers = [[[o.kernel.regs[r] for r in arg[k]] for arg in args] for k in range(4)]
    if any(bits != size for operand in registers for vector in operand for bits, _ in vector):
        raise NotImplementedError(f"form not covered: {ins}")
    rows = [np.array([[row for _, row in vector] for vector in operand]) for operand in registers]
    o.written += [bank[r] for r in rows[0].ravel()]
    d_idx, a_idx, b_idx, c_idx = (
        at.index(r, o.n) for at, r in zip((cd_at, a_at, b_at, cd_at), rows, strict=True)
    )
    # level 0 adds C as it is in the registers, level k the result of an instruction of level k - 1
    latest: dict[tuple[str, ...], int] = {}
    level, previous = [0] * len(group), [0] * len(group)
    for i, (d, _, _, c) in enumerate(args):
        if c in latest:
            previous[i], level[i] = latest[c], level[latest[c]] + 1
        latest[d] = i
    last = sorted(latest.values())
    levels = [[i for i in range(len(group)) if level[i] == k] for k in range(1, max(level) + 1)]
    sums = [(np.array(at), np.array([previous[i] for i in at])) for at in levels]
    start = np.flatnonzero(np.array(level) == 0)
    c_idx, d_idx = c_idx[start], d_idx[last]
    operands = bank.reshape(-1).view(TYPES[ta][0])
    results = bank.reshape(-1).view(TYPES[td][0])
    numbers = partial(as_numbers, t=ta)

    def rounded(x: np.ndarray) -> np.ndarray:
        if td == "f16":
            return x.astype(F16).astype(F32)
        if td == "s32":
            return np.clip(x, -(1 << 31), (1 << 31) - 1) if saturate else x.astype(np.int32).astype(I64)
        return x

    def run() -> None:
        acc = np.matmul(numbers(operands.take(a_idx)), numbers(operands.take(b_idx)))  # [mma, warp, M, N]
        if td == "s32":
            acc = acc.astype(I64)  # exact so far: less than 2^24
        acc[start] = rounded(acc[start] + results.take(c_idx))
        for at, before in sums:
            acc[at] = rounded(acc[at] + acc[before])
        results[d_idx] = acc[last]
        g.cta.counts["mma flops"] += 2 * M * N * K * len(group) * int(g.warps().any(1).sum())

    return run


class Fragment:
    """Where the elements of a matrix are: [warp, row, column] -> register, lane, element of the register."""

    def __init__(
        self, register: np.ndarray, lane: np.ndarray, element: np.ndarray, per_register: int
    ) -> None:
        self.register, self.lane, self.element, self.per_register = register, lane, element, per_register

    def index(self, rows: np.ndarray, n: int) -> np.ndarray:
        """[mmas, registers] rows of a bank -> [mmas, warps, row, column] flat indices of its elements."""
        return (rows[:, self.register] * n + self.lane) * self.per_register + self.element


@lru_cache
def fragments(M: int, K: int, E: int, Ec: int, n: int) -> tuple[Fragment, Fragment, Fragment]:
    """The fragments of A [M, K], B [K, 8], and C and D [M, 8], for n lanes."""
    w, row, col = np.arange(n // 32)[:, None, None], np.arange(M)[:, None], np.arange(8)
    k = np.arange(K)
    a = Fragment(
        k // (4 * E) * (M // 8) + row // 8 + 0 * w, 32 * w + 4 * (row % 8) + k % (4 * E) // E, k % E, E
    )
    kb = k[:, None]
    b = Fragment(kb // (4 * E) + 0 * (w + col), 32 * w + 4 * col + kb % (4 * E) // E, kb % E, E)
    pair = col % 2
    c = Fragment(row // 8 * (2 // Ec) + pair // Ec + 0 * w, 32 * w + 4 * (row % 8) + col // 2, pair % Ec, Ec)
    return a, b, c


def as_numbers(x: np.ndarray, t: str) -> np.ndarray:
    if t == "bf16":
        return widen(x)
    if t == "tf32":  # the hardware ignores the low 13 bits
        return (x & U32(0xFFFFE000)).view(F32)
    return x.astype(F64 if t == "f64" else F32, copy=False)
