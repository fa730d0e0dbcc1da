"""What a run trains with: everything that was "auto" resolved, and its input streams."""

from __future__ import annotations

from typing import Any

import torch

from fastnet.config import Config
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.device import threads_per_rank
from fastnet.distributed.ranks import Runtime
from fastnet.input.graph import InputSpec, resolve_decode
from fastnet.input.streams import EvalStream, TrainStream
from fastnet.network.network import lstm_backend
from fastnet.training.state import TrainState


def choices(config: Config, runtime: Runtime) -> dict[str, Any]:
    """What runs where. Raises InputError for a choice that cannot run here."""
    dtype = runtime.amp or torch.float32
    return {
        "device": runtime.device.type,
        "ranks": runtime.world_size,
        "precision": str(dtype).removeprefix("torch."),
        "decode": resolve_decode(config.decode, runtime.device),
        "threads": config.threads or threads_per_rank(),
        "lstm_backend": lstm_backend(config, runtime.device, dtype),
    }


def open_streams(
    config: Config, data: PreparedSet, runtime: Runtime, state: TrainState, chosen: dict[str, Any]
) -> tuple[TrainStream, EvalStream]:
    """This rank's training stream, from where the run is, and its share of the validation split."""
    spec = InputSpec.of(config, runtime.device, runtime.image_dtype, chosen["decode"], chosen["threads"])
    place = {"rank": runtime.rank, "world_size": runtime.world_size}
    train_stream = TrainStream(
        data.splits["train"],
        spec,
        config.augment,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        epoch=state.epoch,
        step=state.step_in_epoch,
        **place,
    )
    share = max(1, config.batch_size // runtime.world_size // config.accumulate)
    return train_stream, EvalStream(data.splits["val"], spec, batch_size=share, **place)
