"""How far a run is: all that a checkpoint needs besides weights and optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Epochs and steps count what is done; `step_in_epoch` is of the epoch under way.

    `totals` are the sums of that epoch (`metrics.Totals`) over all ranks, `logged` those at the last record of the
    training loss, `metrics_bytes` the length of metrics.jsonl that belongs to this state.
    """

    phase: int = 0
    epoch: int = 0
    phase_epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_top1: float = -1.0
    plateau_top1: float = -1.0
    plateau_age: int = 0
    totals: list[int] = field(default_factory=list)
    logged: list[int] = field(default_factory=list)
    metrics_bytes: int = 0
    done: bool = False
