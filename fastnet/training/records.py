"""What a run records besides checkpoints: manifest.json, metrics.jsonl, TensorBoard events, lines on stderr."""

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
from fastnet.data.entries import readable
from fastnet.data.prepared import PreparedSet
from fastnet.errors import InputError
from fastnet.files import atomic_write, refuse_link
from fastnet.metrics import Totals
from fastnet.provenance import surroundings
from fastnet.training.events import EpochEvent, FinalEvent, read_events
from fastnet.training.manifest import Manifest, read_manifest
from fastnet.training.state import TrainState


class Recorder:
    """Writes the records of a run, on rank 0; on other ranks its methods do nothing.

    `kept` is the length in bytes that metrics.jsonl had at the checkpoint from which the run continues. What was
    written after it is cut off, since those steps are done again.

    Raises InputError if metrics.jsonl is damaged, shorter than `kept`, or a link.
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
        self.close()

    def close(self) -> None:
        """Writes what TensorBoard's file still lacks. May be called again."""
        if self.main:
            self.board.close()

    def size(self) -> int:
        """Bytes in metrics.jsonl. Syncs it, because the checkpoint about to be written relies on these bytes."""
        if not self.main:
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def event(self, kind: str, **values: Any) -> None:
        """Appends a line to metrics.jsonl. The numbers of steps and epochs go to TensorBoard as well."""
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": kind, **values}) + "\n")
        if kind == "phase":
            return
        for key, value in values.items():
            if isinstance(value, float):
                self.board.add_scalar(f"{kind}/{key}", value, values["step"])

    def epoch(self, title: str, trained: dict[str, Any], scores: Totals, split: str) -> None:
        """Records an epoch: its training record, and its scores on what validates, val or holdout."""
        self.event("epoch", **trained, **as_record(scores))
        if not self.main:
            return
        line = (
            f"{title}: train loss {trained['train_loss']:.3f} top-1 {trained['train_top1']:.3f}, {split} loss "
            f"{scores.mean_loss:.3f} top-1 {scores.top1:.3f} top-5 {scores.top5:.3f}"
        )
        if "seconds" in trained:
            line += f", {trained['images_per_s']:.0f} images/s, waits for data {trained['data_wait']:.0%}"
        print(line, file=sys.stderr, flush=True)


def as_record(scores: Totals) -> dict[str, Any]:
    """Validation scores as a line of metrics.jsonl has them."""
    val = {"val_loss": scores.mean_loss, "val_top1": scores.top1, "val_top5": scores.top5}
    return {**val, "val_count": scores.images}


def outcome(run_dir: Path, state: TrainState) -> dict[str, Any]:
    """The command's result: the last validation, if there was one, how far the run is, and its files."""
    files = [str(path) for path in sorted(run_dir.glob("[!.]*"))]
    run = {"done": state.done, "step": state.step, "run": str(run_dir), "files": files}
    return {**last_scores(run_dir), **run}


def last_scores(run_dir: Path) -> dict[str, Any]:
    """Loss, top1, top5 and count of the last validation in metrics.jsonl; empty before the first one."""
    events = read_events(run_dir / "metrics.jsonl")
    epochs = [event for event in events if isinstance(event, EpochEvent | FinalEvent)]
    if not epochs:
        return {}
    last = epochs[-1]
    return {"loss": last.val_loss, "top1": last.val_top1, "top5": last.val_top5, "count": last.val_count}


def is_recorded(run_dir: Path, kept: int) -> bool:
    """Whether metrics.jsonl has a whole line after its first `kept` bytes, those of the last checkpoint.

    Raises InputError if there is no such file.
    """
    path = run_dir / "metrics.jsonl"
    try:
        return path.read_bytes()[kept:].endswith(b"\n")
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; restore it from a copy, or give another --run-dir"
        ) from error


def write_manifest(run_dir: Path, config: Config, data: PreparedSet, session: dict[str, Any]) -> None:
    """Writes manifest.json anew, with one more session."""
    path = run_dir / "manifest.json"
    sessions = read_manifest(run_dir).sessions if path.exists() else []
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    sessions.append({"started": started, **session, **surroundings()})
    facts = {"name": data.name, "hash": data.hash, "source": data.source, "path": readable(str(data.path))}
    settings = {**config.to_json(), "weights": readable(config.weights)}  # paths need not be text
    _write(path, Manifest(settings, facts, sessions))


def add_to_session(run_dir: Path, **facts: Any) -> None:
    """Adds facts to the last session in manifest.json."""
    manifest = read_manifest(run_dir)
    manifest.sessions[-1] |= facts
    _write(run_dir / "manifest.json", manifest)


def close_session(run_dir: Path, state: TrainState) -> None:
    """Notes how the last session ended, where it was killed after its last save, before it could."""
    if (run_dir / "manifest.json").exists():
        sessions = read_manifest(run_dir).sessions
        if sessions and "done" not in sessions[-1]:
            add_to_session(run_dir, to_step=state.step, done=state.done)


def _write(path: Path, manifest: Manifest) -> None:
    with atomic_write(path) as beside:
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
