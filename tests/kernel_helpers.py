"""What the kernel tests share: inputs, references and error measures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastnet_kernels import ChannelGroupLSTM, Stage
from torch import Tensor


def side(hidden: int) -> tuple[int, int]:
    """The most square (h, w) with h*w = hidden."""
    h = next(d for d in range(int(hidden**0.5), 0, -1) if hidden % d == 0)
    return h, hidden // h


def feature_maps(
    stages: Sequence[tuple[int, int, int]], batch: int, *, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    """Per stage a channels_last [B, G*T, h, w] in float64, normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for groups, seq_len, hidden in stages:
        x = torch.randn(batch, groups * seq_len, *side(hidden), generator=generator, dtype=torch.float64)
        maps.append((x * scale).contiguous(memory_format=torch.channels_last))
    return maps


def lstm_reference(module: ChannelGroupLSTM, features: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The output by one nn.LSTM per group, in `dtype`: [B, sum(G*H)]."""
    lstms = iter(module.to_lstms())
    outputs = []
    for x, stage in zip(features, (Stage(*s) for s in module.stages), strict=True):
        for g in range(stage.groups):
            sequence = x[:, g * stage.seq_len : (g + 1) * stage.seq_len].flatten(2).to(dtype)  # [B, T, S]
            outputs.append(next(lstms).to(dtype)(sequence)[1][0][0])
    return torch.cat(outputs, dim=1)
