"""--start-size: training images that grow from epoch to epoch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastnet.config import sample
from fastnet.data.default import default_set
from fastnet.distributed.ranks import Runtime
from fastnet.input.streams import Batch, micro_batches
from fastnet.training.batches import Streamed
from fastnet.training.trainer import Trainer
from tests.support.runs import assert_same_end, events
from tests.support.tiny import run_here

STEPS = 5  # of 8 images, of 42
FLAGS = [
    "--network",
    "baseline",
    "--head-epochs",
    "0",
    "--epochs",
    "2",
    "--start-size",
    "32",
    "--image-size",
    "64",
]


def test_an_epoch_at_each_size(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image comes when it would without the flag. Validation and the average's batch norms see full size."""
    trained: list[tuple[int, list[int]]] = []
    validated: set[int] = set()
    take = Streamed.take

    def noted(self: Streamed) -> Batch:
        batch = take(self)
        trained.append((batch.x.shape[2], batch.index.tolist()))
        return batch

    def note(network: torch.nn.Module, x: tuple[Any, ...]) -> None:
        if network is not made.network:
            validated.add(x[0].shape[2])

    monkeypatch.setattr(Streamed, "take", noted)
    settings: dict[str, Any] = {
        "start_size": 32,
        "image_size": 64,
        "batch_size": 8,
        "epochs": 2,
        "average_last": 2,
        "threads": 1,
    }
    config = replace(sample("baseline"), **settings)
    made = Trainer(config, default_set(tiny_set), tmp_path / "run", Runtime(torch.device("cpu")))
    made.network.register_forward_pre_hook(note)
    made.fit()
    order = micro_batches(np.arange(42), 8, 1, config.seed, 0, 1, epoch=0, step=0)
    assert [index for _, index in trained] == [next(order)[1].tolist() for _ in range(2 * STEPS)]
    assert [size for size, _ in trained] == [32] * STEPS + [64] * STEPS
    assert validated == {64}
    assert [event["image_size"] for event in events(tmp_path / "run", "epoch")] == [32, 64]


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_bit(tiny_set: Path, tmp_path: Path) -> None:
    """Stopped at the change: a momentum or a step lost there would show. CutMix's boxes lie in images of both sizes."""
    flags = [*FLAGS, "--cutmix", "1"]
    run_here(tiny_set, tmp_path / "whole", *flags)
    for stop in (str(STEPS), "7"):
        run_here(tiny_set, tmp_path / "parts", *flags, "--max-steps", stop)
    run_here(tiny_set, tmp_path / "parts", *flags)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
