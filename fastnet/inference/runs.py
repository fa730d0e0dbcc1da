"""Trained networks, read back from their run directories."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastnet.config import Config
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.device import nearest_precision
from fastnet.distributed.memory import memory_for
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError, printable
from fastnet.files import short_names
from fastnet.network.network import Network
from fastnet.training.checkpoint import load, load_model


@dataclass(frozen=True)
class TrainedRun:
    """A trained network: `network` is in evaluation mode on the runtime's device, and computes in `amp`: what
    the `--precision` of its training means here."""

    config: Config
    network: Network
    classes: list[str]
    words: list[str]
    step: int
    data_hash: str
    amp: torch.dtype | None


def load_run(
    run_dir: Path, runtime: Runtime, which: str = "best", changes: dict[str, Any] | None = None
) -> TrainedRun:
    """Reads the network of a run directory from `which` of its checkpoints: best or last.

    `changes` replace settings of its training that leave its weights alone, such as eval_crop. Raises InputError if
    there is no run, no such checkpoint, it is damaged, or a change is out of range.
    """
    check_run(run_dir)
    path = run_dir / f"{which}.pt"
    saved = load(path)
    # Training may have used an LSTM backend that this machine lacks.
    config = replace(saved.config, backend="auto", **changes or {})
    with memory_for(f"{run_dir}: its network", runtime.device, "free some of it, or use --device cpu"):
        network = Network(config, len(saved.classes))
        load_model(network, path, saved.result)
        network.to(runtime.device).eval()
    amp = nearest_precision(config.precision, runtime.device)
    return TrainedRun(config, network, saved.classes, saved.words, saved.position.step, saved.data_hash, amp)


def check_run(run_dir: Path) -> None:
    """Raises InputError if there is no such directory."""
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run; give the directory that train.py wrote (--run-dir)")


def load_runs(
    run_dirs: Sequence[Path], which: str, runtime: Runtime, changes: dict[str, Any] | None = None
) -> dict[str, TrainedRun]:
    """Runs with the same classes, by short names, each as `load_run` reads it.

    Raises InputError for one that cannot be used, or is named twice.
    """
    names = short_names(run_dirs)
    places = [os.path.realpath(path) for path in run_dirs]
    for place, path in zip(places, run_dirs, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{path}: the run is named twice; name each once")
    runs = {name: load_run(path, runtime, which, changes) for name, path in zip(names, run_dirs, strict=True)}
    for name, run in runs.items():
        check_classes(f"run {name}", run.classes, f"run {names[0]}", runs[names[0]].classes)
    return runs


def check_set(data: PreparedSet, runs: dict[str, TrainedRun]) -> None:
    """Raises InputError unless the set has the classes of the runs, which `load_runs` has compared with each other.
    Names on stderr the runs that were trained on another set, and so perhaps on these images."""
    name, run = next(iter(runs.items()))
    check_classes(f"set {data.path}", data.classes, f"run {name}", run.classes)
    for name, run in runs.items():
        if run.data_hash != data.hash:
            line = f"{name}: was trained on another set than {data.path}, perhaps on images of its val split"
            print(printable(line), file=sys.stderr)


def check_classes(one: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Raises InputError unless both have the same classes in the same order, since a label is a position in them."""
    if list(classes) != list(others):
        odd = sorted(set(classes) ^ set(others))
        only = f"{len(classes)} and {len(others)}; only one of them has {odd[0]}" if odd else ""
        what = only or "in another order"
        raise InputError(
            f"{one}: its classes are not those of {other} ({what}); use a set and runs that match"
        )
