"""The paper's figures 3 to 6: loss and accuracy in training and validation over the iterations.

Reads a run's metrics.jsonl, and in manifest.json whether a holdout validated. One picture has a column per run, on the
same axes, so that networks can be compared at a glance. Lines differ by style and marker, not by colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fastnet.cli import Parser, directory, run_command
from fastnet.errors import printable
from fastnet.files import atomic_write, short_names
from fastnet.reporting.curves import QUANTITIES, Curves, draw_curves, read_curves


def draw(runs: Sequence[Curves]) -> Figure:
    """A column per run, loss above accuracy, on axes that all runs share."""
    figure = Figure(figsize=(max(4.6 * len(runs), 5.2), 6.4), layout="constrained")
    axes = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    title_pad = 20 if any(curves.phase_two for curves in runs) else 8
    for column, curves in enumerate(runs):
        title = curves.name
        if curves.validation:
            best = max(point[2] for point in curves.validation)
            title += f": best {curves.validated_on} top-1 {best:.1%}"
        axes[0, column].set_title(title, fontsize=11, pad=title_pad, parse_math=False)
        for row, quantity in enumerate(QUANTITIES):
            axis = axes[row, column]
            draw_curves(axis, curves, quantity)
            axis.tick_params(labelleft=True)
        axes[1, column].set_xlim(left=0)
        axes[1, column].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes[1, column].set_xlabel("iteration (optimiser steps)")
    axes[0, 0].set_ylabel("loss (cross-entropy)")
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel("accuracy (top-1)")
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    shown = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=2, frameon=False, handlelength=3.5)
    return figure


def save(figure: Figure, out: Path) -> list[Path]:
    """Writes training.png and training.svg into `out`. The same curves give the same bytes."""
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
        description="Draws the loss and accuracy of runs over the iterations, as PNG and SVG.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run")
    parser.add_argument("--out", metavar="DIR", type=directory, required=True, help="folder for the pictures")
    args = parser.parse_args(argv)

    names = [printable(name) for name in short_names(args.runs)]
    runs = [read_curves(path, name) for path, name in zip(args.runs, names, strict=True)]
    files = save(draw(runs), args.out)
    for path in files:
        print(path)
    return {"files": [str(path) for path in files]}


if __name__ == "__main__":
    run_command(main)
