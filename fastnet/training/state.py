"""How far a run is: all that a checkpoint needs besides weights and optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]


@dataclass
class TrainState:
    """Epochs and steps count what is done; `step_in_epoch` is of the epoch under way.

    `totals` are the sums of that epoch (`metrics.Totals`) over all ranks, `logged` those at the last record of the
    training loss, `metrics_bytes` the length of metrics.jsonl that belongs to this state.
    """

    phase: Count = 0
    epoch: Count = 0
    phase_epoch: Count = 0
    step_in_epoch: Count = 0
    step: Count = 0
    best_top1: float = -1.0
    plateau_top1: float = -1.0
    plateau_age: Count = 0
    totals: Annotated[list[Count], msgspec.Meta(max_length=5)] = field(default_factory=list)
    logged: Annotated[list[Count], msgspec.Meta(max_length=5)] = field(default_factory=list)
    metrics_bytes: Count = 0
    done: bool = False

    @property
    def in_phase(self) -> bool:
        """Whether a step of the phase has been made; between two phases there is no optimiser to keep."""
        return self.phase_epoch + self.step_in_epoch > 0
