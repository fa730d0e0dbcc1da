"""Validation: loss, top-1 and top-5 of a network over a split."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastnet.distributed.ranks import Runtime
from fastnet.input.streams import Batch
from fastnet.metrics import Counter, Totals
from fastnet.network.network import Network


@torch.inference_mode()
def evaluate(network: Network, stream: Iterable[Batch], runtime: Runtime) -> Totals:
    """The totals over the ranks' shares of a split, each image counted once. Collective; waits for the device once."""
    network.eval()
    counter = Counter(runtime.device)
    for x, y, _ in stream:  # [B, 3, S, S], [B]
        with runtime.autocast():
            logits = network(x)  # [B, K]
        counter.add(logits, y)
    network.train()
    return Totals(*runtime.sum_(counter.sums).tolist())
