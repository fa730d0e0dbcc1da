"""Instructions -> closures over the registers of one group."""

from __future__ import annotations

from functools import partial

import numpy as np

# the modules besides warp_ops are imported for the instructions that they register
from ptxrun import floats, integers, memory_ops, warp_ops  # noqa: F401
from ptxrun.errors import BarrierError, PtxError
from ptxrun.operands import INSTRUCTIONS, Operands, Pred, Step, check_modifiers
from ptxrun.parser import Block, Instr

NO_EFFECT = {
    "membar",
    "fence",
    "nanosleep",
    "prefetch",
    "prefetchu",
    "createpolicy",
    "discard",
    "applypriority",
}
TERMINATOR_MODS = frozenset({"uni", "sync", "aligned", "cta"})


class Decoder(Operands):
    """Decodes for one group. A step may assume that every live lane is active unless it is a slow one."""

    def block(self, i: int, b: Block) -> tuple[list[Step], list[Step], Step]:
        """-> steps for when all live lanes are active, steps under the group's mask, terminator."""
        body = self.kernel.instrs[b.start : b.end]
        last = body.pop() if body[-1].ends else None
        fast: list[Step] = []
        slow: list[Step] = []
        while body:
            count = warp_ops.count_fusible(body)
            pairs = [self.decode(ins) for ins in body[:count]]
            slow += [s for _, s in pairs if s]
            fast += [warp_ops.mma(self, body[:count])] if count > 1 else [f for f, _ in pairs if f]
            del body[:count]
        return fast, slow, self.terminator(last, i + 1)

    def decode(self, ins: Instr) -> tuple[Step | None, Step | None]:
        """-> (fast, slow) step of one instruction, None where there is nothing to do."""
        if ins.op in NO_EFFECT:
            return None, None
        entry = INSTRUCTIONS.get((ins.op, ins.kind))
        if entry is None:
            raise NotImplementedError(f"instruction not covered: {ins}")
        check_modifiers(ins, entry.mods)
        warp_wide = "sync" in ins.mods and ins.op not in ("bar", "barrier")
        if warp_wide and ins.pred:
            raise NotImplementedError(f"warp-wide instruction under a predicate: {ins}")
        self.written = []
        try:
            step = entry.decode(self, ins)
        except (KeyError, IndexError, ValueError, StopIteration, AttributeError, TypeError) as e:
            raise NotImplementedError(f"form not covered ({e!r}): {ins}") from e
        if step is None:
            return None, None
        slow, pred = step, self.pred(ins)
        if not entry.own_mask:
            slow = self.guard(step, self.written, pred)
        fast = slow if pred else step
        return fast, self.whole_warps(ins, slow) if warp_wide else slow

    def guard(self, step: Step, rows: list[np.ndarray], pred: Pred | None) -> Step:
        """Run a step, then restore what it wrote in the lanes that are not active."""
        g = self.g

        def run() -> None:
            on = g.mask if pred is None else ~pred[0] if pred[1] else pred[0].copy()
            if pred is not None and g.mask is not None:
                on &= g.mask
            keep = [r.copy() for r in rows]
            step()
            if on is not None:
                for r, k in zip(rows, keep, strict=True):
                    np.copyto(r, k, where=~on)

        return run

    def whole_warps(self, ins: Instr, step: Step) -> Step:
        """Insist on whole warps at an instruction in which the lanes of a warp take part together."""
        g = self.g

        def run() -> None:
            m = g.warps()
            if (m != g.live.reshape(-1, 32))[m.any(1)].any():
                raise BarrierError(f"warp-wide instruction reached by a diverged warp: {ins}")
            step()

        return run

    def terminator(self, ins: Instr | None, following: int) -> Step:
        """What ends a block; `following` is the block after it."""
        g = self.g
        if ins is None:
            return partial(g.goto, following) if following < len(self.kernel.blocks) else g.exit
        check_modifiers(ins, TERMINATOR_MODS)
        pred = self.pred(ins)
        p, negated = pred or (np.ones(self.n, bool), False)
        take = (lambda: ~p) if negated else (lambda: p)
        if ins.op == "bra":
            target = self.kernel.target(ins)
            return (lambda: g.branch(take(), target, following)) if pred else partial(g.goto, target)
        if ins.op in ("ret", "exit"):
            return (lambda: g.exit(take(), following)) if pred else g.exit
        if ins.op == "trap":
            return lambda: self.trap(ins, pred, following)
        if pred or not ins.args:
            raise NotImplementedError(f"form not covered: {ins}")
        bar, *count = [self.src(a, "u32") for a in ins.args]
        return lambda: g.barrier(ins, int(bar[0]), int(count[0][0]) if count else None, following)

    def trap(self, ins: Instr, pred: Pred | None, following: int) -> None:
        lanes = self.g.active(pred)
        if isinstance(lanes, slice) or lanes.size:
            raise PtxError(f"trap in CTA {self.g.cta.id}: {ins}")
        self.g.goto(following)
