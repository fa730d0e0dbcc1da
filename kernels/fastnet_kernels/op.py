"""The channel-group LSTM as a function: which backend computes it, and torch's own LSTMs as one of them.

Legend: B batch, G groups, T steps, S input size = H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .naive import Stage, Weights

Backend = Literal["auto", "triton", "torch"]


def channel_group_lstm(
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    stages: Sequence[Stage],
    *,
    backend: Backend = "auto",
    recompute: bool = False,
) -> Tensor:
    """The last hidden states of all groups of all stages (see naive.py for the equations).

    Under autocast the computation runs in autocast's dtype, otherwise in that of the features; the weights
    are cast to it, their gradients arrive in their own dtype.

    Args:
        features: per stage [B, G*T, h, w] with h*w = H; float32, float16 or bfloat16.
        weights: per stage, usually float32 parameters.
        backend: "auto" is Triton on a GPU that it supports, else torch.
        recompute: save less for backward (hidden and cell states only), compute the gates again.

    Returns:
        [B, sum(G*H)] in the dtype of the computation.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: the backend asked for cannot run here.
    """
    check(features, weights, stages)
    device = features[0].device.type
    choose(backend, device)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features[0].dtype
    with torch.autocast(device, enabled=False):
        return _torch([f.to(dtype) for f in features], weights, stages)


def check(features: Sequence[Tensor], weights: Sequence[Weights], stages: Sequence[Stage]) -> None:
    """Raises ValueError unless there is one feature map per stage and its shape is the stage's."""
    if len(features) != len(stages) or len(weights) != len(stages):
        raise ValueError(f"{len(stages)} stages need as many feature maps, got {len(features)}")
    for n, (x, s) in enumerate(zip(features, stages, strict=True)):
        if x.dim() != 4 or x.shape[1] != s.groups * s.seq_len or x.shape[2] * x.shape[3] != s.hidden:
            raise ValueError(
                f"feature map {n} is {list(x.shape)}; stage {n} needs [batch, {s.groups}*{s.seq_len}, h, w] "
                f"with h*w = {s.hidden}"
            )
        if (
            x.shape[0] != features[0].shape[0]
            or x.dtype != features[0].dtype
            or x.device != features[0].device
        ):
            raise ValueError(f"feature map {n} differs from feature map 0 in batch, dtype or device")


def choose(backend: Backend, device: str) -> Backend:
    """The backend that runs for tensors on `device`; what auto picks is said once per process on stderr."""
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run on {device} tensors")
    return "torch"


def _torch(features: Sequence[Tensor], weights: Sequence[Weights], stages: Sequence[Stage]) -> Tensor:
    """One call of torch's LSTM per group: oneDNN on the CPU, cuDNN on a GPU."""
    outputs = []
    for feature, w, (groups, seq_len, hidden) in zip(features, weights, stages, strict=True):
        batch, dtype = feature.shape[0], feature.dtype
        x = feature.reshape(batch, groups, seq_len, hidden)  # [B, G, T, S]
        zeros = x.new_zeros(1, batch, hidden)
        for g in range(groups):
            flat = [p[g].to(dtype) for p in w]
            last = torch._VF.lstm(
                x[:, g].transpose(0, 1), (zeros, zeros), flat, True, 1, 0.0, False, False, False
            )[1]  # [1, B, H]
            outputs.append(last[0])
    return torch.cat(outputs, dim=1)
