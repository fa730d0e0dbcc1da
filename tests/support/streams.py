"""Training streams over a small prepared set, and their pixels, for the tests of the input pipeline."""

from __future__ import annotations

import io
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastnet.config import Augment
from fastnet.data.prepared import Split
from fastnet.input import draws as aug
from fastnet.input.spec import InputSpec
from fastnet.input.streams import Batch, TrainStream

CPU = torch.device("cpu")
TRAIN, VAL = 97, 41  # no batch size or number of ranks used in the tests divides them
GREY = 5  # every fifth image is grey
PLAIN = Augment()
POLICIES = ("none", "jitter", "trivial", "rand")


def spec(size: int = 32, decode: str = "cpu", threads: int = 1, eval_crop: float = 1.0) -> InputSpec:
    return InputSpec(size, CPU, torch.float32, decode, threads, eval_crop)


def stream(
    split: Split, augment: Augment = PLAIN, *, how: InputSpec | None = None, **options: Any
) -> TrainStream:
    return TrainStream(split, how or spec(), augment, **{"batch_size": 20, "seed": 3, **options})


def take(source: TrainStream, batches: int) -> list[Batch]:
    """The next batches, copied out of DALI's buffers."""
    with_copies = [Batch(b.x.clone(), b.y.clone(), b.index) for b in islice(source, batches)]
    source.close()
    return with_copies


def by_sample(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {int(i): x for batch in batches for i, x in zip(batch.index, batch.x, strict=True)}


def levels(x: torch.Tensor) -> np.ndarray:
    """[3, H, W] normalised -> [H, W, 3] grey levels 0..255, not rounded."""
    return x.permute(1, 2, 0).numpy() * np.array(aug.STD) + np.array(aug.MEAN)


def pil(split: Split, i: int) -> Image.Image:
    return Image.open(io.BytesIO(split.jpeg(i).tobytes())).convert("RGB")
