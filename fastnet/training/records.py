"""What a run leaves behind besides checkpoints: manifest.json, metrics.jsonl, TensorBoard events, progress lines."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastnet.errors import InputError
from fastnet.files import atomic_write
from fastnet.provenance import surroundings

SECONDS_BETWEEN_LINES = 30


class Recorder:
    """Rank 0's records of a run directory; on other ranks every method does nothing.

    `kept` is the length in bytes of metrics.jsonl at the checkpoint that the run continues from: what was written
    after it is cut off, since those steps are done again.
    """

    def __init__(self, run: Path, *, main: bool, step: int, kept: int) -> None:
        self.main = main
        self.path = run / "metrics.jsonl"
        self.bar: tqdm | None = None
        if main:
            self.path.touch()
            if self.path.stat().st_size < kept:
                raise InputError(
                    f"{self.path}: shorter than at the last checkpoint; restore it from a copy, or give another "
                    "--run-dir"
                )
            with self.path.open("r+b") as file:
                file.truncate(kept)
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.main:
            self._close_bar()
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

    def epoch(self, title: str, trained: dict[str, Any], scores: dict[str, float]) -> None:
        """Records an epoch: what training says of itself and the validation scores."""
        val = {f"val_{key}": scores[key] for key in ("loss", "top1", "top5")}
        self.event("epoch", **trained, **val, val_count=scores["count"])
        self.say(
            f"{title}: train loss {trained['train_loss']:.3f} top-1 {trained['train_top1']:.3f}, val loss "
            f"{scores['loss']:.3f} top-1 {scores['top1']:.3f} top-5 {scores['top5']:.3f}, "
            f"{trained['images_per_s']:.0f} images/s, waits for data {trained['data_wait']:.0%}"
        )

    def begin_epoch(self, title: str, done: int, steps: int) -> None:
        self.title, self.done, self.steps, self.said = title, done, steps, time.monotonic()
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, desc=title, unit="step", leave=False)

    def step(self) -> None:
        """Shows one step more: on the bar, or where there is no terminal in a line every half minute."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            self.say(f"{self.title}: step {self.done}/{self.steps}")

    def say(self, line: str) -> None:
        if self.main:
            self._close_bar()
            print(line, file=sys.stderr, flush=True)

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def last_scores(run: Path) -> dict[str, Any]:
    """The scores of the last evaluation in metrics.jsonl: loss, top1, top5, count; empty before the first one."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = [event for event in map(json.loads, lines) if event["event"] == "epoch"]
    return {key: epochs[-1][f"val_{key}"] for key in ("loss", "top1", "top5", "count")} if epochs else {}


def write_manifest(run: Path, facts: dict[str, Any], session: dict[str, Any]) -> None:
    """Writes manifest.json: the run's `facts`, and one entry of `sessions` for each start of it."""
    path = run / "manifest.json"
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    sessions.append({"started": started, **session, **surroundings()})
    with atomic_write(path) as beside:
        beside.write_text(json.dumps({**facts, "sessions": sessions}, indent=1) + "\n", encoding="utf-8")
