"""Checkpoints: replaced in one step, loaded without running code, and enough to continue exactly.

No random state is kept: after the first weights, all randomness is a function of (seed, epoch, image).
"""

from __future__ import annotations

import io
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from fastnet.config import Config, first_change
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.lock import RunLock
from fastnet.errors import InputError
from fastnet.files import atomic_write
from fastnet.network.network import Network
from fastnet.network.stored import Unreadable, misfit, read_stored
from fastnet.training.phases import plan
from fastnet.training.state import TrainState

FORMAT = 1


class Updates(NamedTuple):
    """What a phase has besides weights: the states of its optimiser and its loss scaler."""

    optimizer: dict[str, Any] | None
    scaler: dict[str, Any]


@dataclass
class Checkpoint:
    """What last.pt and best.pt hold, besides the number of their format. Tensors are in `model`, `optimizer`
    and `average`.

    `optimizer` is None between two phases. `position` says how far the run is. `average` has the average of `model` in
    a run with --ema, or with --average-last once there is one.
    """

    config: Config
    model: dict[str, Any]
    optimizer: dict[str, Any] | None
    scaler: dict[str, Any]
    position: TrainState
    data_hash: str
    classes: list[str]
    words: list[str]
    average: dict[str, Any] | None = None

    @property
    def result(self) -> dict[str, Any]:
        """The weights that are evaluated."""
        return self.model if self.average is None else self.average

    @property
    def updates(self) -> Updates:
        return Updates(self.optimizer, self.scaler)


KEYS = {"format", *(field.name for field in fields(Checkpoint) if field.default is MISSING)}

# Settings that may differ when a run continues. They decide where, how long and how closely watched it trains. Decoder,
# LSTM backend, compiler and threads change the last bits of the arithmetic, not what is computed; another device may
# have another precision for --precision auto.
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
    "cuda_graph",
    "compile",
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
            # Here, too, so that nothing slow comes between the look at the lock and the renaming.
            os.fsync(file.fileno())
        if lock is not None:
            lock.check()
        if best:
            with atomic_write(path.with_name("best.pt"), full=full) as copy:
                shutil.copyfile(beside, copy)


class Writer:
    """Saves in the background: `save` has the state copied to the CPU, and a thread writes the file.

    From a GPU it is copied into pinned memory in the order of the GPU's work. The training does not wait for that, and
    its next step changes the weights only afterwards. The thread waits for all copies at once.

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
        copied = _on_cpu(content)
        ready = None
        if torch.cuda.is_initialized():
            ready = torch.cuda.Event(blocking=True)  # its thread sleeps until then
            ready.record()
        self.pending = self.pool.submit(self._write, copied, ready, best=best)

    def _write(self, content: dict[str, Any], ready: torch.cuda.Event | None, *, best: bool) -> None:
        if ready is not None:
            ready.synchronize()
        save(self.path, content, best=best, lock=self.lock)

    def finish(self) -> None:
        """Waits for the save under way. Raises InputError if it failed."""
        before, self.pending = self.pending, None
        if before is not None:
            before.result()


def _on_cpu(value: Any) -> Any:
    """`value` with every tensor in it copied to the CPU; copies from a GPU may still be under way."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
        return copy.copy_(value.detach(), non_blocking=True)
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


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU. Raises InputError if it is missing, damaged, or not a fastnet checkpoint."""
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint; train the run first, or wait for its first epoch")
    try:
        content = read_stored(path)
    except Unreadable as error:
        raise InputError(f"{path}: damaged, not a readable checkpoint ({error}); {remedy(path)}") from error
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise InputError(f"{path}: a PyTorch file, but not a fastnet checkpoint; give another run directory")
    if content["format"] != FORMAT:
        raise InputError(
            f"{path}: a checkpoint of format {content['format']}; this version reads format {FORMAT}"
        )
    try:
        saved = msgspec.convert(content, Checkpoint)
        if len(saved.words) != len(saved.classes):
            raise InputError(f"it has {len(saved.words)} words for {len(saved.classes)} classes")
        return saved
    except (msgspec.ValidationError, InputError) as error:
        raise InputError(f"{path}: damaged: {error}; {remedy(path)}") from error


def remedy(path: Path) -> str:
    """What to do about a damaged checkpoint."""
    if path.name == "last.pt" and path.with_name("best.pt").exists():
        return "restore it from a copy, or remove it to continue from best.pt"
    return "restore it from a copy, or remove it"


def load_last(run_dir: Path, config: Config, data: PreparedSet) -> Checkpoint | None:
    """The run's last checkpoint, or its best one where only that is left; None if there is none yet.

    Raises InputError for a checkpoint of another configuration or other data, or one that is nowhere in this run.
    """
    found = [path for path in (run_dir / "last.pt", run_dir / "best.pt") if path.exists()]
    if not found:
        return None
    path = found[0]
    saved = load(path)
    may_change = MAY_CHANGE
    if config.accumulate == "auto":  # the number that the run began with
        may_change = MAY_CHANGE | {"accumulate"}
    changed = first_change(saved.config, config, may_change)
    if changed:
        flag, before, now = changed
        longer = f"; to train for longer, start from its weights: --weights {path} and another --run-dir"
        raise InputError(
            f"{run_dir}: this run was started with {flag} {before} and not {now}"
            + (longer if "epochs" in flag else "; give the same flags, or another --run-dir")
        )
    if saved.data_hash != data.hash:
        raise InputError(
            f"{run_dir}: this run was trained on other data; give the same --data, or another --run-dir"
        )
    steps, phases = len(data.splits["train"]) // config.batch_size, len(plan(config))
    state = saved.position
    if not state.done and state.phase >= phases:
        raise InputError(f"{path}: damaged: it is in phase {state.phase} of {phases}; {remedy(path)}")
    if state.step_in_epoch > steps:
        raise InputError(f"{path}: damaged: it is in step {state.step_in_epoch} of {steps}; {remedy(path)}")
    return saved


def load_model(network: Network, path: Path, model: dict[str, Any]) -> None:
    """Puts a checkpoint's weights into `network`. Raises InputError naming the first tensor that does not fit."""
    own = network.state_dict()
    for name in [*own, *model]:
        if name not in model or name not in own or misfit(own[name], model[name]):
            raise InputError(
                f"{path}: a checkpoint of another network: {name} does not fit; give the flags it was trained with, "
                "or another run"
            )
    network.load_state_dict(model)


def restore(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, path: Path, state: Updates
) -> None:
    """Puts a state into the optimiser and loss scaler. Raises InputError if it, from `path`, does not fit."""
    # The rate is set before each step, and on a GPU has to stay the tensor that it is. AdamW counts its steps where the
    # weights are now, not where it was begun.
    own = ("lr", "lr_scale", "fused", "capturable")
    kept = [{key: group[key] for key in own if key in group} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state.optimizer or {})
        for group, mine in zip(optimizer.param_groups, kept, strict=True):
            group.update(mine)
        # Empty if it was not fp16 until now: what --precision auto means depends on the device.
        if state.scaler:
            scaler.load_state_dict(state.scaler)
        for group in optimizer.param_groups:
            for p in group["params"]:
                for value in optimizer.state[p].values():
                    if not isinstance(value, torch.Tensor) or value.shape not in (p.shape, ()):
                        raise ValueError("its state is not that of these parameters")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: damaged: the optimiser does not fit ({error}); {remedy(path)}") from error
