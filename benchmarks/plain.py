"""The network as one would write it down first, to compare with: NCHW, an nn.LSTM per group, float32."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.exporting.plain import plain_network, plain_state
from fastnet.network.network import Network

TF32_EPS = 2.0**-10  # its significand has 10 bits


def plain(network: Network, config: Config) -> nn.Module:
    """torchvision's ResNet with the weights of `network`, and one nn.LSTM after the other, ready to train."""
    made = plain_network(config, network.classifier.out_features)
    made.load_state_dict(plain_state(network))
    return made.requires_grad_(True).train().to(network.classifier.weight.device)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
    loss.backward()
    optimizer.step()


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The relative rounding of one layer's operands: on a GPU, cuDNN computes float32 in TF32 where it may."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return TF32_EPS
    return torch.finfo(dtype).eps


def difference(network: Network, plain: nn.Module, x: Tensor, runtime: Runtime) -> str:
    """Compares the logits of both with those of `network` in float64: "" where they are within one rounding a layer,
    else what is off.
    """
    exact = copy.deepcopy(network).double().eval()
    if exact.lstm is not None:
        exact.lstm.backend = "torch"
    network.eval()
    plain.eval()
    with torch.no_grad():
        right = exact(x.double())
        with runtime.autocast():
            ours = network(x)
        theirs = plain(x.float().contiguous())
    network.train()
    plain.train()
    layers = 20 + (network.lstm.stages[0].seq_len if network.lstm else 0)
    both = {"fastnet": (ours, runtime.dtype), "plainly written": (theirs, torch.float32)}
    for name, (logits, dtype) in both.items():
        error = ((logits.double() - right).norm() / right.norm()).item()
        if not error <= layers * rounding(dtype, runtime.device):
            return f"{name}: logits are off by {error:.2g} of their size against float64"
    return ""
