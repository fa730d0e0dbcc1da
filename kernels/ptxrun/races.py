"""Race detection: who touched each granule of memory last, and what is ordered before what.

A stamp packs (CTA sequence number, clock, pc, warp) in an int64; 0 means never. The clock of a CTA ticks
at barriers of the whole CTA and at releases. Two accesses of one CTA clash if they come from different
warps and the first is not older than the last barrier; two accesses of different CTAs clash unless
release/acquire atomics order them (Order).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptxrun.errors import PtxError

if TYPE_CHECKING:
    from ptxrun.machine import CTA
    from ptxrun.memory import Memory
    from ptxrun.parser import Instr

WARP_BITS, PC_BITS, CLOCK_BITS, SEQ_BITS = 5, 18, 19, 21
CLOCK, SEQ = WARP_BITS + PC_BITS, WARP_BITS + PC_BITS + CLOCK_BITS
WARP_MASK, PC_MASK, CLOCK_MASK = (1 << WARP_BITS) - 1, (1 << PC_BITS) - 1, (1 << CLOCK_BITS) - 1


def check_limits(warps: int, instructions: int, ctas: int) -> None:
    """Raise where a launch does not fit into the fields of a stamp."""
    if warps > 1 << WARP_BITS or instructions > 1 << PC_BITS or ctas >= 1 << SEQ_BITS:
        raise PtxError(f"too large: {warps} warps, {instructions} instructions, {ctas} CTAs")


class Touch(NamedTuple):
    """One access of some lanes to one memory."""

    cta: CTA
    ins: Instr
    mem: Memory
    granules: np.ndarray  # [lanes, granules of a lane]
    stamp: np.ndarray  # [lanes, 1]


class Shadow:
    """The last accesses to every granule of one memory."""

    def __init__(self, granules: int, warps: int, shared: bool) -> None:
        self.n, self.shared = granules, shared
        self.written = np.zeros(granules, np.int64)  # last plain write
        self.ever_written = False
        self.atomic: np.ndarray | None = None  # last atomic or other strong write
        self.read_by = np.zeros((warps, granules), np.int64)  # last read, by warp
        self.foreign: np.ndarray | None = None  # last read that a warp of another CTA replaced in read_by
        self.arriving = np.zeros(granules, bool)  # a cp.async to here is under way
        self.copies = 0  # lanes of the cp.asyncs under way: to here if shared, else from here

    def clear(self) -> None:
        """Forget everything; shared memory at the start of a CTA."""
        for array in (self.written, self.atomic, self.read_by, self.arriving):
            if array is not None:
                array.fill(0)
        self.ever_written, self.copies = False, 0

    def read(self, touch: Touch, strong: bool = False) -> None:
        """Check a read, and remember it unless it is strong (volatile or atomic)."""
        self.check_read(touch, strong)
        if not strong:
            self.note_read(touch)

    def check_read(self, touch: Touch, strong: bool = False) -> None:
        """Report what a read clashes with, and shared memory that nobody wrote."""
        written = None
        if self.ever_written:
            written = self.written.take(touch.granules)
            self.clash("write-read", touch, written)
        if self.atomic is not None and not strong:
            self.clash("atomic-read", touch, self.atomic.take(touch.granules))
        if self.shared:
            if self.copies:
                self.clash_with_copy("cp.async-read", touch, self.arriving.take(touch.granules))
            if touch.cta.run.check_uninit and (written is None or not written.all()):
                cold = np.ones(touch.granules.shape, bool) if written is None else written == 0
                if self.atomic is not None:
                    cold &= self.atomic.take(touch.granules) == 0
                touch.cta.run.stats.uninit[str(touch.ins)] += int(cold.any(1).sum())

    def note_read(self, touch: Touch) -> None:
        """Remember a read that has been checked."""
        cells = (touch.stamp & WARP_MASK) * self.n + touch.granules
        if not (self.shared or touch.cta.run.one_cta):
            old = self.read_by.take(cells)
            replaced = (old != 0) & (old >> SEQ != touch.cta.seq)
            if replaced.any():
                if self.foreign is None:
                    self.foreign = np.zeros(self.n, np.int64)
                self.foreign[touch.granules[replaced]] = old[replaced]
        self.read_by.reshape(-1)[cells] = touch.stamp

    def write(self, touch: Touch, same: Callable[[], np.ndarray] | None = None, strong: bool = False) -> None:
        """Check and remember a write. `same()` says which elements already hold the value."""
        self.check_write(touch, same, strong)
        if strong and self.atomic is None:
            self.atomic = np.zeros(self.n, np.int64)
        if strong:
            assert self.atomic is not None
            self.atomic[touch.granules] = touch.stamp
        else:
            self.note_write(touch.granules, touch.stamp)

    def note_write(self, granules: np.ndarray, stamp: np.ndarray) -> None:
        self.written[granules] = stamp
        self.ever_written = True

    def check_write(
        self, touch: Touch, same: Callable[[], np.ndarray] | None = None, strong: bool = False
    ) -> None:
        """Report what a write clashes with."""
        idx = touch.granules
        if self.ever_written:
            self.clash("write-write", touch, self.written.take(idx), same)
        self.clash("read-write", touch, self.read_by.take(idx, axis=1))
        if self.foreign is not None:
            self.clash("read-write", touch, self.foreign.take(idx))
        if self.copies and self.shared:
            self.clash_with_copy("cp.async-write", touch, self.arriving.take(idx))
        elif self.copies:
            self.clash_with_copy("cp.async source-write", touch, touch.cta.run.copied_from(touch.mem, idx))
        if self.atomic is not None and not strong:
            self.clash("atomic-write", touch, self.atomic.take(idx))

    def clash(
        self, kind: str, touch: Touch, old: np.ndarray, same: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Report earlier accesses `old` that are not ordered before this one."""
        cta, stamp = touch.cta, touch.stamp
        own_only = self.shared or cta.run.one_cta
        if old.max() < (cta.barrier if own_only else 1):
            return
        bad = (old >= cta.barrier) & (((old ^ stamp) & WARP_MASK) != 0)
        if not own_only:
            before = cta.run.order.before(old, cta, stamp & WARP_MASK)
            bad = np.where(old >> SEQ == cta.seq, bad, (old != 0) & ~before)
        if same is not None and bad.any():  # a second write of the same value is harmless
            bad &= ~same().all(1, keepdims=True)
        if bad.any():
            cta.run.race(kind, touch, old, bad)

    def clash_with_copy(self, kind: str, touch: Touch, busy: np.ndarray) -> None:
        if busy.any():
            touch.cta.run.race(kind, touch, None, busy)


