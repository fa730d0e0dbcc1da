"""What a training step asks of the device, held to budgets.json. Kernels are counted and dropped.

The numbers may only go down: a step that asks for less fails too, until its number is committed. They hold for the
versions in constraints.txt. `launches` counts one for each operator of cuBLAS and cuDNN.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from triton import knobs

import softgpu
from fastnet.training.evaluation import evaluate
from fastnet.training.trainer import Trainer
from tests.kernels.test_gpu import (
    test_one_binary_for_every_batch_size as test_one_binary_for_every_batch_size,
)
from tests.softgpu.trainers import begin, tiny_trainer

BUDGETS = Path(__file__).parents[1] / "budgets.json"
STEPS_BEFORE = (
    2  # after these nothing is compiled or made for the first time, and the allocator has its blocks
)


def step_costs(trainer: Trainer) -> dict[str, int]:
    for _ in range(STEPS_BEFORE):
        trainer.train_step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with softgpu.watch() as seen:
        trainer.train_step()
    assert not seen.waits, seen.waits
    return {
        "launches": seen.counts["kernels"] + seen.counts["triton"],
        "copies_to_device": seen.counts["h2d"],
        "copies_to_host": seen.counts["d2h"],
        "copies_from_pageable": seen.counts["pageable"],
        "allocations": torch.cuda.memory_stats()["allocation.all.allocated"] - before,
        "cuda_mallocs": seen.counts["mallocs"] + seen.counts["host_allocs"],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", ["baseline", "lstm"])
def test_a_step_keeps_its_budget(network: str, dtype: torch.dtype, tiny_set: Path, tmp_path: Path) -> None:
    found = {}
    with tiny_trainer(network, "cuda", dtype, tiny_set, tmp_path) as trainer:
        for index, phase in enumerate(trainer.phases):
            begin(trainer, index)
            found[phase.name] = step_costs(trainer)
    committed = json.loads(BUDGETS.read_text())[network][str(dtype).removeprefix("torch.")]
    assert found == committed, f"what fell is to be written to {BUDGETS.name}, what rose to be mended"


def test_kernels_are_compiled_before_the_first_step(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is left to a step or to validation, and none adds floating-point numbers in an order that may change."""
    seen: list[str] = []

    def note(*, src: Any, metadata_group: dict[str, str], **_: Any) -> None:
        (ptx,) = (Path(path) for path in metadata_group.values() if path.endswith(".ptx"))
        assert not re.search(r"\b(atom|red)\.[^;]*\.b?f(16|32|64)", ptx.read_text())
        seen.append(src.fn.__name__)

    monkeypatch.setattr(knobs.compilation, "listener", note)
    with tiny_trainer("lstm", "cuda", torch.float32, tiny_set, tmp_path) as trainer:
        for index in range(len(trainer.phases)):
            begin(trainer, index)
            trainer.train_step()
            evaluate(trainer.network, trainer.val_stream, trainer.runtime)
    assert not [name for name in seen if name != "images_kernel"], seen
