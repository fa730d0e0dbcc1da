"""The whole network trains through the interpreted kernels: gradients as with the torch backend."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnet.config import Config
from fastnet.network.network import Network
from tests.support.kernels import triton_on_cpu as triton_on_cpu


def two_steps(backend: Literal["torch", "triton"]) -> tuple[list[float], list[Tensor]]:
    """Losses of two optimiser steps and the last gradients."""
    torch.manual_seed(0)
    config = Config(network="lstm", image_size=32, stages=("conv3", "conv4"), seq_len=64, backend=backend)
    network = Network(config, classes=3)
    network.backbone.eval()  # batch statistics of two images blow rounding errors up
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    losses = []
    for _ in range(2):
        optimiser.zero_grad()
        loss = F.cross_entropy(network(x), torch.tensor([0, 2]))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert network.lstm is not None and network.lstm.backend_used == backend
    return losses, [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("triton_on_cpu")
def test_two_steps_equal_torch() -> None:
    expected_losses, expected = two_steps("torch")
    losses, gradients = two_steps("triton")
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert len(gradients) == len(expected)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("triton_on_cpu")
def test_compiles_in_one_graph() -> None:
    config = Config(network="lstm", image_size=32, stages=("conv4",), seq_len=256, backend="triton")
    network = Network(config, classes=3).eval()
    x = torch.randn(1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, network(x))
