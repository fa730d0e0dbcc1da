"""Warps that run in lockstep: registers, program counters, divergence and pending copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxrun.copies import Copy
from ptxrun.decoder import Decoder
from ptxrun.errors import BarrierError
from ptxrun.memory import ALL, Lanes
from ptxrun.operands import Pred
from ptxrun.parser import Instr

if TYPE_CHECKING:
    from ptxrun.machine import CTA, Run
    from ptxrun.memory import Access

NEVER = 1 << 30


class Group:
    """One warp, or in the lockstep schedule all warps of a CTA.

    Every instruction is decoded once into a closure over rows of the register banks; a row holds one
    register for all lanes. While all live lanes are at one block (`uniform`) the fast closures run,
    otherwise the slow ones under `mask`.
    """

    def __init__(self, run: Run, cta: CTA, warp0: int, nwarps: int, special: dict[str, int]) -> None:
        self.run, self.cta, self.warp0, self.nwarps = run, cta, warp0, nwarps
        self.kernel, self.n = run.kernel, 32 * nwarps
        rows = self.kernel.nregs.items()
        self.bank = {b: np.empty((k, self.n), bool if b == 1 else f"u{b // 8}") for b, k in rows}
        self.local = np.empty((self.n, -(-self.kernel.sizes["local"] // 8) * 8), np.uint8)
        tid = 32 * warp0 + np.arange(self.n)
        self.warp = tid // 32
        values = {**special, "%laneid": tid % 32, "%warpid": self.warp, "%tid.x": tid}
        self.special = {k: np.full(self.n, v, np.uint32) for k, v in values.items()}
        self.accesses: list[Access] = []
        decoder, blocks = Decoder(self), self.kernel.blocks
        code = [decoder.block(i, b) for i, b in enumerate(blocks)]
        self.fast, self.slow, self.terminators = zip(*code, strict=True)
        self.rank = np.array([*(b.rank for b in blocks), NEVER])  # the last: lanes that left
        self.by_rank = np.argsort(self.rank)

    def reset(self, ctaid: tuple[int, int, int]) -> None:
        """Get ready for a new CTA, with poisoned registers."""
        for axis, v in zip("xyz", ctaid, strict=True):
            self.special[f"%ctaid.{axis}"][:] = v
        for bank in self.bank.values():
            bank.fill(~bank.dtype.type(0))  # NaN in every float type
        self.local.fill(0xFF)
        self.live = np.ones(self.n, bool)
        self.mask: np.ndarray | None = None  # None: every lane is active
        self.uniform, self.pc, self.pcs = True, 0, np.zeros(self.n, np.int64)
        self.wait, self.waiting = np.zeros(self.nwarps, np.int64), False  # barrier + 1 a warp waits at
        self.done, self.ip, self.turns = False, 0, 0
        self.counts = [0] * len(self.kernel.blocks)  # warps that executed each block
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.n, np.int64)  # cp.async groups of each lane

    # -- control flow

    def ready(self) -> bool:
        return not self.done and not (self.waiting and not self.runnable().any())

    def runnable(self) -> np.ndarray:
        """Live lanes that do not wait at a barrier."""
        return self.live & (np.repeat(self.wait, 32) == 0)

    def live_warps(self) -> int:
        return int(self.live.reshape(-1, 32).any(1).sum())

    def step(self, budget: int | None = None) -> None:
        """Run one basic block, or at most `budget` closures of it."""
        if not self.ip:
            if self.uniform:
                self.current, self.code = self.pc, self.fast[self.pc]
                self.counts[self.pc] += self.nwarps if self.mask is None else self.live_warps()
            else:
                self.current, self.mask = self.select()
                self.code = self.slow[self.current]
                self.counts[self.current] += int(self.mask.reshape(-1, 32).any(1).sum())
        stop = len(self.code) if budget is None else self.ip + budget
        for f in self.code[self.ip : stop]:
            f()
        self.ip = stop if stop < len(self.code) else 0
        if not self.ip:
            self.terminators[self.current]()

    def select(self) -> tuple[int, np.ndarray]:
        """Diverged: each warp wants its lowest-ranked block. One of them and its lanes, rotating at times."""
        ranks = np.where(self.runnable(), self.rank[self.pcs], NEVER)
        best = ranks.reshape(-1, 32).min(1)
        wanted = np.unique(best[best < NEVER])
        self.turns += 1
        pick = wanted[self.turns // 16 % len(wanted) if self.turns % 16 == 0 else 0]
        return int(self.by_rank[pick]), (ranks == pick) & np.repeat(best == pick, 32)

    def goto(self, block: int) -> None:
        if self.uniform:
            self.pc = block
        else:
            self.pcs[self.mask] = block
            self.converge()

    def branch(self, p: np.ndarray, taken: int, other: int) -> None:
        if not self.uniform:
            self.pcs[self.mask] = np.where(p, taken, other)[self.mask]
            return self.converge()
        q = p if self.mask is None else p[self.mask]
        if q.all():
            self.pc = taken
        elif not q.any():
            self.pc = other
        else:
            self.uniform, self.pcs = False, np.where(p, taken, other)

    def converge(self) -> None:
        """Run all live lanes together again if they are at the same block."""
        pcs = self.pcs[self.live]
        if len(pcs) and not self.waiting and (pcs == pcs[0]).all():
            self.uniform, self.pc = True, int(pcs[0])
            self.mask = None if self.live.all() else self.live

    def exit(self, p: np.ndarray | None = None, other: int = 0) -> None:
        """Lanes that return (where p) leave; the rest go to block `other`."""
        active = self.executing()
        if self.uniform:
            self.uniform, self.pcs = False, np.full(self.n, other)
        else:
            self.pcs[active] = other
        self.live = self.live & ~(active if p is None else active & p)
        self.done = not self.live.any()
        self.converge()
        self.cta.settle()

    def barrier(self, ins: Instr, bar: int, count: int | None, following: int) -> None:
        """Wait at a barrier for all warps, or for `count` threads."""
        active = self.executing()
        warps = np.flatnonzero(active.reshape(-1, 32).any(1))
        if (active != self.live).reshape(-1, 32)[warps].any():
            aligned = ins.op == "bar" or "aligned" in ins.mods
            error = BarrierError if aligned else NotImplementedError
            raise error(f"warp reaches a barrier while diverged: {ins}")
        if count is None and self.uniform and len(self.cta.groups) == 1 and not self.cta.bars:
            self.pc = following  # everybody is here
            return self.cta.released()
        self.wait[warps], self.waiting = bar + 1, True
        self.goto(following)
        self.cta.arrive(bar, warps + self.warp0, count)

    def leave_barrier(self, bar: int) -> None:
        """The barrier has completed."""
        self.wait[self.wait == bar + 1] = 0
        self.waiting = bool(self.wait.any())
        if not self.uniform:
            self.converge()

    # -- lanes

    def executing(self) -> np.ndarray:
        """Lanes that are at the current instruction, as a mask."""
        return self.live if self.mask is None else self.mask

    def active(self, pred: Pred | None) -> Lanes:
        """Lanes that execute an instruction: ALL, or an array of lane numbers."""
        m = self.mask
        if pred is not None:
            p = ~pred[0] if pred[1] else pred[0]
            m = p if m is None else m & p
        return ALL if m is None or m.all() else np.flatnonzero(m)

    def warps(self) -> np.ndarray:
        """[warps, 32] lanes at the current instruction."""
        return self.executing().reshape(-1, 32)

    # -- cp.async: copies are queued per lane and land at the wait that covers them

    def commit(self, pred: Pred | None = None) -> None:
        self.committed[self.active(pred)] += 1

    def wait_copies(self, n: int, pred: Pred | None = None) -> None:
        """Land the copies of all but the last n groups of the lanes; n = -1: of uncommitted ones too."""
        lanes, keep = self.active(pred), []
        complete = np.zeros(self.n, np.int64)
        complete[lanes] = self.committed[lanes] - n  # groups below this number
        for c in self.copies:
            done = c.group < complete[c.lanes]
            if done.all():
                c.land(self.cta)
                continue
            if done.any():
                c.subset(done).land(self.cta)
                c = c.subset(~done)
            keep.append(c)
        self.copies = keep

    def abandon_copies(self) -> int:
        """At the end: forget the copies still under way, and say how many lanes' there are."""
        for c in self.copies:
            c.abandon()
        left, self.copies = sum(len(c.lanes) for c in self.copies), []
        return left
