"""What can go wrong with a program; an uncovered instruction raises NotImplementedError instead."""

from __future__ import annotations


class PtxError(RuntimeError):
    """The program did something that is an error on the device too."""


class MemoryFault(PtxError):
    """Out-of-bounds, misaligned or read-only access."""


class BarrierError(PtxError):
    """Deadlock, or a diverged warp at an instruction that needs the whole warp."""
