"""Averages of the weights, which generalise better than the last ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fastnet.network.network import Network


class Average:
    """Weights and batch norm statistics in a network of their own, `network`, that follows the one that trains."""

    def __init__(self, network: Network) -> None:
        self.live = network
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def move(self, share: Tensor | float) -> None:
        """Moves the average by `share` of the way to the weights that train. Nothing in it waits for the device."""
        average, now = self._tensors(self.network), self._tensors(self.live)
        if not average[0].is_cuda:
            # One pass over the weights, by a number of the host.
            torch._foreach_lerp_(average, now, float(share))
            return
        away = torch._foreach_sub(now, average)
        torch._foreach_mul_(away, share)
        torch._foreach_add_(average, away)

    @staticmethod
    def _tensors(network: Network) -> list[Tensor]:
        return [t for t in network.state_dict().values() if t.is_floating_point()]


class MovingAverage(Average):
    """An average over steps (Polyak and Juditsky 1992), in which the last ones count most.

    With decay d, step t (from 0) moves it by 1 - min(d, (1 + t) / (10 + t)) of the way to the weights: the first ones,
    from random numbers, are soon forgotten.
    """

    def __init__(self, network: Network, decay: float) -> None:
        super().__init__(network)
        self.decay = decay
        self.share = torch.zeros((), device=next(network.parameters()).device)

    def set_step(self, step: int) -> None:
        """The host's part, before a step. The number lies on the device, where a captured step reads it."""
        self.share.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    def update(self) -> None:
        """The device's part, after the step."""
        self.move(self.share)
