"""Address space: the launch's arguments and a CTA's shared memory, and the access of lanes to them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ptxrun.errors import MemoryFault, PtxError
from ptxrun.parser import Instr
from ptxrun.races import WARP_BITS, Shadow, Touch

if TYPE_CHECKING:
    from ptxrun.group import Group

SLOT = 36  # every argument sits in the middle of its own 64 GiB slot
LINE = 128  # all memories are aligned to this, up to the 16-byte lead of an argument
ALL = slice(None)
Lanes = slice | np.ndarray  # ALL, or lane numbers


class Memory:
    """One argument (or several that overlap), or the shared memory of a CTA."""

    def __init__(
        self,
        name: str,
        raw: np.ndarray,
        nbytes: int,
        granule: int,
        warps: int,
        *,
        base: int = 0,
        lead: int = 0,
        writable: bool = True,
        shared: bool = False,
    ) -> None:
        self.name, self.nbytes, self.granule, self.writable = name, nbytes, granule, writable
        self.base, self.lead = base, lead  # address of the first byte; bytes of the views before it
        self.views = {width: raw.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.warps, self.shared = warps, shared

    @cached_property
    def shadow(self) -> Shadow:
        return Shadow(len(self.views[1]) // self.granule + 1, self.warps, self.shared)

    def unique_bytes(self) -> tuple[int, int]:
        """Distinct bytes (read, written) so far, in whole granules."""
        s = self.shadow
        read = s.read_by.any(0) if s.foreign is None else s.read_by.any(0) | (s.foreign != 0)
        written = s.written != 0 if s.atomic is None else (s.written != 0) | (s.atomic != 0)
        return int(np.count_nonzero(read)) * self.granule, int(np.count_nonzero(written)) * self.granule


def host_memory(x: Any) -> tuple[int, int, bool]:
    """(address, bytes, writable) of a NumPy array or a torch CPU tensor, as strided."""
    if isinstance(x, np.ndarray):
        ptr, item, strides, writable = x.ctypes.data, x.itemsize, x.strides, x.flags.writeable
    elif x.device.type != "cpu":
        raise PtxError("tensors must live on the CPU")
    else:
        ptr, item, writable = x.data_ptr(), x.element_size(), True
        strides = tuple(s * item for s in x.stride())
    if any(s < 0 for s in strides):
        raise PtxError("negative strides are not supported")
    size = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + item
    return ptr, 0 if 0 in x.shape else size, writable


def map_arguments(
    arrays: Sequence[tuple[str, Any]], granule: int, warps: int
) -> tuple[dict[int, Memory], list[int]]:
    """Give every (name, array) an address range of its own; arrays that overlap share one.

    Returns {slot: memory} and the address of each array.
    """
    spans = [(*host_memory(x), name, i) for i, (name, x) in enumerate(arrays)]
    spans.sort(key=lambda span: (span[1] > 0, span[0]))  # empty arrays first: they overlap nothing
    merged: list[tuple[int, int, bool, list[str], list[tuple[int, int]]]] = []
    for ptr, n, writable, name, i in spans:
        if merged and merged[-1][0] <= ptr < merged[-1][1]:
            low, high, all_writable, names, members = merged.pop()
            writable, name_list, at = writable and all_writable, [*names, name], [*members, (i, ptr)]
            merged.append((low, max(high, ptr + n), writable, name_list, at))
        else:
            merged.append((ptr, ptr + n, writable, [name], [(i, ptr)]))
    regions, addresses = {}, [0] * len(arrays)
    for slot, (low, high, writable, names, members) in enumerate(merged, 1):
        lead = low % 16  # the views start at a multiple of 16 bytes
        size = max(16, -(-(high - low + lead) // 16) * 16)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(low - lead))
        base = (slot << SLOT) + (1 << SLOT - 1) + lead
        regions[slot] = Memory(
            "|".join(names), raw, high - low, granule, warps, base=base, lead=lead, writable=writable
        )
        for i, ptr in members:
            addresses[i] = base + ptr - low
    return regions, addresses


class Pattern(NamedTuple):
    """What accesses have in common whose addresses differ by a multiple of LINE: all of it relative."""

    cells: np.ndarray  # [lanes, elements of a lane] indices
    granules: np.ndarray  # [lanes, granules of a lane]
    low: int  # first byte
    high: int  # one past the last
    misaligned: int | None  # a lane
    warps: int
    units: int  # sectors of global memory, wavefronts of shared memory
    ideal: int  # the fewest possible


class Span(NamedTuple):
    """The part of an access that falls into one memory."""

    mem: Memory
    sel: slice | np.ndarray  # which of the accessing lanes
    cells: np.ndarray  # [lanes, elements of a lane] indices into mem.views[width]
    touch: Touch


class Access:
    """One memory operand of an instruction: addresses -> spans, checked and counted."""

    def __init__(
        self, g: Group, ins: Instr, space: str, name: str, width: int, vec: int = 1, align: int = 0
    ) -> None:
        self.g, self.ins, self.space, self.name, self.width, self.vec = g, ins, space, name, width, vec
        self.size = width * vec
        self.align = align or self.size
        self.unit = "sectors" if space == "global" else "wavefronts"
        row = dict(text=str(ins), requests=0, bytes=0, unit=self.unit, touched=0, ideal=0)  # noqa: C408
        self.row = g.run.stats.access.setdefault((ins.line, space), row)
        self.granule = g.run.granule[space]
        self.stamps = (ins.pc << WARP_BITS) + g.warp
        self.patterns = g.run.patterns.setdefault((space, width, vec, self.align, g.n), {})
        self.requests = self.bytes = self.touched = self.ideal = 0
        g.accesses.append(self)

    def spans(self, a: np.ndarray, lanes: Lanes, write: bool = False) -> Iterator[Span]:
        """Resolve the addresses `a` of the lanes that take part."""
        a = a.view(np.int64) if a.itemsize == 8 else a.astype(np.int64)
        base = int(a[0]) & -LINE
        key = (a - base).tobytes(), b"" if isinstance(lanes, slice) else lanes.tobytes()
        p = self.patterns.get(key) or self.study(key, a - base, lanes)
        self.requests += p.warps
        self.bytes += len(a) * self.size
        self.touched += p.units
        self.ideal += p.ideal
        if p.misaligned is not None:
            self.fault(int(a[p.misaligned]), "misaligned access")
        mem, low = self.memory(base + p.low), base + p.low
        if not mem or low < mem.base or base + p.high > mem.base + mem.nbytes:
            yield from self.scattered(a, lanes, write)
            return
        if write and not mem.writable:
            self.fault(low, "write to a read-only array")
        shift = base - mem.base + mem.lead
        granules = p.granules + shift // self.granule
        yield Span(mem, ALL, p.cells + shift // self.width, self.touch(mem, granules, lanes))

    def scattered(self, a: np.ndarray, lanes: Lanes, write: bool) -> Iterator[Span]:
        """Lanes that address several arrays, or none."""
        slots = a >> SLOT
        for slot in np.unique(slots):
            sel = slots == slot
            here, mem = a[sel], self.memory(int(a[sel][0]))
            if not mem:
                self.fault(int(here[0]), "out-of-bounds access")
            bad = here[(here < mem.base) | (here + self.size > mem.base + mem.nbytes)]
            if bad.size:
                self.fault(int(bad[0]), "out-of-bounds access")
            if write and not mem.writable:
                self.fault(int(here[0]), "write to a read-only array")
            off = here - (mem.base - mem.lead)
            cells, granules = self.elements(off, self.width), self.elements(off, self.granule)
            yield Span(mem, sel, cells, self.touch(mem, granules, np.arange(self.g.n)[lanes][sel]))

    def memory(self, address: int) -> Memory | None:
        return self.g.cta.smem if self.space == "shared" else self.g.run.regions.get(address >> SLOT)

    def elements(self, off: np.ndarray, width: int) -> np.ndarray:
        """[lanes] byte offsets -> [lanes, k] indices of the elements of that width."""
        return (off // width)[:, None] + np.arange(max(1, -(-self.size // width)))

    def touch(self, mem: Memory, granules: np.ndarray, lanes: Lanes) -> Touch:
        return Touch(self.g.cta, self.ins, mem, granules, (self.stamps[lanes] + self.g.cta.now)[:, None])

    def study(self, key: tuple[bytes, bytes], rel: np.ndarray, lanes: Lanes) -> Pattern:
        """Work out the pattern of relative addresses, for this and all later accesses."""
        if len(self.patterns) > 2000:
            self.patterns.clear()
        ids = np.arange(self.g.n)[lanes]
        off = np.flatnonzero(rel & (self.align - 1))
        if self.space == "global":
            units, ideal = count_sectors(rel, ids // 32, self.size)
        else:
            units, ideal = count_wavefronts(rel, ids, self.size)
        p = self.patterns[key] = Pattern(
            self.elements(rel, self.width),
            self.elements(rel, self.granule),
            int(rel.min()),
            int(rel.max()) + self.size,
            int(off[0]) if off.size else None,
            len(np.unique(ids // 32)),
            units,
            ideal,
        )
        return p

    def fault(self, address: int, what: str) -> NoReturn:
        mem = self.memory(address)
        place = f"address {address & (1 << 64) - 1:#x}, in no argument"
        if mem:
            place = f"offset {address - mem.base} of {mem.name!r} ({mem.nbytes} bytes)"
        raise MemoryFault(f"{what}: {self.size} bytes at {place}, CTA {self.g.cta.id}; {self.ins}")

    def flush(self) -> Iterable[tuple[str, int]]:
        """Counters since the last call, which go to the CTA; added to the instruction's row too."""
        counted = self.requests, self.bytes, self.touched, self.ideal
        self.requests = self.bytes = self.touched = self.ideal = 0
        for key, n in zip(("requests", "bytes", "touched", "ideal"), counted, strict=True):
            self.row[key] += n
        units = f"{self.space} {self.unit}"
        return zip((f"{self.name} bytes", units, f"{units} ideal"), counted[1:], strict=True)


def count_sectors(rel: np.ndarray, warps: np.ndarray, size: int) -> tuple[int, int]:
    """32-byte sectors that each warp touches, and the fewest that its distinct bytes would fill."""
    sectors = ideal = 0
    for w in np.unique(warps):
        unique = np.unique(rel[warps == w])
        sectors += len(np.unique(unique >> 5))
        ideal += -(-len(unique) * size // 32)
    return sectors, ideal


def count_wavefronts(rel: np.ndarray, ids: np.ndarray, size: int) -> tuple[int, int]:
    """Passes over the 32 banks, and how many there would be without conflicts."""
    groups = ids // (32 if size <= 4 else 128 // size)  # lanes that are served together
    wavefronts = ideal = 0
    for g in np.unique(groups):
        words = np.unique((np.unique(rel[groups == g])[:, None] >> 2) + np.arange(max(1, size // 4)))
        wavefronts += int(np.bincount(words & 31).max())
        ideal += 1
    return wavefronts, ideal
