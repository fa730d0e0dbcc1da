"""A trainer to take single steps with: 32 px, batches of 8, both phases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastnet.config import sample
from fastnet.data.default import default_set
from fastnet.distributed.ranks import Runtime
from fastnet.training.running import RunningPhase
from fastnet.training.state import TrainState
from fastnet.training.trainer import Trainer


class RoundedImages(Runtime):
    """On the CPU too, images are as rounded as those that DALI makes for a GPU in half precision."""

    @property
    def image_dtype(self) -> torch.dtype:
        return torch.float32 if self.amp is None else torch.float16


@contextlib.contextmanager
def tiny_trainer(
    network: str,
    device: str,
    amp: torch.dtype | None,
    data: Path,
    run_dir: Path,
    *,
    backend: Literal["auto", "torch"] = "auto",
    runtime: Runtime | None = None,
    **settings: Any,
) -> Iterator[Trainer]:
    """A trainer with its resources open, before its first phase. Its steps are plain ones, not CUDA graphs.

    `runtime`: one rank's among several, in place of `device` and `amp`.
    """
    tiny = {"image_size": 32, "batch_size": 8, "head_epochs": 1, "epochs": 1, "warmup": 0.0, "threads": 1}
    config = replace(sample(network), backend=backend, **{**tiny, "cuda_graph": "off", **settings})
    runtime = runtime or RoundedImages(torch.device(device), amp=amp)
    trainer = Trainer(config, default_set(data), run_dir / f"{network} {device} {amp}", runtime)
    trainer.resume()
    with trainer.resources():
        yield trainer


def begin(trainer: Trainer, phase: int) -> RunningPhase:
    """Brings `trainer` to the first step of a phase."""
    trainer.state = TrainState(phase=phase)
    trainer.begin_phase()
    trainer.counter.reset()
    assert trainer.running
    return trainer.running
