"""cp.async: data that is under way."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from ptxrun.memory import Memory
from ptxrun.parser import Instr
from ptxrun.races import Touch

if TYPE_CHECKING:
    from ptxrun.machine import CTA


@dataclass
class Copy:
    """Lanes of one cp.async that have not landed yet; all arrays have a row for each."""

    source: Memory | None  # None: zeros
    ins: Instr
    lanes: np.ndarray
    group: np.ndarray  # commit group
    words: np.ndarray  # destination, 4-byte index
    granules: np.ndarray  # of the destination
    source_granules: np.ndarray
    data: np.ndarray
    stamps: np.ndarray  # pc and warp

    def subset(self, sel: np.ndarray) -> Copy:
        values = (getattr(self, f.name) for f in fields(self))
        return Copy(*(v[sel] if isinstance(v, np.ndarray) else v for v in values))

    def begin(self, cta: CTA) -> None:
        """From here on the destination must not be touched, and the source not be written."""
        shadow = cta.smem.shadow
        shadow.arriving[self.granules] = True
        shadow.copies += len(self.lanes)
        if self.source:
            self.source.shadow.copies += len(self.lanes)

    def land(self, cta: CTA) -> None:
        """The data arrives: the source has been read and the destination is written now."""
        self.abandon()
        stamp = (self.stamps + cta.now)[:, None]
        if self.source:
            self.source.shadow.note_read(Touch(cta, self.ins, self.source, self.source_granules, stamp))
        shadow = cta.smem.shadow
        shadow.arriving[self.granules] = False
        shadow.copies -= len(self.lanes)
        shadow.note_write(self.granules, stamp)
        cta.smem.views[4][self.words] = self.data

    def abandon(self) -> None:
        """The source may be written again."""
        if self.source:
            self.source.shadow.copies -= len(self.lanes)
