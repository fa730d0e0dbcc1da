from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastnet.data.prepared import PreparedSet, Split
from fastnet.distributed.ranks import Runtime, threads_per_rank
from fastnet.errors import InputError
from fastnet.inference.runs import Run
from fastnet.input.graph import InputSpec, resolve_decode
from fastnet.input.streams import EvalStream
from fastnet.training.trainer import predict


@dataclass(frozen=True)
class Measures:
    """Scores against labels: how many images, how many right, and the mean cross-entropy in nats."""

    count: int
    correct1: int
    correct5: int
    loss: float

    @property
    def top1(self) -> float:
        return self.correct1 / self.count

    @property
    def top5(self) -> float:
        return self.correct5 / self.count

    def to_json(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, **asdict(self)}


def measure(scores: Tensor, labels: np.ndarray) -> Measures:
    """Counts how often the label comes first, and among the first five, by descending score.

    scores [N, K] float32 probabilities, labels [N] int64. Among equal scores the lower class comes first, as
    `argmax` has it: no count depends on how a sort breaks ties.
    """
    target = torch.tensor(labels)[:, None]  # [N, 1]
    own = scores.gather(1, target)  # [N, 1]
    lower = torch.arange(scores.shape[1]) < target  # [N, K]
    rank = ((scores > own) | ((scores == own) & lower)).sum(dim=1)  # [N]
    # What underflowed to 0 counts as the smallest normal number, so that one image cannot make the mean infinite.
    loss = -own.double().clamp_min(torch.finfo(torch.float32).tiny).log()  # [N, 1]
    return Measures(len(labels), int((rank < 1).sum()), int((rank < 5).sum()), float(loss.mean()))


def labelled_split(data: PreparedSet, name: str) -> Split:
    """The split by name. Raises InputError where the set lacks it, or it lacks labels."""
    if name not in data.splits:
        raise InputError(f"{data.path}: has no {name} split; choose one of {', '.join(data.splits)}")
    split = data.splits[name]
    if (split.labels < 0).any():
        raise InputError(f"{data.path}: its {name} split has no labels; python -m fastnet.predict needs none")
    return split


def scores_of(runs: dict[str, Run], split: Split, batch_size: int, runtime: Runtime) -> Tensor:
    """Softmax scores [R, N, K] float32 on the CPU, in the split's order.

    Raises InputError for a network whose scores are not finite.
    """
    every = []
    for name, run in runs.items():
        spec = InputSpec(
            image_size=run.config.image_size,
            device=runtime.device,
            dtype=runtime.image_dtype,
            decode=resolve_decode("auto", runtime.device),
            threads=threads_per_rank(),
            eval_crop=run.config.eval_crop,
        )
        with closing(EvalStream(split, spec, batch_size=batch_size)) as stream:
            batches = tqdm(stream, desc=name, unit="batch", leave=False, disable=None)
            scores = predict(run.model, batches, len(split), runtime)  # [N, K]
        if not scores.isfinite().all():
            raise InputError(
                f"{name}: its network gives scores that are not finite; use another --checkpoint"
            )
        every.append(scores)
    return torch.stack(every)
