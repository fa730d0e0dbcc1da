"""A moving average of the weights, which generalises better than the last ones (Polyak and Juditsky 1992)."""

from __future__ import annotations

import copy

import torch

from fastnet.network.network import Network


class MovingAverage:
    """Weights and batch norm statistics averaged over steps, in a network of their own: `network`.

    With decay d, step t (from 0) moves the average by 1 - min(d, (1 + t) / (10 + t)) of the way to the weights: the
    first ones, from random numbers, are soon forgotten.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.live = network
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.share = torch.zeros((), device=next(network.parameters()).device)

    def set_step(self, step: int) -> None:
        """The host's part, before a step. The number lies on the device, where a captured step reads it."""
        self.share.fill_(1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self) -> None:
        """The device's part, after the step."""
        average, now = self._tensors(self.network), self._tensors(self.live)
        away = torch._foreach_sub(now, average)
        torch._foreach_mul_(away, self.share)
        torch._foreach_add_(average, away)

    @staticmethod
    def _tensors(network: Network) -> list[torch.Tensor]:
        return [t for t in network.state_dict().values() if t.is_floating_point()]
