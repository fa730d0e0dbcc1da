"""One training step: what the host does before it, and what the device does.

The device's part neither waits nor depends on a number of the host: the learning rate lies in the device's memory, and
images come from fixed places or are made there. So it can be captured in a CUDA graph (capture.py).

Shapes: B images of a micro-batch, K classes, S image size.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.metrics import Counter
from fastnet.profiling import span
from fastnet.training.batches import Batches
from fastnet.training.parallel import without_sync


class TrainStep:
    """An optimiser step on the next global batch, for one phase. Calling it never waits for the device."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        counter: Counter,
        batches: Batches,
    ) -> None:
        self.config, self.runtime, self.model = config, runtime, model
        self.optimizer, self.scaler, self.counter, self.batches = optimizer, scaler, counter, batches

    def __call__(self) -> None:
        self.batches.advance()
        self.on_device()

    def on_device(self) -> None:
        """Gradients of all micro-batches, and the update."""
        for micro in range(self.config.accumulate):
            x, y = self.batches.make(micro)  # [B, 3, S, S], [B]
            last = micro == self.config.accumulate - 1
            with contextlib.nullcontext() if last else without_sync(self.model):
                self.backward(x, y)
        with span("optimizer", self.runtime.device):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()  # to none; Apex's FusedSGD takes no argument
        self.batches.count()

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Adds the gradients of a micro-batch to those that are there, and its loss and hits to the counter."""
        config, runtime = self.config, self.runtime
        with span("forward", runtime.device), runtime.autocast():
            logits = self.model(x)  # [B, K]
        # DDP averages over the ranks: with this factor every image of the global batch weighs the same.
        loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing, reduction="sum")
        with span("backward", runtime.device):
            self.scaler.scale(loss * (runtime.world_size / config.batch_size)).backward()
        # Without label smoothing, to be comparable with the validation loss.
        self.counter.add(logits.detach(), y)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """On a GPU the rate is a tensor that all groups share, so that a captured step reads what is set here."""
    rates = {id(group["lr"]): group["lr"] for group in optimizer.param_groups}
    for value in rates.values():
        if isinstance(value, Tensor):
            value.fill_(rate)
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group["lr"] = rate
