"""A trainer in the middle of its work, for benchmarks that time its steps."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastnet.config import Config
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.ranks import Runtime
from fastnet.input.streams import Batch
from fastnet.training.batches import Streamed
from fastnet.training.capture import own_stream
from fastnet.training.checkpoint import Writer
from fastnet.training.evaluated import Evaluated
from fastnet.training.inputs import Inputs
from fastnet.training.placement import place, splits_read
from fastnet.training.records import write_manifest
from fastnet.training.setup import choices
from fastnet.training.trainer import Trainer


class OneBatch:
    """A stream that always gives the same batch."""

    accumulate = 1

    def __init__(self, batch: Batch, steps_per_epoch: int) -> None:
        self.batch, self.steps_per_epoch = batch, steps_per_epoch

    def __next__(self) -> Batch:
        return self.batch


class OneStream:
    """A trainer's inputs that are one stream."""

    def __init__(self, stream: Any, device: torch.device) -> None:
        self.batches, self.steps_per_epoch = Streamed(stream, device, lambda _: None), stream.steps_per_epoch

    def keep_features(self, *_: Any) -> bool:
        return True

    def open(self, *_: Any) -> tuple[Streamed, None]:
        return self.batches, None


@contextlib.contextmanager
def at_phase(
    config: Config, phase: str, data: PreparedSet, runtime: Runtime, stream: Any = None
) -> Iterator[Trainer]:
    """A trainer at the start of `phase`, whose `train_step` takes batches from `stream`, or as train.py does."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trainer = Trainer(config, data, Path(folder), runtime)
        trainer.network.to(runtime.device)
        trainer.evaluated = Evaluated(trainer.network, config)
        trainer.state.phase = [p.name for p in trainer.phases].index(phase)
        chosen = choices(config, runtime) | place(config, splits_read(data, config.holdout), runtime)
        trainer.graphs = chosen["cuda_graph"]
        inputs: Any
        if stream is None:
            inputs = Inputs(config, data, runtime, chosen, lambda _: None)
            stack.callback(inputs.close)
        else:
            inputs = OneStream(stream, runtime.device)
        trainer.inputs = inputs
        write_manifest(trainer.run_dir, config, data, chosen)
        trainer.writer = stack.enter_context(Writer(trainer.run_dir / "last.pt", None))
        stack.enter_context(own_stream(runtime.device))
        stack.callback(trainer.close_phase)
        trainer.begin_phase()
        yield trainer
