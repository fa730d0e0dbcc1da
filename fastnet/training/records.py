"""What a run leaves behind besides checkpoints: manifest.json, metrics.jsonl, TensorBoard events, lines on stderr."""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
from torch.utils.tensorboard import SummaryWriter

from fastnet.config import Config
from fastnet.data.prepared import PreparedSet
from fastnet.errors import InputError
from fastnet.files import atomic_write, refuse_link
from fastnet.metrics import Totals
from fastnet.provenance import surroundings
from fastnet.training.events import EpochEvent, read_events


class Recorder:
    """Rank 0's records of a run directory; on other ranks every method does nothing.

    `kept` is the length in bytes of metrics.jsonl at the checkpoint that the run continues from: what was written
    after it is cut off, since those steps are done again.
    """

    def __init__(self, run_dir: Path, *, main: bool, step: int, kept: int) -> None:
        self.main = main
        self.path = run_dir / "metrics.jsonl"
        if main:
            refuse_link(self.path)
            self.path.touch()
            if self.path.stat().st_size < kept:
                raise InputError(
                    f"{self.path}: shorter than at the last checkpoint; restore it from a copy, or give another "
                    "--run-dir"
                )
            read_events(self.path, kept)
            with self.path.open("r+b") as file:
                file.truncate(kept)
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step or None)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.main:
            self.board.close()

    def size(self) -> int:
        """Bytes in metrics.jsonl, on the disk: the checkpoint about to be written counts on them."""
        if not self.main:
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def event(self, kind: str, **values: Any) -> None:
        """Appends one line to metrics.jsonl and puts the numbers of steps and epochs on TensorBoard."""
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": kind, **values}) + "\n")
        if kind == "phase":
            return
        for key, value in values.items():
            if isinstance(value, float):
                self.board.add_scalar(f"{kind}/{key}", value, values["step"])

    def epoch(self, title: str, trained: dict[str, Any], scores: Totals) -> None:
        """Records an epoch: what training says of itself, and the validation scores."""
        val = {"val_loss": scores.mean_loss, "val_top1": scores.top1, "val_top5": scores.top5}
        self.event("epoch", **trained, **val, val_count=scores.images)
        if not self.main:
            return
        line = (
            f"{title}: train loss {trained['train_loss']:.3f} top-1 {trained['train_top1']:.3f}, val loss "
            f"{scores.mean_loss:.3f} top-1 {scores.top1:.3f} top-5 {scores.top5:.3f}, "
            f"{trained['images_per_s']:.0f} images/s, waits for data {trained['data_wait']:.0%}"
        )
        print(line, file=sys.stderr, flush=True)


def last_scores(run_dir: Path) -> dict[str, Any]:
    """The scores of the last validation in metrics.jsonl: loss, top1, top5, count; empty before the first one."""
    epochs = [event for event in read_events(run_dir / "metrics.jsonl") if isinstance(event, EpochEvent)]
    if not epochs:
        return {}
    last = epochs[-1]
    return {"loss": last.val_loss, "top1": last.val_top1, "top5": last.val_top5, "count": last.val_count}


class Manifest(msgspec.Struct):
    """manifest.json: the run's settings, its data, and an entry for each session, one per start of the run."""

    config: dict[str, Any]
    data: dict[str, Any]
    sessions: list[dict[str, Any]]


def read_manifest(run_dir: Path) -> Manifest:
    """Raises InputError if the run has no manifest, or it is damaged."""
    path = run_dir / "manifest.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}: missing or damaged ({error}); remove it or restore it from a copy"
        ) from error


def write_manifest(run_dir: Path, config: Config, data: PreparedSet, session: dict[str, Any]) -> None:
    """Writes manifest.json anew, with one more session."""
    path = run_dir / "manifest.json"
    sessions = read_manifest(run_dir).sessions if path.exists() else []
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    sessions.append({"started": started, **session, **surroundings()})
    content = {
        "config": config.to_json(),
        "data": {"name": data.name, "hash": data.hash, "source": data.source, "path": str(data.path)},
        "sessions": sessions,
    }
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
