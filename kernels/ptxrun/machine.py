"""A launch and its thread blocks: shared memory, barriers, and which warps run next."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ptxrun.errors import BarrierError, PtxError
from ptxrun.group import Group
from ptxrun.memory import Memory, Pattern
from ptxrun.parser import TYPES, Kernel
from ptxrun.races import CLOCK, CLOCK_MASK, PC_MASK, SEQ, WARP_BITS, WARP_MASK, Order, Touch, check_limits
from ptxrun.stats import Race, Stats

MAX_RACES = 100  # reported of each sort


class Run:
    """What outlives a CTA: the arguments, the statistics and the findings of one launch."""

    def __init__(self, kernel: Kernel, ctas: int, warps: int, check_uninit: bool, shared_bytes: int) -> None:
        check_limits(warps, len(kernel.instrs), ctas)
        self.kernel, self.check_uninit, self.shared_bytes = kernel, check_uninit, shared_bytes
        self.stats = Stats(per_cta=[Counter() for _ in range(ctas)])
        self.order = Order(ctas, warps)
        self.cta_of = [-1]  # sequence number -> CTA; stamps use 0 for never
        self.ctas: list[CTA] = []
        self.regions: dict[int, Memory] = {}
        self.symbols: dict[str, int] = {}  # addresses of parameters and global tables
        self.params = np.zeros(0, np.uint8)
        self.patterns: dict[object, dict[tuple[bytes, bytes], Pattern]] = {}
        self.clock = 0
        self.found: dict[tuple[object, ...], Race] = {}
        self.granule = {space: finest_access(kernel, space) for space in ("shared", "global")}

    @property
    def one_cta(self) -> bool:
        """Whether only one CTA has started so far."""
        return len(self.cta_of) == 2

    def copied_from(self, mem: Memory, granules: np.ndarray) -> np.ndarray:
        """Which of the granules a cp.async under way still reads."""
        busy = np.zeros(granules.shape, bool)
        for copy in (c for cta in self.ctas for g in cta.groups for c in g.copies):
            if copy.source is mem:
                busy |= np.isin(granules, copy.source_granules)
        return busy

    def race(self, kind: str, touch: Touch, old: np.ndarray | None, bad: np.ndarray) -> None:
        """Report the clash of an access with the stamps `old`, or with a copy under way, where `bad`."""
        cta, ins, mem = touch.cta, touch.ins, touch.mem
        where = tuple(np.argwhere(bad)[0])
        stamp, granule = (int(np.broadcast_to(x, bad.shape)[where]) for x in (touch.stamp, touch.granules))
        other, warp, first = cta.id, None, "a cp.async that has not been waited for"
        if old is not None:
            earlier = int(old[where])
            other, warp = self.cta_of[earlier >> SEQ], earlier & WARP_MASK
            first = str(self.kernel.instrs[earlier >> WARP_BITS & PC_MASK])
        found = self.stats.races if other == cta.id else self.stats.cta_races
        key = (kind, first, ins.pc, mem.name, other == cta.id)
        if key in self.found:
            self.found[key].count += int(bad.sum())
        elif len(found) < MAX_RACES:
            offset = granule * mem.granule - mem.lead
            warps, count = (warp, stamp & WARP_MASK), int(bad.sum())
            race = Race(kind, mem.name, offset, first, str(ins), (other, cta.id), warps, count)
            self.found[key] = race
            found.append(race)


def finest_access(kernel: Kernel, space: str) -> int:
    """Bytes of the narrowest element that is accessed in a memory, at most 4."""
    ops = ("ld", "st", "atom", "red")
    return min([4, *(TYPES[i.t][1] // 8 for i in kernel.instrs if i.op in ops and i.space == space)])


class CTA:
    """One thread block. The object is used for one CTA after another."""

    def __init__(self, run: Run, warps: int, special: dict[str, int], rng: random.Random | None) -> None:
        self.run, self.rng = run, rng
        run.ctas.append(self)
        raw = np.zeros(-(-max(run.shared_bytes, 16) // 16) * 16, np.uint8)
        self.smem = Memory("shared", raw, run.shared_bytes, run.granule["shared"], warps, shared=True)
        if rng is None:
            self.groups = [Group(run, self, 0, warps, special)]
        else:
            self.groups = [Group(run, self, w, 1, special) for w in range(warps)]

    def start(self, cta_id: int, ctaid: tuple[int, int, int]) -> None:
        """Begin the CTA of linear index `cta_id` with everything poisoned."""
        self.id, self.seq, self.clock, self.steps = cta_id, len(self.run.cta_of), 0, 0
        self.run.cta_of.append(cta_id)
        self.counts = self.run.stats.per_cta[cta_id]
        self.bars: dict[int, tuple[set[int], int | None]] = {}  # barrier -> warps there, threads expected
        self.tick()
        self.barrier = self.now  # when all warps last met
        self.smem.views[1].fill(0xFF)  # NaN in every float type
        self.smem.shadow.clear()
        for g in self.groups:
            g.reset(ctaid)

    def tick(self) -> None:
        if self.clock == CLOCK_MASK:
            raise PtxError(f"CTA {self.id} passed more than {CLOCK_MASK} barriers and releases")
        self.clock += 1
        self.now = self.seq << SEQ | self.clock << CLOCK

    def released(self) -> None:
        """A barrier of the whole CTA completed."""
        self.run.order.meet(self)
        self.tick()
        self.barrier = self.now
        self.counts["barriers"] += 1

    def arrive(self, bar: int, warps: Iterable[int], count: int | None) -> None:
        self.bars.setdefault(bar, (set(), count))[0].update(int(w) for w in warps)
        self.settle()

    def settle(self) -> None:
        """Complete every barrier that has all its warps."""
        live = sum(g.live_warps() for g in self.groups)
        for bar, (arrived, count) in list(self.bars.items()):
            if len(arrived) >= (live if count is None else count // 32):
                del self.bars[bar]
                if len(arrived) >= live:
                    self.released()
                for g in self.groups:
                    g.leave_barrier(bar)

    def run_for(self, quantum: int | None, max_steps: int) -> bool:
        """Run until done (True) or for `quantum` steps (False)."""
        end = self.steps + quantum if quantum else max_steps + 1
        while self.steps < end:
            ready = [g for g in self.groups if g.ready()]
            if not ready:
                if all(g.done for g in self.groups):
                    self.finish()
                    return True
                raise BarrierError(
                    f"CTA {self.id} is stuck: barriers {sorted(self.bars)} wait for more warps"
                )
            if self.rng is None:
                ready[0].step()
            else:
                self.rng.choice(ready).step(self.rng.choice((1, 3, 10, 30, 100, 1000)))
            self.steps += 1
            if self.steps > max_steps:
                raise PtxError(
                    f"CTA {self.id} ran {max_steps} blocks without ending: it may wait for something "
                    "that never comes (for waits between CTAs, raise `resident`)"
                )
        return False

    def finish(self) -> None:
        """Add what this CTA did to the statistics."""
        counts, stats = self.counts, self.run.stats
        for g in self.groups:
            counts["cp.async never waited for"] += g.abandon_copies()
            for access in g.accesses:
                for key, n in access.flush():
                    counts[key] += n
            for block, n in zip(self.run.kernel.blocks, g.counts, strict=True):
                for (opcode, klass), k in block.ops.items() if n else ():
                    stats.ops[opcode] += k * n
                    stats.classes[klass] += k * n
                    counts[klass] += k * n
                    counts["instructions"] += k * n
        for key in [key for key, n in counts.items() if not n]:
            del counts[key]
        stats.total.update(counts)
        self.run.order.seen.pop(self.seq, None)
