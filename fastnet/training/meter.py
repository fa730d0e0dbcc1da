from __future__ import annotations

import itertools
import resource
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Losses are summed as integers of this unit: such sums are exact, in any order and over any number of ranks.
LOSS_UNIT = 2.0**-24
LOSS, TOP1, COUNT, BAD = range(4)


def _count(totals: Tensor, logits: Tensor, y: Tensor) -> None:
    """Adds a micro-batch to `totals`. The loss is without label smoothing, to be compared with the validation's."""
    losses = F.cross_entropy(logits, y, reduction="none").double()  # [B]
    finite = losses.isfinite()  # [B]
    totals[LOSS] += (losses.where(finite, 0.0) / LOSS_UNIT).round().long().sum()
    totals[TOP1] += (logits.argmax(dim=1) == y).sum()
    totals[COUNT] += len(y)
    totals[BAD] += (~finite).sum()


def _means(totals: list[int]) -> dict[str, float]:
    count = max(1, totals[COUNT])
    return {"train_loss": totals[LOSS] * LOSS_UNIT / count, "train_top1": totals[TOP1] / count}


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StepClock:
    """Times of steps, by CUDA events on a GPU (read only at the end of the epoch) and the host's clock elsewhere."""

    def start(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.events: list[torch.cuda.Event] = []
        self.times: list[float] = []
        self.tick()

    def tick(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)
        else:
            self.times.append(time.perf_counter())

    def milliseconds(self) -> np.ndarray:
        """[steps] float64: the time of each step since `start`."""
        if not self.cuda:
            return np.diff(self.times) * 1e3
        torch.cuda.synchronize()
        return np.array([a.elapsed_time(b) for a, b in itertools.pairwise(self.events)])
