"""The network that is evaluated: the one that trains, or an average of its weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.network.network import Network
from fastnet.training.ema import Average, MovingAverage


class Evaluated:
    """What validates and is what a run results in: `network`.

    With --ema that is `moving`, which each step moves. With --average-last N it is `live`, the network that trains,
    until the first of the last N epochs ends, and from there on the mean of the weights at the ends of these epochs
    (Izmailov et al. 2018).
    """

    def __init__(self, live: Network, config: Config) -> None:
        self.live = live
        self.moving = MovingAverage(live, config.ema) if config.ema else None
        self.average: Average | None = self.moving

    @property
    def network(self) -> Network:
        return self.average.network if self.average else self.live

    def started(self) -> Average:
        """The average, which begins with the weights as they are."""
        self.average = self.average or Average(self.live)
        return self.average

    def freeze(self, last: str) -> None:
        """Freezes the same stages in both, with the same weights: kept features serve both."""
        self.live.freeze(last)
        if self.average:
            self.network.freeze(last)
            both = zip(self.network.frozen_modules(), self.live.frozen_modules(), strict=True)
            for own, frozen in both:
                own.load_state_dict(frozen.state_dict())

    def add_epoch(self, before: int, batches: Iterable[Any], runtime: Runtime) -> None:
        """Takes the weights into the mean of those after `before` epochs, and sets its batch norm statistics by
        `batches`. Collective."""
        self.started().move(1 / (before + 1))
        estimate_statistics(self.network, batches, runtime)


@torch.no_grad()
def estimate_statistics(network: Network, batches: Iterable[Any], runtime: Runtime) -> None:
    """Sets the statistics of the batch norms that are not frozen to means over the `batches` of all ranks.

    Every batch weighs the same, as in torch.optim.swa_utils.update_bn. A batch is images [B, 3, S, S] or their kept
    features. Collective: every rank has the same number of batches. Where all batch norms are frozen, none is taken.
    """
    network.train()  # frozen ones stay in evaluation mode
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
    for before, x in enumerate(batches if norms else ()):
        for norm in norms:
            norm.momentum = 1 / (before + 1)  # None would do the same, but ask the device for the number
        with runtime.autocast():
            network(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for name in ("running_mean", "running_var"):
            runtime.sum_(norm.get_buffer(name)).div_(runtime.world_size)
    network.eval()
