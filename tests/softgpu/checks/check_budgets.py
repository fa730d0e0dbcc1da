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
from benchmarks import host
from benchmarks.harness import Table
from fastnet.config import paper
from fastnet.data.prepared import open_set
from fastnet.distributed.ranks import Runtime
from fastnet.network.network import Network
from fastnet.training.capture import CapturedStep
from fastnet.training.evaluation import evaluate
from fastnet.training.step import TrainStep
from fastnet.training.trainer import Trainer
from tests.kernels.test_gpu import (
    test_one_binary_for_every_batch_size as test_one_binary_for_every_batch_size,
)
from tests.softgpu.trainers import begin, tiny_trainer
from tests.support import apex

BUDGETS = Path(__file__).parents[1] / "budgets.json"
STEPS_BEFORE = (
    2  # after these nothing is compiled or made for the first time, and the allocator has its blocks
)


def step_costs(trainer: Trainer, *others: str) -> dict[str, int]:
    """`others`: further counts of softgpu's."""
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
        **{name: seen.counts[name] for name in others},
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", ["baseline", "lstm"])
def test_a_step_keeps_its_budget(network: str, dtype: torch.dtype, tiny_set: Path, tmp_path: Path) -> None:
    found = {}
    for index, phase in enumerate(("head", "full")):
        run = tmp_path / phase
        with tiny_trainer(network, "cuda", dtype, tiny_set, run, decode="gpu") as trainer:
            begin(trainer, index)
            found[phase] = step_costs(trainer)
    committed = json.loads(BUDGETS.read_text())["plain"][network][str(dtype).removeprefix("torch.")]
    assert found == committed, f"what fell is to be written to {BUDGETS.name}, what rose to be mended"


@pytest.mark.parametrize(("kind", "torchs", "apexs"), [("sgd", 2, 2), ("adamw", 4, 3)])
def test_launches_of_the_optimisers(kind: str, torchs: int, apexs: int) -> None:
    """In docs/operations.md. Apex's by the rule of its source, as NVIDIA's kernels cannot be launched here."""
    network = Network(paper("baseline"), 200).cuda()
    plain = [p for p in network.parameters() if p.ndim == 1]
    decayed = [p for p in network.parameters() if p.ndim > 1]
    momentum = {"momentum": 0.9, "nesterov": True} if kind == "sgd" else {}
    classes: dict[str, tuple[Any, Any]] = {
        "sgd": (torch.optim.SGD, apex.FusedSGD),
        "adamw": (torch.optim.AdamW, apex.FusedAdam),
    }
    (torch_class, apex_class), groups = classes[kind], [{"params": decayed}, {"params": plain}]
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    fused = torch_class(groups, lr=0.1, fused=True, **momentum)
    fused.step()
    with softgpu.watch() as seen:
        fused.step()
    before = apex.launches
    apex_class(groups, lr=0.1, **momentum).step()
    assert (seen.counts["kernels"], apex.launches - before) == (torchs, apexs)


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
        before = list(seen)
        for index in range(len(trainer.phases)):
            begin(trainer, index)
            trainer.train_step()
            evaluate(trainer.network, trainer.val_stream, trainer.runtime)
    assert seen == before and "images_kernel" in before and len(before) > 10


@pytest.mark.parametrize("decode", ["device", "gpu"])
@pytest.mark.parametrize("network", ["baseline", "lstm"])
def test_a_replayed_step_keeps_its_budget(network: str, decode: str, tiny_set: Path, tmp_path: Path) -> None:
    """A set in GPU memory: the rate is set, the graph launched, an event recorded. DALI: its batch is copied, too."""
    found = {}
    for index, phase in enumerate(("head", "full")):
        run = tmp_path / phase
        with tiny_trainer(network, "cuda", torch.bfloat16, tiny_set, run, decode=decode) as trainer:
            running = begin(trainer, index)
            plain = running.launch
            assert isinstance(plain, TrainStep)
            plain.batches = running.batches.fixed(torch.bfloat16)
            for _ in range(STEPS_BEFORE):
                plain()
            running.launch = replayed = CapturedStep(plain)
            replayed.capture()
            found[phase] = step_costs(trainer, "graph_launches", "d2d", "events")
    committed = json.loads(BUDGETS.read_text())["replayed"][network][decode]
    assert found == committed, f"what fell is to be written to {BUDGETS.name}, what rose to be mended"


def test_the_hosts_part_of_a_replay(tiny_set: Path) -> None:
    """In benchmarks/results: at most five CUDA calls a step, none of them a wait."""
    table, runtime = Table("step-softgpu", quick=True), Runtime(torch.device("cuda"), amp=torch.bfloat16)
    # Small batches, so that no epoch ends meanwhile: the next one's order would be a copy and a launch more.
    case = {"network": "lstm", "phase": "full", "image_size": 32, "batch": 2, "threads": 1}
    name = "CUDA graph, set on the device"
    host.measure(table, case, name, host.VARIANTS[name], open_set(tiny_set), runtime)
    found = {row["quantity"]: float(row["p50"]) for row in table.rows}
    assert found.keys() == {"launches", "CUDA calls", "synchronisations", "host ms"}
    assert found["launches"] <= 2 and found["CUDA calls"] <= 5 and found["synchronisations"] == 0
    assert found["host ms"] > 0
