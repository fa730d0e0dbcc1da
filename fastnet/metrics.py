"""Loss, top-1 and top-5: counted here for training, validation, evaluation and ensembles alike.

Shapes: B images of a batch, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Losses are summed as integers of this unit: such sums are exact, in any order and over any number of ranks, up to 2^39
# nats. A training that runs away soon has larger ones, of which each counts as not finite. The first epochs of one that
# does not can have single val losses of a million, where batch norms still have the statistics of other weights.
LOSS_UNIT, LARGEST_LOSS = 2.0**-24, 2.0**30


class Totals(NamedTuple):
    """Sums over images, as integers: the loss in `LOSS_UNIT`, hits, images, and images whose loss is not finite,
    or above `LARGEST_LOSS`."""

    loss: int = 0
    correct1: int = 0
    images: int = 0
    not_finite: int = 0
    correct5: int = 0

    @property
    def mean_loss(self) -> float:
        """Cross-entropy in nats."""
        return self.loss * LOSS_UNIT / max(1, self.images)

    @property
    def top1(self) -> float:
        return self.correct1 / max(1, self.images)

    @property
    def top5(self) -> float:
        return self.correct5 / max(1, self.images)

    def since(self, before: Totals) -> Totals:
        return Totals(*(now - then for now, then in zip(self, before, strict=True)))


class Counter:
    """Adds up `Totals` on a device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(Totals._fields), dtype=torch.int64, device=device)

    def add(self, logits: Tensor, y: Tensor) -> None:
        """Adds a batch: logits [B, K] floating, labels y [B] int64.

        An image's rank is the number of classes before its label by descending logit; among equal logits the lower
        class comes first, as `argmax` has it, so no count depends on how a sort breaks ties.
        """
        losses = F.cross_entropy(logits, y, reduction="none").double()  # [B]
        finite = losses <= LARGEST_LOSS  # [B], false for NaN
        own = logits.gather(1, y[:, None])  # [B, 1]
        lower = torch.arange(logits.shape[1], device=y.device) < y[:, None]  # [B, K]
        rank = ((logits > own) | ((logits == own) & lower)).sum(dim=1)  # [B]
        units = (losses.where(finite, 0.0) / LOSS_UNIT).round().long()  # [B]
        hit1, hit5 = finite & (rank < 1), finite & (rank < 5)  # [B] each
        counts = torch.stack([units, hit1, torch.ones_like(rank), ~finite, hit5])  # [5, B]
        self.sums += counts.sum(dim=1)

    def reset(self) -> None:
        self.sums.zero_()
