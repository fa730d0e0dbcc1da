"""Checkpoints: written beside and renamed, loaded without running code, and enough to continue to the bit.

No random state is kept: after the first weights, all randomness is a function of (seed, epoch, sample).
"""

from __future__ import annotations

import errno
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
# What a continued run may be given anew: it changes where and how far the run goes, not what it computes.
FREE = {"max_steps", "threads", "checkpoint_every", "timeout", "decode", "backend", "profile_steps"}
KEYS = {"format", "config", "model", "optimizer", "scaler", "position", "classes", "words", "data_hash"}


def save(path: Path, content: dict[str, Any], *, best: bool, claim: RunLock | None = None) -> None:
    """Replaces `path` by a checkpoint in one step; with `best`, best.pt beside it becomes its copy.

    Raises InputError if the disk is full or `claim` is lost; the checkpoint that was there stays.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    try:
        with atomic_write(path) as beside:
            with beside.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if claim is not None:
                claim.check()
            if best:
                with atomic_write(path.with_name("best.pt")) as copy:
                    shutil.copyfile(beside, copy)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = f"the checkpoint of before is kept ({path})" if path.exists() else "there was none before"
        raise InputError(
            f"{path}: no space left on the disk; {kept}; free some and run the command again"
        ) from error


class Writer:
    """Saves behind the training's back: `save` returns when the state is copied, and one thread writes it.

    A save waits for the one before it, and raises what that one met. Leaving waits for the last.
    """

    def __init__(self, path: Path, claim: RunLock | None) -> None:
        self.path, self.claim = path, claim
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.under_way: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown()

    def save(self, content: dict[str, Any], *, best: bool) -> None:
        self.finish()
        self.under_way = self.pool.submit(save, self.path, _on_cpu(content), best=best, claim=self.claim)

    def finish(self) -> None:
        """Waits for the save under way. Raises InputError if it failed."""
        before, self.under_way = self.under_way, None
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
    """When a checkpoint is due, besides the ends of epochs: after so many steps, or so many seconds."""

    def __init__(self, config: Config) -> None:
        self.steps, self.seconds = config.checkpoint_interval
        self.last = time.monotonic()

    def after_time(self) -> bool:
        """True once for each interval of time, by this process's clock."""
        if self.seconds and time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            return True
        return False

    def after_steps(self, step: int) -> bool:
        return self.steps > 0 and step % self.steps == 0


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. Raises InputError if it is missing, damaged or not one of ours."""
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
            f"{path}: a checkpoint of format {content['format']}, this version reads format {FORMAT}"
        )
    return content


def check_same_run(path: Path, content: dict[str, Any], config: Config, data_hash: str) -> None:
    """Raises InputError unless the checkpoint is of a run with this configuration on this data."""
    before, now = content["config"], config.to_json()
    # A checkpoint read back has lists where the configuration has tuples.
    changed = [k for k in now if k not in FREE and _plain(before.get(k)) != _plain(now[k])]
    if changed:
        first = changed[0]
        raise InputError(
            f"{path}: this run was started with {first} {_plain(before.get(first))} and not {_plain(now[first])}; "
            "give the same flags, or another --run-dir"
        )
    if content["data_hash"] != data_hash:
        raise InputError(
            f"{path}: this run was trained on other data; give the same --data, or another --run-dir"
        )


def load_model(network: Network, path: Path, content: dict[str, Any]) -> None:
    """Puts the checkpoint's weights into `network`. Raises InputError naming the first tensor that does not fit."""
    own, theirs = network.state_dict(), content["model"]
    for name in [*own, *theirs]:
        if name not in theirs or name not in own or own[name].shape != theirs[name].shape:
            raise InputError(
                f"{path}: a checkpoint of another network: {name} does not fit; give its own flags or run"
            )
    network.load_state_dict(theirs)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
