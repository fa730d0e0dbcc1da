"""The paper's figures 3-6: loss and accuracy of training and validation over the iterations.

Needs nothing of a run but its metrics.jsonl. One picture holds a column per run on common axes, so that
networks compare at a glance. Lines differ by style and marker, not by colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastnet.cli import Parser, run_command
from fastnet.errors import InputError
from fastnet.files import atomic_write, short_names
from fastnet.training.events import EpochEvent, StepEvent, read_events

STYLES: dict[str, dict[str, Any]] = {
    "training": {"color": "0.45", "linestyle": "-", "linewidth": 1.2},
    "validation": {"color": "0", "linestyle": "--", "linewidth": 1.2, "marker": "o", "markersize": 3.5},
}


@dataclass
class Curves:
    """What the figures show of one run; a point is (step, loss, top-1 as a fraction)."""

    name: str
    phase_two: int | None = None
    training: list[tuple[float, float, float]] = field(default_factory=list)
    validation: list[tuple[float, float, float]] = field(default_factory=list)


def read_curves(run_dir: Path, name: str) -> Curves:
    """Reads a run's metrics.jsonl. Raises InputError, naming file and line, where it is damaged or empty."""
    path = run_dir / "metrics.jsonl"
    curves = Curves(name)
    epochs: list[tuple[float, float, float]] = []
    for event in read_events(path):
        if isinstance(event, EpochEvent):
            epochs.append((event.step, event.train_loss, event.train_top1))
            curves.validation.append((event.step, event.val_loss, event.val_top1))
        elif isinstance(event, StepEvent):
            curves.training.append((event.step, event.train_loss, event.train_top1))
        elif event.phase == "full" and event.step > 0:
            curves.phase_two = event.step
    if not epochs and not curves.training:
        raise InputError(f"{path}: ends before the first logged step; train the run first")
    # A run shorter than the logging interval has no step lines: its epochs' means stand in.
    curves.training = curves.training or epochs
    return curves


def draw(runs: Sequence[Curves]) -> Figure:
    """One column per run, loss above accuracy, both on axes common to all runs."""
    figure = Figure(figsize=(max(4.6 * len(runs), 5.2), 6.4), layout="constrained")
    axes = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    title_pad = 20 if any(curves.phase_two for curves in runs) else 8
    for column, curves in enumerate(runs):
        title = curves.name
        if curves.validation:
            title += f": best validation top-1 {max(point[2] for point in curves.validation):.1%}"
        axes[0, column].set_title(title, fontsize=11, pad=title_pad)
        for row, quantity in enumerate(("loss", "top-1")):
            axis = axes[row, column]
            for label, style in STYLES.items():
                points = getattr(curves, label)
                axis.plot(
                    [point[0] for point in points],
                    [point[1 + row] for point in points],
                    label=label,
                    gid=f"{curves.name} {quantity} {label}",
                    **style,
                )
            if curves.phase_two:
                _mark_phase_two(axis, curves, quantity)
            axis.grid(color="0.9", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelleft=True)
        axes[1, column].set_xlim(left=0)
        axes[1, column].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes[1, column].set_xlabel("iteration (optimiser steps)")
    axes[0, 0].set_ylabel("loss (cross-entropy)")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel("accuracy (top-1)")
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, handlelength=3.5)
    return figure


def _mark_phase_two(axis: Any, curves: Curves, quantity: str) -> None:
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


def save(figure: Figure, out: Path) -> list[Path]:
    """Writes training.png and training.svg into `out`; the same curves give the same bytes."""
    files = [out / "training.png", out / "training.svg"]
    with rc_context({"svg.hashsalt": "fastnet", "svg.fonttype": "none"}):
        for path in files:
            with atomic_write(path) as beside:
                metadata: dict[str, str | None] = {"Title": "Loss and accuracy of training and validation"}
                if path.suffix == ".svg":
                    metadata["Date"] = None
                figure.savefig(beside, format=path.suffix[1:], dpi=160, metadata=metadata)
    return files


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.figures",
        description="Draws loss and accuracy of runs over the iterations, as PNG and SVG.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the pictures go")
    args = parser.parse_args(argv)

    runs = [read_curves(path, name) for path, name in zip(args.runs, short_names(args.runs), strict=True)]
    files = save(draw(runs), args.out)
    for path in files:
        print(path)
    return {"files": [str(path) for path in files]}


def cli() -> NoReturn:
    run_command(main)


if __name__ == "__main__":
    cli()
