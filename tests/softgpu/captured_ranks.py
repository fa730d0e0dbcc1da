"""What each of two ranks on softgpu runs for test_ranks.py: steps of data parallel training, as CUDA graphs and not.

python -m softgpu --devices 2 -m tests.softgpu.captured_ranks SET DIR, under torchrun. Ends with 0 where all is right.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import softgpu
from fastnet.distributed.ranks import Runtime, joined
from fastnet.errors import InputError
from fastnet.training import capture
from fastnet.training.trainer import Trainer
from tests.softgpu.trainers import begin, tiny_trainer

STEPS = 2
SETTINGS: dict[str, Any] = {"decode": "raw", "optimizer": "adamw", "backend": "torch"}


# Alive when the ranks part, as a trainer that somebody keeps: its graph must not be, NCCL would wait for that.
kept: list[Trainer] = []


class OneRankWaits(torch.autograd.Function):
    """Passes x on. The backward pass asks the device for a number on rank 1."""

    rank = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        if OneRankWaits.rank == 1:
            dy.sum().item()
        return dy


def trained(
    runtime: Runtime, data: Path, run: Path, graph: str, *, accumulate: int = 1, waits: bool = False
) -> tuple[dict[str, Tensor], str]:
    """Weights after some steps of the whole network, and what the manifest says of the graph."""
    settings = {**SETTINGS, "cuda_graph": graph, "accumulate": accumulate}
    with tiny_trainer("baseline", "", None, data, run / graph, runtime=runtime, **settings) as made:
        kept.append(made)
        if waits:
            made.network.backbone.layer3.register_forward_hook(lambda _, x, y: OneRankWaits.apply(y))
        begin(made, 1)
        with softgpu.watch() as seen:
            for _ in range(STEPS):
                made.train_step()
        replayed = graph == "on"
        assert seen.counts["graph_launches"] == replayed * STEPS
        assert bool(seen.operators["c10d::allreduce_"]) != replayed
        # Plain, DistributedDataParallel waits for its first ten steps' times.
        assert not (replayed and seen.waits), seen.waits[0]
        session = json.loads((made.run_dir / "manifest.json").read_text())["sessions"][-1]
        weights = {name: t.cpu() for name, t in made.network.state_dict().items()}
        return weights, session.get("cuda_graph_full", "")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def summed(runtime: Runtime, data: Path, folder: Path) -> None:
    plain, _ = trained(runtime, data, folder / "two", "off", accumulate=2)
    replayed, said = trained(runtime, data, folder / "two", "on", accumulate=2)
    assert said == "on, bit for bit as plain steps", said
    assert equal(plain, replayed)


def broken_off(runtime: Runtime, data: Path, folder: Path) -> None:
    """Both go on with plain steps, the one whose capture went well, too."""
    plain, _ = trained(runtime, data, folder / "one", "off")
    alone, said = trained(runtime, data, folder / "one", "auto", waits=True)
    assert said.startswith("off, the training step cannot be captured ("), said
    assert equal(plain, alone)
    try:
        trained(runtime, data, folder / "one", "on", waits=True)
    except InputError as error:
        assert str(error).startswith("--cuda-graph on: the training step cannot be captured ("), error
    else:
        raise AssertionError("not refused")


def main(check: str, data: str, folder: str) -> None:
    capture.COMPARED = 1  # a step of two ranks takes half a second
    with joined(timeout=60) as runtime:
        runtime.amp = torch.float16
        OneRankWaits.rank = runtime.rank
        {"summed": summed, "broken_off": broken_off}[check](runtime, Path(data), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
