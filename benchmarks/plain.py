"""The network as one would write it down first, to compare with: NCHW, an nn.LSTM per group, float32."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.network.network import LAYERS, Network

TF32_EPS = 2.0**-10  # its significand has 10 bits


class Plain(nn.Module):
    """`network` with its weights, written plainly."""

    def __init__(self, network: Network, config: Config) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(network.backbone).to(memory_format=torch.contiguous_format)
        self.stages, self.seq_len = network.stages, config.seq_len
        self.lstms = nn.ModuleList(network.lstm.to_lstms() if network.lstm else [])
        self.classifier = copy.deepcopy(network.classifier)

    def forward(self, x: Tensor) -> Tensor:
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        sequences = []
        for stage, layer in LAYERS.items():
            x = getattr(net, layer)(x)
            if stage in self.stages:
                sequences += x.flatten(2).split(self.seq_len, dim=1)  # [B, T, S] each
        if not self.lstms:
            return self.classifier(x.mean(dim=(2, 3)))
        ends = [lstm(sequence)[1][0][0] for lstm, sequence in zip(self.lstms, sequences, strict=True)]
        return self.classifier(torch.cat(ends, dim=1))


def plain_step(model: Plain, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
    loss.backward()
    optimizer.step()


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """The relative rounding of one layer's operands: on a GPU, cuDNN computes float32 in TF32 where it may."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return TF32_EPS
    return torch.finfo(dtype).eps


def difference(network: Network, plain: Plain, x: Tensor, runtime: Runtime) -> str:
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
    both = {"fastnet": (ours, runtime.amp or torch.float32), "plainly written": (theirs, torch.float32)}
    for name, (logits, dtype) in both.items():
        error = ((logits.double() - right).norm() / right.norm()).item()
        if not error <= layers * rounding(dtype, runtime.device):
            return f"{name}: logits are off by {error:.2g} of their size against float64"
    return ""
