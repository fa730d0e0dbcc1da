"""What is checked of a network: its validation scores, and that its weights are finite."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input.streams import Batch
from fastnet.metrics import Counter, Totals
from fastnet.network.network import Network
from fastnet.training.checkpoint import load
from fastnet.training.parallel import share_weights
from fastnet.training.phases import Phase


@torch.inference_mode()
def evaluate(network: Network, stream: Iterable[Batch], runtime: Runtime) -> Totals:
    """The totals over the ranks' shares of a split, each image counted once. Collective; waits for the device once."""
    training = network.training
    network.eval()
    counter = Counter(runtime.device)
    for x, y, _ in stream:  # [B, 3, S, S], [B]
        with runtime.autocast():
            logits = network(x)  # [B, K]
        counter.add(logits, y)
    network.train(training)
    return Totals(*runtime.sum_(counter.sums).tolist())


def validate(network: Network, stream: Iterable[Batch], runtime: Runtime, phase: Phase) -> Totals:
    """The same with rank 0's weights, after an epoch of `phase`. Raises InputError if a loss is not finite."""
    share_weights(network, runtime)
    totals = evaluate(network, stream, runtime)
    if totals.not_finite:
        raise InputError(
            f"the validation loss of {totals.not_finite} images is not finite, or huge; {phase.calmer}"
        )
    return totals


def evaluate_saved(
    network: Network, path: Path, stream: Iterable[Batch], runtime: Runtime, phase: Phase
) -> Totals:
    """The same with the weights of a checkpoint, which rank 0 reads into `network`."""
    with runtime.agree():
        if runtime.is_main:
            network.load_state_dict(load(path).result)
    return validate(network, stream, runtime, phase)


def check_weights(network: Network, step: int, phase: Phase) -> None:
    """Raises InputError, on every rank alike, if the last update, in `phase`, left a weight that is not finite."""
    trained = [p for p in network.parameters() if p.requires_grad]
    # The ranks hold the same weights, so none needs to ask the others.
    if not torch.stack([p.detach().isfinite().all() for p in trained]).all():
        raise InputError(
            f"the weights are not finite after step {step}; nothing of it was saved; {phase.calmer}"
        )