class Order:
    """Which accesses of other CTAs happened before, through release/acquire operations: vector clocks."""

    def __init__(self, ctas: int, warps: int) -> None:
        self.shape = (warps, ctas + 1, warps)
        self.seen: dict[
            int, np.ndarray
        ] = {}  # CTA -> by warp, the clock of each (CTA, warp) that it knows of
        self.released: dict[int, np.ndarray] = {}  # address -> the same, as published there

    def synchronise(
        self, cta: CTA, addresses: Iterable[int], warps: Iterable[int], acquire: bool, release: bool
    ) -> None:
        seen = self.seen.setdefault(cta.seq, np.zeros(self.shape, np.int64))
        addresses, own = set(addresses), sorted(set(warps))
        for a in addresses & self.released.keys() if acquire else ():
            seen[own] = np.maximum(seen[own], self.released[a])
        if release:  # publishes what precedes the last barrier, and the releasing warps' own accesses
            known = seen[own].max(0)
            known[cta.seq] = np.maximum(known[cta.seq], (cta.barrier >> CLOCK & CLOCK_MASK) - 1)
            known[cta.seq, own] = cta.clock
            for a in addresses:
                self.released[a] = np.maximum(self.released.get(a, 0), known)
            cta.tick()

    def meet(self, cta: CTA) -> None:
        """A barrier of the whole CTA: all of its warps know what one of them knew."""
        if cta.seq in self.seen:
            self.seen[cta.seq][:] = self.seen[cta.seq].max(0)

    def before(self, old: np.ndarray, cta: CTA, warp: np.ndarray) -> np.ndarray:
        """Which of the accesses `old` happened before what these warps of `cta` do now."""
        seen = self.seen.get(cta.seq)
        if seen is None:
            return np.zeros(old.shape, bool)
        return seen[warp, old >> SEQ, old & WARP_MASK] >= (old >> CLOCK & CLOCK_MASK)
