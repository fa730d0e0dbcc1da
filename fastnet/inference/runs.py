from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.files import short_names
from fastnet.network.network import Network
from fastnet.training.checkpoint import load, load_model
from fastnet.training.state import TrainState


@dataclass(frozen=True)
class Run:
    """A trained network, read back: `model` is in evaluation mode on the runtime's device."""

    config: Config
    model: Network
    classes: list[str]
    words: list[str]
    step: int


def load_run(run: Path, runtime: Runtime, which: str = "best") -> Run:
    """Reads the network that a run directory holds, with `which` of its checkpoints: best or last.

    Raises InputError if there is no run, no such checkpoint, or it is damaged.
    """
    if not run.is_dir():
        raise InputError(f"{run}: no such run; give the directory that train.py wrote (--run-dir)")
    path = run / f"{which}.pt"
    content = load(path)
    # What ran the LSTMs in training need not be here.
    config = replace(Config.from_json(content["config"]), backend="auto")
    network = Network(config, len(content["classes"]))
    load_model(network, path, content)
    network.to(runtime.device).eval()
    position = TrainState(**content["position"])
    return Run(config, network, content["classes"], content["words"], position.step)


def load_runs(paths: Sequence[Path], which: str, runtime: Runtime) -> dict[str, Run]:
    """Runs of one class list, by short names. Raises InputError for one that cannot be used, differs or repeats."""
    names = short_names(paths)
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: the run is named twice; name each once")
    runs = {name: load_run(path, runtime, which) for name, path in zip(names, paths, strict=True)}
    for name, run in runs.items():
        check_classes(f"run {name}", run.classes, f"run {names[0]}", runs[names[0]].classes)
    return runs


def check_classes(one: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Raises InputError unless both have the same classes in the same order, since a label is a position in them."""
    if list(classes) != list(others):
        odd = sorted(set(classes) ^ set(others))
        what = f"{len(classes)} and {len(others)}, {odd[0]} in one alone" if odd else "in another order"
        raise InputError(f"{one}: its classes are not those of {other} ({what}); use what belongs together")
