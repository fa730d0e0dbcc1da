"""What a launch returns: counts, traffic and findings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Race:
    """An earlier and a later access to the same bytes with nothing that orders them."""

    kind: str  # the two accesses in order, e.g. 'write-read'
    array: str  # argument name, or 'shared'
    offset: int  # byte offset of one affected granule
    first: str  # the two instructions
    second: str
    ctas: tuple[int, int]
    warps: tuple[int | None, int]
    count: int = 1  # granules affected, over all occurrences

    def __str__(self) -> str:
        where = f"{self.array}+{self.offset} (CTAs {self.ctas}, warps {self.warps}, {self.count}x)"
        return f"{self.kind} race on {where}:\n    {self.first}\n    {self.second}"


@dataclass
class Stats:
    """Dynamic counts. `total` and each entry of `per_cta` map a counter name to a number."""

    total: Counter[str] = field(default_factory=Counter)
    per_cta: list[Counter[str]] = field(default_factory=list)  # indexed by linear CTA id (x fastest)
    ops: Counter[str] = field(default_factory=Counter)  # full opcode -> warp-instructions
    classes: Counter[str] = field(default_factory=Counter)  # opcode class -> warp-instructions
    # Argument -> distinct bytes (read, written).
    unique: dict[str, tuple[int, int]] = field(default_factory=dict)
    # (PTX line, space) -> traffic.
    access: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    races: list[Race] = field(default_factory=list)  # within a CTA
    cta_races: list[Race] = field(default_factory=list)  # between CTAs
    # Instruction -> lanes that read unwritten shared memory.
    uninit: Counter[str] = field(default_factory=Counter)
    ptx: str = ""  # run_triton only
    metadata: Any = None  # run_triton only: Triton's metadata of the compiled kernel

    @property
    def instructions(self) -> int:
        """Instructions executed, counted per warp."""
        return self.total["instructions"]

    @property
    def mma(self) -> int:
        """mma instructions, per warp."""
        return self.classes["mma"]

    @property
    def mma_flops(self) -> int:
        return self.total["mma flops"]

    @property
    def barriers(self) -> int:
        """Barriers of the whole CTA, summed over CTAs."""
        return self.total["barriers"]

    @property
    def global_load_bytes(self) -> int:
        return self.total["ld.global bytes"]

    @property
    def global_store_bytes(self) -> int:
        return self.total["st.global bytes"]

    @property
    def cp_async_bytes(self) -> int:
        return self.total["cp.async bytes"]

    @property
    def uninit_reads(self) -> int:
        return sum(self.uninit.values())

    @property
    def sectors_per_ideal(self) -> float:
        """32-byte sectors touched over the fewest possible; 1.0 is perfectly coalesced."""
        return self.total["global sectors"] / max(1, self.total["global sectors ideal"])

    @property
    def shared_conflicts(self) -> int:
        """Extra shared-memory wavefronts caused by bank conflicts."""
        return self.total["shared wavefronts"] - self.total["shared wavefronts ideal"]

    def __str__(self) -> str:
        out = [f"{self.instructions} warp-instructions in {len(self.per_cta)} CTAs"]
        out += [f"  {k:26s} {v}" for k, v in sorted(self.total.items()) if k != "instructions"]
        out += [f"unique bytes of {k}: read {r}, written {w}" for k, (r, w) in self.unique.items()]
        out += [
            f"sectors / ideal {self.sectors_per_ideal:.2f}, bank-conflict wavefronts {self.shared_conflicts}"
        ]
        for title, items in (("races", self.races), ("races between CTAs", self.cta_races)):
            out += [f"{title}: {len(items)}", *(f"  {r}" for r in items[:10])]
        out += [f"unwritten shared memory read by {n} lanes: {k}" for k, n in self.uninit.items()]
        return "\n".join(out)
