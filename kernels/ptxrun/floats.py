"""Floating-point arithmetic and conversions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np

from ptxrun.operands import Operands, Step, instruction
from ptxrun.parser import BFLOATS, FLOATS, TYPES, Instr
from ptxrun.rounding import DIRECTED, F32, F64, U32, to_int

FLOAT: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.absolute,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "fma": lambda a, b, c: np.multiply(a, b, dtype=F64) + c,
    "mad": lambda a, b, c: np.multiply(a, b, dtype=F64) + c,
    "copysign": lambda a, b: np.copysign(b, a),
}
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction(" ".join(FLOAT), "rn rz rm rp ftz sat approx full NaN noftz", kind="float")
def arithmetic(o: Operands, ins: Instr) -> Step:
    t, mods = ins.t, set(ins.mods)
    to_nearest = not mods & set(DIRECTED)
    if t == "f64" and not to_nearest:
        raise NotImplementedError(f"modifier not covered: {ins}")
    f = {"min": np.minimum, "max": np.maximum}[ins.op] if "NaN" in mods else FLOAT[ins.op]
    plain = to_nearest and t not in BFLOATS and not mods & {"ftz", "sat"}
    if plain and isinstance(f, np.ufunc):
        return partial(f, *[o.src(a, t) for a in ins.args[1:]], out=o.dst(ins.args[0], t))
    get = [o.reader(a, t, "ftz" in mods) for a in ins.args[1:]]
    put = o.writer(ins.args[0], t, mods)
    if not to_nearest:  # compute in float64, round once
        return lambda: put(f(*[x().astype(F64) for x in get]))
    return lambda: put(f(*[x() for x in get]))


@instruction("cvt", "rn rz rm rp rna rni rzi rmi rpi ftz sat")
def convert(o: Operands, ins: Instr) -> Step:
    to, frm = ins.types[-2:]
    mods = set(ins.mods)
    if to in BFLOATS | {"f16", "f16x2"}:
        mods -= {"ftz"}  # concerns float32 only
    whole = next((ROUND[m] for m in ins.mods if m in ROUND), None)
    if to in ("f16x2", "bf16x2") and frm == "f32":  # the first operand is the upper half
        put, high, low = o.writer(ins.args[0], to, mods), o.src(ins.args[1], frm), o.src(ins.args[2], frm)
        return lambda: put(np.stack([low, high], 1).ravel())
    flush_input = "ftz" in ins.mods and frm == "f32"
    if to == "tf32":
        return to_tf32(o, ins)
    if to in FLOATS:
        put, get = o.writer(ins.args[0], to, mods), o.reader(ins.args[1], frm, flush_input)
        if whole:
            return lambda: put(whole(get()))
        if frm in FLOATS:
            return lambda: put(get())
        via = F32 if to == "f32" and not mods & set(DIRECTED) else F64
        return lambda: put(get().astype(via))
    return to_integer(o, ins, to, frm, o.reader(ins.args[1], frm, flush_input), whole or np.trunc)


def to_tf32(o: Operands, ins: Instr) -> Step:
    """Nearest, ties away from zero."""
    if "rna" not in ins.mods:
        raise NotImplementedError(f"form not covered: {ins}")
    a, d = o.src(ins.args[1], "b32"), o.dst(ins.args[0], "b32")

    def run() -> None:
        rounded = (a + U32(0x1000)) & U32(0xFFFFE000)
        d[...] = np.where(np.isnan(a.view(F32)), U32(0x7FFFFFFF), rounded)

    return run


def to_integer(
    o: Operands, ins: Instr, to: str, frm: str, get: Callable[[], np.ndarray], whole: np.ufunc
) -> Step:
    dtype, bits = cast(type[np.integer], TYPES[to][0]), TYPES[to][1]
    d = o.dst(ins.args[0], to)
    info = np.iinfo(dtype)
    if frm in FLOATS:
        # NaN gives 0, or the top bit alone if float64 or a 64-bit integer is involved
        nan = (info.min or 1 << bits - 1) if frm == "f64" or bits == 64 else 0

        def run() -> None:
            d[...] = to_int(whole(get()), dtype, nan)

    elif "sat" in ins.mods:

        def run() -> None:
            x = get()
            low, high = max(info.min, np.iinfo(x.dtype).min), min(info.max, np.iinfo(x.dtype).max)
            d[...] = np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)

    else:

        def run() -> None:
            d[...] = get().astype(dtype)

    return run
