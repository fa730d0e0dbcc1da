"""ChannelGroupLSTM: the parameters of all groups of all stages, and their ways to and from nn.LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from . import op
from .naive import Stage, Weights


class StageWeights(nn.Module):
    """The LSTMs of one stage, stacked over its groups; float32, initialised as nn.LSTM does."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        groups, _, hidden = stage
        bound = hidden**-0.5

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound))

        self.weight_ih = uniform(groups, 4 * hidden, hidden)  # [G, 4H, S]
        self.weight_hh = uniform(groups, 4 * hidden, hidden)  # [G, 4H, H]
        self.bias_ih = uniform(groups, 4 * hidden)  # [G, 4H]
        self.bias_hh = uniform(groups, 4 * hidden)  # [G, 4H]

    def weights(self) -> Weights:
        return Weights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


class ChannelGroupLSTM(nn.Module):
    """LSTMs over groups of channels: the T channels of a group are its time steps, their positions the input.

    Args:
        stages: (groups, seq_len, hidden) of each feature map; hidden is height x width (Triton: up to 1024).
        backend: "auto" is Triton on a GPU that it supports, else torch; see `backend_used` after a forward.
        recompute: save less for backward (hidden and cell states only), compute the gates again.

    Raises:
        ValueError: no stage, or one whose numbers are out of range.
    """

    def __init__(
        self, stages: Sequence[tuple[int, int, int]], backend: op.Backend = "auto", recompute: bool = False
    ) -> None:
        super().__init__()
        self.stages = tuple(Stage(*s) for s in stages)
        if not self.stages:
            raise ValueError("ChannelGroupLSTM needs at least one stage")
        for s in self.stages:
            if min(s) < 1:
                raise ValueError(f"{s}: groups, seq_len and hidden must be at least 1")
        if backend not in get_args(op.Backend):
            raise ValueError(f"backend {backend!r} is not one of {', '.join(get_args(op.Backend))}")
        self.backend: op.Backend = backend
        self.recompute = recompute
        self.backend_used: op.Backend | None = None
        self.layers = nn.ModuleList(StageWeights(s) for s in self.stages)

    @property
    def out_features(self) -> int:
        return sum(s.groups * s.hidden for s in self.stages)

    def weights(self) -> list[Weights]:
        return [layer.weights() for layer in self.layers if isinstance(layer, StageWeights)]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Per stage [B, groups*seq_len, h, w] (channels_last, h*w == hidden) -> [B, sum(groups*hidden)]."""
        weights = self.weights()
        used = self.backend_used = op.select(features, weights, self.stages, self.backend)
        return op.compute(features, weights, self.stages, backend=used, recompute=self.recompute)

    @torch.no_grad()
    def load_lstms(self, lstms: Sequence[nn.LSTM]) -> None:
        """Copies one single-layer nn.LSTM per group, stages as given, groups in channel order."""
        targets = [
            (layer, g) for layer, s in zip(self.layers, self.stages, strict=True) for g in range(s.groups)
        ]
        if len(lstms) != len(targets):
            raise ValueError(f"{len(targets)} groups need as many nn.LSTM, got {len(lstms)}")
        for n, (lstm, (layer, g)) in enumerate(zip(lstms, targets, strict=True)):
            names = [name for name, _ in layer.named_parameters()]
            theirs = dict(lstm.named_parameters())
            if set(theirs) != {f"{name}_l0" for name in names}:
                raise ValueError(f"nn.LSTM {n} must have one layer, one direction, biases and no projection")
            for name in names:
                ours, source = layer.get_parameter(name)[g], theirs[f"{name}_l0"]
                if ours.shape != source.shape:
                    raise ValueError(f"nn.LSTM {n}: {name} is {list(source.shape)}, needs {list(ours.shape)}")
                ours.copy_(source)

    @torch.no_grad()
    def to_lstms(self) -> list[nn.LSTM]:
        """One nn.LSTM (batch_first) per group with copies of the parameters, in the order of load_lstms."""
        lstms = []
        for layer, s in zip(self.layers, self.stages, strict=True):
            for g in range(s.groups):
                first = layer.get_parameter("weight_ih")
                lstm = nn.LSTM(s.hidden, s.hidden, batch_first=True, device=first.device, dtype=first.dtype)
                for name, parameter in layer.named_parameters():
                    lstm.get_parameter(f"{name}_l0").copy_(parameter[g])
                lstms.append(lstm)
        return lstms

    def to_cudnn(self) -> list[Tensor]:
        """Each group's parameters as cuDNN's flat weight buffer: W_ih, W_hh, b_ih, b_hh, gates i, f, g, o."""
        return [torch.cat([p.detach().flatten() for p in lstm.parameters()]) for lstm in self.to_lstms()]

    @torch.no_grad()
    def load_cudnn(self, buffers: Sequence[Tensor]) -> None:
        """The inverse of to_cudnn. Raises ValueError for buffers of another number or size."""
        lstms = self.to_lstms()
        if len(buffers) != len(lstms):
            raise ValueError(f"{len(lstms)} groups need as many buffers, got {len(buffers)}")
        for n, (lstm, buffer) in enumerate(zip(lstms, buffers, strict=True)):
            sizes = [p.numel() for p in lstm.parameters()]
            if buffer.numel() != sum(sizes):
                raise ValueError(f"buffer {n} has {buffer.numel()} elements, needs {sum(sizes)}")
            for p, part in zip(lstm.parameters(), buffer.flatten().split(sizes), strict=True):
                p.copy_(part.view_as(p))
        self.load_lstms(lstms)

    def extra_repr(self) -> str:
        return (
            f"stages={[tuple(s) for s in self.stages]}, backend={self.backend!r}, recompute={self.recompute}"
        )
