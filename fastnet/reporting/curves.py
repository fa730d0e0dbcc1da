"""Loss and accuracy of a run over its steps: read from its records, and drawn into the axes of a figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from fastnet.errors import InputError
from fastnet.training.events import EpochEvent, PhaseEvent, StepEvent, read_events
from fastnet.training.manifest import read_manifest

QUANTITIES = ("loss", "top-1")
STYLES: dict[str, dict[str, Any]] = {
    "training": {"color": "0.45", "linestyle": "-", "linewidth": 1.2},
    "validation": {"color": "0", "linestyle": "--", "linewidth": 1.2, "marker": "o", "markersize": 3.5},
}


@dataclass
class Curves:
    """What the figures show of one run; a point is (step, loss, top-1 as a fraction). `split` is what validated: val,
    or a holdout of train."""

    name: str
    split: str = "val"
    phase_two: int | None = None
    training: list[tuple[float, float, float]] = field(default_factory=list)
    validation: list[tuple[float, float, float]] = field(default_factory=list)
    epochs: list[EpochEvent] = field(default_factory=list)

    @property
    def validated_on(self) -> str:
        """What the curve of validation is called."""
        return "validation" if self.split == "val" else self.split


def read_curves(run_dir: Path, name: str) -> Curves:
    """Reads a run's metrics.jsonl. Raises InputError, naming file and line, where it is damaged or empty."""
    path = run_dir / "metrics.jsonl"
    curves = Curves(name, "holdout" if _has_holdout(run_dir) else "val")
    for event in read_events(path):
        if isinstance(event, EpochEvent):
            curves.epochs.append(event)
            curves.validation.append((event.step, event.val_loss, event.val_top1))
        elif isinstance(event, StepEvent):
            curves.training.append((event.step, event.train_loss, event.train_top1))
        elif isinstance(event, PhaseEvent) and event.phase == "full" and event.step > 0:
            curves.phase_two = event.step
    if not curves.epochs and not curves.training:
        raise InputError(f"{path}: nothing has been recorded yet; train the run first")
    # A run shorter than the logging interval has no step lines: its epochs' means stand in.
    curves.training = curves.training or [(e.step, e.train_loss, e.train_top1) for e in curves.epochs]
    return curves


def _has_holdout(run_dir: Path) -> bool:
    try:
        return bool(read_manifest(run_dir).config.get("holdout"))
    except InputError:  # the records alone can be drawn, too
        return False


def draw_curves(
    axis: Axes, curves: Curves, quantity: str, styles: dict[str, dict[str, Any]] = STYLES
) -> None:
    """One of the `QUANTITIES`, in training and validation, and where the second phase starts."""
    column = 1 + QUANTITIES.index(quantity)
    for label, style in styles.items():
        points = getattr(curves, label)
        axis.plot(
            [point[0] for point in points],
            [point[column] for point in points],
            label=curves.validated_on if label == "validation" else label,
            gid=f"{curves.name} {quantity} {label}",
            **style,
        )
    if curves.phase_two:
        _mark_phase_two(axis, curves, quantity)
    frame(axis)


def frame(axis: Axes) -> None:
    """The look of every chart: a light grid, open to the top and the right."""
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _mark_phase_two(axis: Axes, curves: Curves, quantity: str) -> None:
    """A dotted line where the whole network begins to train, named above the axes, clear of the curves."""
    assert curves.phase_two is not None
    axis.axvline(
        curves.phase_two, color="0", linestyle=":", linewidth=1.2, gid=f"{curves.name} {quantity} phase two"
    )
    no_room_right = curves.phase_two > 0.5 * curves.training[-1][0]
    axis.text(
        curves.phase_two,
        1.02,
        "phase two starts",
        transform=axis.get_xaxis_transform(),
        ha="right" if no_room_right else "left",
        fontsize=9,
    )
