"""The runs below a directory, as a table."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastnet.cli import Parser, directory, run_command
from fastnet.errors import InputError, printable, unreadable
from fastnet.training.events import EpochEvent, FinalEvent, read_events
from fastnet.training.manifest import read_manifest


@dataclass(frozen=True)
class RunSummary:
    """What the table says of a run. `state` is running, done, stopped, or damaged; what is not known is None, such as
    the best top-1 on val of a run with a holdout that is not done."""

    run: str
    network: str | None = None
    data: str | None = None
    best_top1: float | None = None
    epochs: int | None = None
    epochs_planned: int | None = None
    images_per_s: float | None = None
    state: str = "stopped"


def find_runs(directory: Path) -> Iterator[Path]:
    """The run directories at or below `directory`, in order of their paths, through links too, each once. Hidden
    directories are passed over, and named on stderr are those that cannot be read."""

    def say(error: OSError) -> None:
        print(printable(str(unreadable(error, error.filename))), file=sys.stderr)

    seen: set[tuple[int, int]] = set()
    for folder, below, files in os.walk(directory, followlinks=True, onerror=say):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        if "manifest.json" in files and "metrics.jsonl" in files:
            below.clear()
            yield Path(folder)


def summarise(run_dir: Path) -> RunSummary:
    """Reads a run's manifest and metrics; a run that cannot be read is damaged."""
    try:
        manifest = read_manifest(run_dir)
        events = read_events(run_dir / "metrics.jsonl")
    except InputError:
        return RunSummary(str(run_dir), state="damaged")
    config = manifest.config
    epochs = [event for event in events if isinstance(event, EpochEvent)]
    # With a holdout, epochs know nothing of val.
    on_val = [event for event in events if isinstance(event, FinalEvent)] if config.get("holdout") else epochs
    planned = sum(value for key in ("head_epochs", "epochs") if isinstance(value := config.get(key), int))
    finished = bool(manifest.sessions) and manifest.sessions[-1].get("done") is True
    return RunSummary(
        run=str(run_dir),
        network=str(config.get("network")),
        data=str(manifest.data.get("name")),
        best_top1=max((event.val_top1 for event in on_val), default=None),
        epochs=len(epochs),
        epochs_planned=planned,
        images_per_s=epochs[-1].images_per_s if epochs else None,
        state="running" if _is_locked(run_dir) else "done" if finished else "stopped",
    )


def _is_locked(run_dir: Path) -> bool:
    """Whether a process of this file system's hosts trains there now."""
    try:
        held = os.open(run_dir / ".lock", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(held)


def text_table(runs: Sequence[RunSummary]) -> str:
    """The runs as aligned text, a line each below the titles."""
    rows = [("run", "network", "data", "best top-1", "epochs", "images/s", "state")]
    for run in runs:
        rows.append(
            (
                printable(run.run),
                printable(run.network or "-"),
                printable(run.data or "-"),
                "-" if run.best_top1 is None else f"{run.best_top1:.4f}",
                "-" if run.epochs is None else f"{run.epochs}/{run.epochs_planned}",
                "-" if run.images_per_s is None else f"{run.images_per_s:.0f}",
                run.state,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = {3, 4, 5}
    lines = [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(prog="python -m fastnet.runs", description="The runs below a directory, as a table.")
    parser.add_argument(
        "directory", metavar="DIR", type=directory, nargs="?", default=Path("runs"), help="where to look"
    )
    args = parser.parse_args(argv)
    if not args.directory.is_dir():
        raise InputError(f"{args.directory}: no such directory; name the one that holds the runs")
    runs = [summarise(run_dir) for run_dir in find_runs(args.directory)]
    print(text_table(runs) if runs else f"{args.directory}: no runs below it")
    return {"runs": [asdict(run) for run in runs], "files": []}


if __name__ == "__main__":
    run_command(main)
