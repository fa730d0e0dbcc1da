"""The Python interface, for notebooks and other programs; docs/python.md is a tour.

Shapes: B images of a batch, N images in all, K classes, S image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from fastnet.config import Augment
from fastnet.data import prepared
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.device import threads_per_rank
from fastnet.distributed.ranks import Runtime, single_process
from fastnet.errors import InputError
from fastnet.inference import runs, scores
from fastnet.inference.images import images_as_split
from fastnet.inference.runs import TrainedRun
from fastnet.input.device import eval_stream, train_stream
from fastnet.input.spec import InputSpec, resolve_decode
from fastnet.input.streams import Batch

__all__ = [
    "Augment",
    "Batch",
    "InputError",
    "PreparedSet",
    "TrainedNetwork",
    "batches",
    "load_run",
    "open_set",
]


def open_set(path: str | Path) -> PreparedSet:
    """Opens a prepared set without reading its images. Raises InputError if there is none, or it is damaged."""
    return prepared.open_set(Path(path))


def batches(
    data: PreparedSet,
    split: str = "train",
    *,
    image_size: int = 224,
    batch_size: int = 128,
    augment: Augment | None = None,
    seed: int = 0,
    epoch: int = 0,
    decode: str = "auto",
    device: str = "auto",
) -> Iterator[Batch]:
    """One epoch of a split as batches (x, y, index) on the device, in float32.

    x: [B, 3, S, S] in channels_last, normalised with ImageNet's mean and standard deviation. y: [B] int64, -1 where
    unlabelled. index: [B] positions in the split. A batch is valid until the next one is taken.

    Without `augment`, every image once, in order, resized and cropped as in validation. With it, as in training:
    shuffled, cropped and flipped as (seed, epoch, image) decide, without the last incomplete batch.
    """
    _check_batch_size(batch_size)
    chosen = single_process(device).device
    spec = InputSpec(image_size, chosen, torch.float32, resolve_decode(decode, chosen), threads_per_rank())
    if split not in data.splits:
        raise InputError(f"{data.path}: has no {split} split; choose one of {', '.join(data.splits)}")
    images = data.splits[split]
    if augment is None:
        with closing(eval_stream(images, spec, batch_size=batch_size)) as every:
            yield from every
    else:
        stream = train_stream(images, spec, augment, batch_size=batch_size, seed=seed, epoch=epoch)
        with closing(stream):
            yield from islice(stream, len(stream))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size {batch_size}: must be at least 1")


class TrainedNetwork:
    """A run's network, ready to predict. `classes` are the labels, `words` their readable names."""

    def __init__(self, run: TrainedRun, runtime: Runtime) -> None:
        self.run, self.runtime = run, runtime
        self.network, self.config = run.network, run.config
        self.classes, self.words = run.classes, run.words

    @torch.inference_mode()
    def predict(self, images: Tensor | Sequence[str | Path], batch_size: int = 128) -> Tensor:
        """Softmax scores [N, K] float32 on the CPU.

        images: a tensor [N, 3, S, S] as `batches` gives it, with S the run's image size, or paths of image files in
        any of the formats of `inference.images`. Raises InputError for a file that is missing or damaged.
        """
        _check_batch_size(batch_size)
        if isinstance(images, Tensor):
            parts = []
            for part in images.split(batch_size):
                x = part.to(self.runtime.device, memory_format=torch.channels_last)
                with self.runtime.autocast():
                    parts.append(self.network(x).softmax(dim=1).cpu())
            return torch.cat(parts)
        files = [Path(file) for file in images]
        if not files:
            return torch.empty(0, len(self.run.classes))
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: no such file")
        split = images_as_split(files)
        return scores.logits_of(self.run, split, batch_size, self.runtime, "images").softmax(dim=1)


def load_run(run_dir: str | Path, checkpoint: str = "best", device: str = "auto") -> TrainedNetwork:
    """The network of a run directory, from its best or last checkpoint. Raises InputError if there is none."""
    runtime = single_process(device)
    run = runs.load_run(Path(run_dir), runtime, checkpoint)
    return TrainedNetwork(run, replace(runtime, amp=run.amp))
