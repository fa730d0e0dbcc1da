"""Checkpoints: replaced in one step, loaded without running code, and enough to continue exactly.

No random state is kept: after the first weights, all randomness is a function of (seed, epoch, image).
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import time
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastnet.config import Config
from fastnet.distributed.lock import RunLock
from fastnet.errors import InputError
from fastnet.files import atomic_write
from fastnet.network.network import Network

FORMAT = 1
KEYS = {"format", "config", "model", "optimizer", "scaler", "position", "classes", "words", "data_hash"}

# Settings that may differ when a run continues. They decide where, how long and how closely watched it trains. Device,
# precision, decoder, LSTM backend and threads change the last bits of the arithmetic, not what is computed.
MAY_CHANGE = {
    "max_steps",
    "checkpoint_every",
    "log_every",
    "profile_steps",
    "timeout",
    "device",
    "threads",
    "decode",
    "backend",
}


def save(path: Path, content: dict[str, Any], *, best: bool, lock: RunLock | None = None) -> None:
    """Replaces `path` by a checkpoint in one step; with `best`, best.pt beside it becomes a copy of it.

    Raises InputError if the disk is full or `lock` was taken over; the checkpoint that was there stays.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    kept = "the previous checkpoint is intact" if path.exists() else "nothing was saved yet"
    full = f"{kept}; free some space and run the same command again"
    with atomic_write(path, full=full) as beside:
        with beside.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if lock is not None:
            lock.check()
        if best:
            with atomic_write(path.with_name("best.pt"), full=full) as copy:
                shutil.copyfile(beside, copy)


class Writer:
    """Saves in the background: `save` returns once the state is copied to the CPU, and a thread writes the file.

    A save waits for the one before it, and raises the error that one ended with. Leaving the `with` block waits for
    the last one.
    """

    def __init__(self, path: Path, lock: RunLock | None) -> None:
        self.path, self.lock = path, lock
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown()

    def save(self, content: dict[str, Any], *, best: bool) -> None:
        self.finish()
        self.pending = self.pool.submit(save, self.path, _on_cpu(content), best=best, lock=self.lock)

    def finish(self) -> None:
        """Waits for the save under way. Raises InputError if it failed."""
        before, self.pending = self.pending, None
        if before is not None:
            before.result()


def _on_cpu(value: Any) -> Any:
    """`value` with every tensor in it copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_cpu, value))
    return value


class Schedule:
    """When a checkpoint is due besides the end of an epoch: after a number of steps, or of seconds."""

    def __init__(self, config: Config) -> None:
        self.steps, self.seconds = config.checkpoint_interval
        self.last = time.monotonic()

    def after_time(self) -> bool:
        """True once per interval of time, by this process's clock."""
        if self.seconds and time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            return True
        return False

    def after_steps(self, step: int) -> bool:
        return self.steps > 0 and step % self.steps == 0


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. Raises InputError if it is missing, damaged, or not a fastnet checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such checkpoint; train the run first, or wait for its first epoch"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise InputError(
            f"{path}: damaged, not a readable checkpoint; remove it or restore it from a copy"
        ) from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise InputError(f"{path}: a PyTorch file, but not a fastnet checkpoint; give another run directory")
    if content["format"] != FORMAT:
        raise InputError(
            f"{path}: a checkpoint of format {content['format']}; this version reads format {FORMAT}"
        )
    return content


def load_last(run_dir: Path, config: Config, data_hash: str) -> dict[str, Any] | None:
    """The run's last checkpoint, None if there is none yet.

    Raises InputError for a checkpoint of another configuration or other data.
    """
    path = run_dir / "last.pt"
    if not path.exists():
        return None
    content = load(path)
    before, now = Config.from_json(content["config"]).to_json(), config.to_json()
    changed = next((name for name in now if name not in MAY_CHANGE and before[name] != now[name]), None)
    if changed:
        raise InputError(
            f"{run_dir}: this run was started with {changed} {before[changed]} and not {now[changed]}; "
            "give the same flags, or another --run-dir"
        )
    if content["data_hash"] != data_hash:
        raise InputError(
            f"{run_dir}: this run was trained on other data; give the same --data, or another --run-dir"
        )
    return content


def load_model(network: Network, path: Path, content: dict[str, Any]) -> None:
    """Puts the checkpoint's weights into `network`. Raises InputError naming the first tensor that does not fit."""
    own, theirs = network.state_dict(), content["model"]
    for name in [*own, *theirs]:
        if name not in theirs or name not in own or own[name].shape != theirs[name].shape:
            raise InputError(
                f"{path}: a checkpoint of another network: {name} does not fit; give the flags it was trained with, "
                "or another run"
            )
    network.load_state_dict(theirs)
