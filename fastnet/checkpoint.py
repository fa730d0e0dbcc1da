"""Checkpoints: written beside and renamed, loaded without running code, and enough to continue to the bit.

No random state is kept: after the first weights, all randomness is a function of (seed, epoch, sample).
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastnet.cli import InputError
from fastnet.config import Config
from fastnet.files import replaced
from fastnet.model import Network
from fastnet.runtime import Runtime

FORMAT = 1
# What a continued run may be given anew: it changes where and how far the run goes, not what it computes.
FREE = {"max_steps", "threads", "checkpoint_every", "decode", "backend", "profile_steps"}


KEYS = {"format", "config", "model", "optimizer", "scaler", "position", "classes", "words", "data_hash"}


@dataclass
class Position:
    """How far a run is. Epochs and steps count what is done; `step_in_epoch` is of the epoch under way."""

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


@dataclass(frozen=True)
class Run:
    """A trained network, read back: `model` is in evaluation mode on the runtime's device."""

    config: Config
    model: Network
    classes: list[str]
    words: list[str]
    step: int


def save(path: Path, content: dict[str, Any], *, best: bool) -> None:
    """Replaces `path` by a checkpoint in one step; with `best`, best.pt beside it becomes its copy.

    Raises InputError if the disk is full; the checkpoint that was there stays.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    try:
        with replaced(path) as beside:
            with beside.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if best:
                with replaced(path.with_name("best.pt")) as copy:
                    shutil.copyfile(beside, copy)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        kept = f"the checkpoint of before is kept ({path})" if path.exists() else "there was none before"
        raise InputError(
            f"{path}: no space left on the disk; {kept}; free some and run the command again"
        ) from error


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
            "give the same flags, or another --run"
        )
    if content["data_hash"] != data_hash:
        raise InputError(
            f"{path}: this run was trained on other data; give the same --data, or another --run"
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


def load_run(run: Path, runtime: Runtime, which: str = "best") -> Run:
    """Reads the network that a run directory holds, with `which` of its checkpoints: best or last.

    Raises InputError if there is no run, no such checkpoint, or it is damaged.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such run; give the directory that train.py wrote (--run)")
    path = run / f"{which}.pt"
    content = load(path)
    # What ran the LSTMs in training need not be here.
    config = replace(Config.from_json(content["config"]), backend="auto")
    network = Network(config, len(content["classes"]))
    load_model(network, path, content)
    network.to(runtime.device).eval()
    position = Position(**content["position"])
    return Run(config, network, content["classes"], content["words"], position.step)


@contextmanager
def claimed(run: Path, runtime: Runtime) -> Iterator[None]:
    """Makes the directory `run` and holds it for this process; removes what a killed one left half written.

    Raises InputError, on every rank, if it cannot be made or another process trains there.
    """
    held = runtime.together(lambda: _claim(run) if runtime.is_main else None)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def _claim(run: Path) -> int:
    """The open directory that carries the lock."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        held = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"--run {run}: cannot be made ({error.strerror}); choose another place") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise InputError(
            f"{run}: another process is training there; wait for it, or give another --run"
        ) from error
    for path in [*run.glob(".*.pt.*"), *run.glob(".manifest.json.*")]:
        path.unlink(missing_ok=True)
    return held


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
