"""One training step: what the host does before it, and what the device does.

The device's part neither waits nor depends on a number of the host: the learning rate lies in the device's memory, and
images come from fixed places or are made there. So it can be captured in a CUDA graph (capture.py).

Shapes: B images of a micro-batch, K classes, S image size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.metrics import Counter
from fastnet.profiling import span
from fastnet.training.batches import Batches
from fastnet.training.ema import MovingAverage
from fastnet.training.mixing import Mixer
from fastnet.training.parallel import without_sync


class TrainStep:
    """An optimiser step on the next global batch, for one phase. Calling it never waits for the device,
    except with --apex in fp16, whose optimisers have PyTorch's loss scaler read whether gradients overflowed."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        counter: Counter,
        batches: Batches,
        average: MovingAverage | None,
        mixer: Mixer | None,
    ) -> None:
        self.config, self.runtime, self.model = config, runtime, model
        self.optimizer, self.scaler, self.counter, self.batches = optimizer, scaler, counter, batches
        self.average, self.mixer = average, mixer

    def prepare(self, number: int, rate: float) -> None:
        """Puts what changes from step to step where the device reads it. `number`: of steps before this one."""
        set_learning_rate(self.optimizer, rate)
        if self.average:
            self.average.set_step(number)
        if self.mixer:
            self.mixer.set_step(number)

    def __call__(self) -> None:
        self.batches.advance()
        self.on_device()

    def on_device(self) -> None:
        """Gradients of all micro-batches, and the update."""
        for micro in range(self.config.parts):
            x, y = self.batches.make(micro)  # [B, 3, S, S], [B]
            last = micro == self.config.parts - 1
            with contextlib.nullcontext() if last else without_sync(self.model):
                self.backward(micro, x, y)
        with span("optimizer", self.runtime.device):
            if self.config.clip_grad:
                self.scaler.unscale_(self.optimizer)
                clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()  # to none; Apex's FusedSGD takes no argument
            if self.average:
                self.average.update()
        self.batches.count()

    def backward(self, micro: int, x: Any, y: Tensor) -> None:
        """Adds the gradients of a micro-batch to those that are there, and its loss and hits to the counter."""
        config, runtime = self.config, self.runtime
        share = None
        if self.mixer:
            x, share = self.mixer(micro, x)  # [B]
        with span("forward", runtime.device), runtime.autocast():
            logits = self.model(x)  # [B, K]
        # DDP averages over the ranks: with this factor every image of the global batch weighs the same.
        loss = self.loss(logits, y, share) * (runtime.world_size / config.batch_size)
        with span("backward", runtime.device):
            self.scaler.scale(loss).backward()
        # Without label smoothing, to be comparable with the validation loss.
        self.counter.add(logits.detach(), y)

    def loss(self, logits: Tensor, y: Tensor, share: Tensor | None) -> Tensor:
        """The cross-entropies [B] of a micro-batch, added up: of mixed images, in their shares for both labels."""
        smoothing = self.config.label_smoothing
        if share is None:
            return F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="sum")
        own, other = (
            F.cross_entropy(logits, label, label_smoothing=smoothing, reduction="none")
            for label in (y, y.roll(1))
        )
        return torch.lerp(other, own, share).sum()


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Each group's rate is `rate` times its `lr_scale`. On a GPU groups of one scale share a tensor, so that a captured
    step reads what is set here."""
    done: set[int] = set()
    for group in optimizer.param_groups:
        value = rate * group["lr_scale"]
        if not isinstance(group["lr"], Tensor):
            group["lr"] = value
        elif id(group["lr"]) not in done:
            group["lr"].fill_(value)
            done.add(id(group["lr"]))
