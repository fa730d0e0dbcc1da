"""What trained networks say of the images of a split, and how right they are.

Shapes: R runs, N images of the split, K classes, S image size.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastnet.data.decoding import areas
from fastnet.data.prepared import PreparedSet, Split
from fastnet.distributed.device import threads_per_rank
from fastnet.distributed.memory import memory_for
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.inference.runs import TrainedRun
from fastnet.input.spec import InputSpec, resolve_decode
from fastnet.input.streams import EvalStream
from fastnet.metrics import Counter, Totals
from fastnet.progress import Progress

AT_ONCE = 1 << 26  # pixels decoded at once; 200 MB, which DALI holds up to three times


@torch.inference_mode()
def logits_of(run: TrainedRun, split: Split, batch_size: int, runtime: Runtime, title: str) -> Tensor:
    """Logits [N, K] float32 on the CPU, in the split's order. Raises InputError if any is not finite."""
    runtime = replace(runtime, amp=run.amp)
    decode = resolve_decode("auto", runtime.device)
    largest = int(areas(split.sizes).max())
    batch_size = min(batch_size, max(1, AT_ONCE // largest))
    spec = InputSpec.of(run.config, runtime.device, runtime.image_dtype, decode, threads_per_rank())
    logits = torch.empty(len(split), len(run.classes))
    at_once = f"{title}: {batch_size} images at {run.config.image_size} px at once"
    with (
        memory_for(at_once, runtime.device, "use a smaller --batch-size, or --device cpu"),
        closing(EvalStream(split, spec, batch_size=batch_size)) as stream,
        Progress(title, len(split), "images") as progress,
    ):
        for x, _, index in stream:  # [B, 3, S, S], [B]
            with runtime.autocast():
                logits[torch.from_numpy(index)] = run.network(x).cpu()
            progress.add(len(index))
    if not logits.isfinite().all():
        raise InputError(f"{title}: its network gives scores that are not finite; use another --checkpoint")
    return logits


def all_logits(runs: dict[str, TrainedRun], split: Split, batch_size: int, runtime: Runtime) -> Tensor:
    """Logits [R, N, K] of every run, as `logits_of`."""
    return torch.stack([logits_of(run, split, batch_size, runtime, name) for name, run in runs.items()])


def average_scores(logits: Tensor) -> Tensor:
    """[R, N, K] -> the mean of the runs' softmax scores [N, K], as the paper's ensemble takes it."""
    return logits.softmax(dim=2).mean(dim=0)


def count_hits(logits: Tensor, labels: np.ndarray) -> Totals:
    """Loss, top-1 and top-5 of logits [N, K] for labels [N] int64, counted as in training."""
    counter = Counter(logits.device)
    counter.add(logits, torch.tensor(labels))
    return Totals(*counter.sums.tolist())


def count_score_hits(scores: Tensor, labels: np.ndarray) -> Totals:
    """The same for softmax scores [N, K]: their logarithms are logits.

    In float64, where no two float32 scores have one logarithm. A score that underflowed to 0 counts as the smallest
    normal number, so that one image cannot make the mean loss infinite.
    """
    return count_hits(scores.double().clamp_min(torch.finfo(torch.float32).tiny).log(), labels)


def as_json(totals: Totals) -> dict[str, float]:
    """The numbers that commands print with --json."""
    return {
        "top1": totals.top1,
        "top5": totals.top5,
        "loss": totals.mean_loss,
        "count": totals.images,
        "correct1": totals.correct1,
        "correct5": totals.correct5,
    }


def labelled_split(data: PreparedSet, name: str) -> Split:
    """The split by name. Raises InputError if the set lacks it, or it has no labels."""
    if name not in data.splits:
        raise InputError(f"{data.path}: has no {name} split; choose one of {', '.join(data.splits)}")
    split = data.splits[name]
    if (split.labels < 0).any():
        raise InputError(
            f"{data.path}: its {name} split has no labels; python -m fastnet.predict works without"
        )
    return split
