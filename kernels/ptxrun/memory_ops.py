"""Loads, stores, atomics, cp.async, and what else touches memory or other warps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ptxrun.copies import Copy
from ptxrun.errors import MemoryFault, PtxError
from ptxrun.memory import ALL, Access, Lanes, Memory
from ptxrun.operands import Operands, Pred, Step, instruction
from ptxrun.parser import BFLOATS, FLOATS, TYPES, Instr, unpack
from ptxrun.rounding import I64, U32, to_bf16, widen

ORDERS = "weak volatile relaxed acquire release acq_rel cta gpu sys hints"
ATOM: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, b: b,
    "inc": lambda old, b: np.where(old >= b, 0, old + 1).astype(old.dtype),
    "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype),
}


def is_strong(ins: Instr) -> bool:
    """Accesses that may run beside others without being a race."""
    return not {"volatile", "relaxed", "acquire", "release"}.isdisjoint(ins.mods)


def synchroniser(o: Operands, ins: Instr) -> Callable[[np.ndarray, Lanes], None] | None:
    """Release/acquire of a few addresses orders this CTA against others (see races.Order).

    Triton also marks atomics on whole tiles acq_rel; those are taken for data, not for locks. At the scope of a CTA
    nothing is ordered with other CTAs (PTX ISA, memory consistency model).
    """
    acquire, release = (not {"acq_rel", m}.isdisjoint(ins.mods) for m in ("acquire", "release"))
    if ins.space != "global" or "cta" in ins.mods or not (acquire or release):
        return None

    def synchronise(a: np.ndarray, lanes: Lanes) -> None:
        a = np.unique(a)
        if len(a) <= 4:
            o.run.order.synchronise(o.g.cta, a.tolist(), o.g.warp[lanes].tolist(), acquire, release)

    return synchronise


@instruction("ld", f"{ORDERS} param shared global local const v2 v4 nc ca cg cs lu cv", own_mask=True)
def load(o: Operands, ins: Instr) -> Step:
    g, (dtype, bits), pred, addr = o.g, TYPES[ins.t], o.pred(ins), o.address(ins.args[1])
    outs = [o.dst(x, ins.t) for x in unpack(ins.args[0])]
    if len(outs) != ins.vec:
        raise ValueError("wrong number of registers")
    if ins.space == "param":
        return load_param(o, outs, addr, dtype, pred)
    if ins.space == "local":
        return access_local(o, ins, outs, addr, pred)
    strong = is_strong(ins)
    at, synchronise = Access(g, ins, ins.space, ins.klass, bits // 8, ins.vec), synchroniser(o, ins)

    def run() -> None:
        lanes = g.active(pred)
        a = addr()[lanes]
        if not a.size:
            return
        if synchronise:
            synchronise(a, lanes)
        for span in at.spans(a, lanes):
            span.mem.shadow.read(span.touch, strong)
            data = span.mem.views[at.width].take(span.cells).view(dtype)
            to = lanes if span.sel is ALL else o.every[lanes][span.sel]
            for i, d in enumerate(outs):
                d[to] = data[:, i]

    return run


def load_param(
    o: Operands,
    outs: list[np.ndarray],
    addr: Callable[[], np.ndarray],
    dtype: type[np.generic],
    pred: Pred | None,
) -> Step:
    part = np.arange(np.dtype(dtype).itemsize * len(outs))

    def run() -> None:
        lanes = o.g.active(pred)
        data = o.run.params.take(addr()[lanes].astype(I64)[:, None] + part, mode="clip").view(dtype)
        for i, d in enumerate(outs):
            d[lanes] = data[:, i]

    return run


def access_local(
    o: Operands, ins: Instr, regs: list[np.ndarray], addr: Callable[[], np.ndarray], pred: Pred | None
) -> Step:
    g, dtype = o.g, TYPES[ins.t][0]
    part = np.arange(np.dtype(dtype).itemsize * len(regs))

    def run() -> None:
        lanes = g.active(pred)
        off = addr()[lanes].astype(I64)
        if not off.size:
            return
        if off.min() < 0 or off.max() + len(part) > g.local.shape[1]:
            raise MemoryFault(f"local access out of bounds; {ins}")
        where = o.every[lanes][:, None], off[:, None] + part
        if ins.op == "st":
            g.local[where] = np.stack([r[lanes] for r in regs], 1).view(np.uint8)
            return
        data = np.ascontiguousarray(g.local[where]).view(dtype)
        for i, d in enumerate(regs):
            d[lanes] = data[:, i]

    return run


@instruction("st", f"{ORDERS} param shared global local v2 v4 cg cs wb wt", own_mask=True)
def store(o: Operands, ins: Instr) -> Step | None:
    if ins.space == "param":
        return None  # argument of a call; see `call`
    g, width, pred, addr = o.g, TYPES[ins.t][1] // 8, o.pred(ins), o.address(ins.args[0])
    regs = [o.src(x, f"b{8 * width}") for x in unpack(ins.args[1])]
    if len(regs) != ins.vec:
        raise ValueError("wrong number of registers")
    if ins.space == "local":
        return access_local(o, ins, regs, addr, pred)
    strong = is_strong(ins)
    at, synchronise = Access(g, ins, ins.space, ins.klass, width, ins.vec), synchroniser(o, ins)

    def run() -> None:
        lanes = g.active(pred)
        a = addr()[lanes]
        if not a.size:
            return
        if synchronise:
            synchronise(a, lanes)
        values = np.stack([r[lanes] for r in regs], 1)
        for span in at.spans(a, lanes, write=True):
            view, cells, data = span.mem.views[width], span.cells, values[span.sel]
            same = lambda view=view, cells=cells, data=data: view.take(cells) == data
            span.mem.shadow.write(span.touch, same, strong)
            view[cells] = data
            lost = ~same().all(1, keepdims=True)  # lanes of this very store disagree
            if lost.any():
                first = span.touch._replace(granules=span.touch.granules[:, :1])
                o.run.race("write-write", first, np.broadcast_to(first.stamp, lost.shape), lost)

    return run


@instruction("atom red", f"{ORDERS} shared global noftz cas {' '.join(ATOM)}", own_mask=True)
def atomic(o: Operands, ins: Instr) -> Step:
    g, (dtype, bits), returns = o.g, TYPES[ins.t], ins.op == "atom"
    op, raw = next(m for m in ins.mods if m in ATOM or m == "cas"), f"u{bits // 8}"
    if op in ("min", "max") and ins.t in FLOATS:
        raise NotImplementedError(f"form not covered: {ins}")
    d = o.dst(ins.args[0], f"b{bits}") if returns else None
    addr, values = o.address(ins.args[returns]), [o.src(x, f"b{bits}") for x in ins.args[1 + returns :]]
    if len(values) != 1 + (op == "cas"):
        raise ValueError("wrong number of operands")
    pred, at, synchronise = o.pred(ins), Access(g, ins, ins.space, ins.klass, bits // 8), synchroniser(o, ins)

    def apply(old: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        if op == "cas":
            return np.where(old == b, c[0], old)
        if ins.t in BFLOATS:
            return to_bf16(ATOM[op](widen(old.view(np.uint16)), widen(b.view(np.uint16)))).view(raw)
        return ATOM[op](old.view(dtype), b.view(dtype)).view(raw)

    def run() -> None:
        lanes = g.active(pred)
        a = addr()[lanes]
        if not a.size:
            return
        if synchronise:
            synchronise(a, lanes)
        args, old = [np.ascontiguousarray(x[lanes]) for x in values], np.empty(len(a), raw)
        for span in at.spans(a, lanes, write=True):
            span.mem.shadow.write(span.touch, strong=True)
            view, cell, todo = span.mem.views[bits // 8], np.zeros(len(a), I64), np.arange(len(a))[span.sel]
            cell[todo] = span.cells[:, 0]
            while todo.size:  # one lane per address each round, in lane order
                now = todo[np.unique(cell[todo], return_index=True)[1]]
                old[now] = view[cell[now]]
                view[cell[now]] = apply(old[now], *(x[now] for x in args))
                todo = np.setdiff1d(todo, now, assume_unique=True)
        if d is not None:
            d[lanes] = old

    return run


@instruction(
    "cp", "async ca cg shared global commit_group wait_group wait_all hints", kind="int", own_mask=True
)
def copy_async(o: Operands, ins: Instr) -> Step:
    g, pred = o.g, o.pred(ins)
    match ins.mods:
        case ["async", "commit_group"]:
            return partial(g.commit, pred)
        case ["async", "wait_group"]:
            return partial(g.wait_copies, int(ins.args[0], 0), pred)
        case ["async", "wait_all"]:
            return partial(g.wait_copies, -1, pred)
        case ["async", "ca" | "cg", "shared", "global", *_]:
            pass
        case _:
            raise NotImplementedError(f"form not covered: {ins}")
    to, frm, size = o.address(ins.args[0]), o.address(ins.args[1]), int(ins.args[2], 0)
    if size not in (4, 8, 16):
        raise ValueError("copies 4, 8 or 16 bytes")
    rest = ins.args[3:-1] if "L2::cache_hint" in ins.mods else ins.args[3:]
    ignore = bool(rest) and o.kernel.regs.get(rest[0], (0,))[0] == 1  # a predicate: ignore the source
    limit = o.src(rest[0], "pred" if ignore else "u32") if rest else None
    dest = Access(g, ins, "shared", "cp.async shared", 4, size // 4)
    sources = {size: Access(g, ins, "global", "cp.async", 4, size // 4)}

    def start(ids: np.ndarray, lanes: Lanes, n: int) -> None:
        """Begin the copies of lanes that read n bytes each; the rest of the destination becomes zero."""
        data, stamps = np.zeros((len(ids), size // 4), U32), dest.stamps[ids]
        (target,) = dest.spans(to()[ids], lanes)
        target.mem.shadow.check_write(target.touch)
        if n and n not in sources:
            sources[n] = Access(g, ins, "global", "cp.async", 1, n, align=size)

        def begin(sel: slice | np.ndarray, source: Memory | None, source_granules: np.ndarray) -> None:
            words, cells, group = target.cells[sel], target.touch.granules[sel], g.committed[ids[sel]]
            copy = Copy(source, ins, ids[sel], group, words, cells, source_granules, data[sel], stamps[sel])
            copy.begin(g.cta)
            g.copies.append(copy)

        if not n:
            return begin(ALL, None, ids)
        for span in sources[n].spans(frm()[ids], lanes):
            span.mem.shadow.check_read(span.touch)
            source_bytes = span.mem.views[sources[n].width].take(span.cells).view(np.uint8)
            data.view(np.uint8)[span.sel, :n] = source_bytes
            begin(span.sel, span.mem, span.touch.granules)

    def run() -> None:
        lanes = g.active(pred)
        ids = o.every[lanes]
        if not ids.size:
            return
        if limit is None:
            return start(ids, lanes, size)
        keep = np.where(limit[ids], 0, size) if ignore else limit[ids].astype(I64)
        if keep.max() > size:
            raise PtxError(f"cp.async source size above {size}; {ins}")
        if (keep == keep[0]).all():
            return start(ids, lanes, int(keep[0]))
        for n in np.unique(keep):
            part = ids[keep == n]
            start(part, part, int(n))

    return run


@instruction("bar barrier", "sync warp arrive aligned cta", own_mask=True)
def arrive(o: Operands, ins: Instr) -> Step | None:
    """bar.warp.sync (nothing to do) and bar.arrive; bar.sync ends a block, see Decoder.terminator."""
    if "warp" in ins.mods:
        return None
    if ins.pred:
        raise NotImplementedError(f"form not covered: {ins}")
    bar, count = (o.src(a, "u32") for a in ins.args)
    g = o.g
    return lambda: g.cta.arrive(int(bar[0]), np.flatnonzero(g.warps().any(1)) + g.warp0, int(count[0]))


@instruction("call", "uni", own_mask=True)
def call(o: Operands, ins: Instr) -> Step | None:
    """device_assert raises, device_print is dropped."""
    name, pred = next(a for a in ins.args if not a.startswith("(")), o.pred(ins)
    if name == "vprintf":
        return None
    if name != "__assertfail":
        raise NotImplementedError(f"calls are not covered: {ins}")
    tables = o.kernel.tables.items()
    texts = [bytes(v).split(b"\0")[0].decode() for k, v in tables if k.startswith("assertMessage")]

    def run() -> None:
        if len(o.every[o.g.active(pred)]):
            raise PtxError(f"device assertion failed in CTA {o.g.cta.id}: {' or '.join(texts)}; {ins}")

    return run
