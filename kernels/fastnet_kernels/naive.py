"""The channel-group LSTM in plain torch: the definition to read first, in any floating dtype.

A stage's feature map [B, C, h, w] is cut along its channels into G groups of T. Group g is one sequence: its
T channels are the time steps, each channel's S = h*w positions (row major) are that step's input. Every group
has an LSTM of its own with hidden size H = S, starting from zeros; its last hidden state is the output.

    a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh         four gates stacked in nn.LSTM's order i, f, g, o
    i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
    c_t = f * c_{t-1} + i * g;  h_t = o * tanh(c_t)

Legend: B batch, G groups, T steps, S input size = H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Stage(NamedTuple):
    """One feature map: `groups` LSTMs over `seq_len` channels each, `hidden` = positions of the map."""

    groups: int
    seq_len: int
    hidden: int


class Weights(NamedTuple):
    """The parameters of a stage's LSTMs, gate rows in the order i, f, g, o."""

    ih: Tensor  # [G, 4H, S]
    hh: Tensor  # [G, 4H, H]
    bias_ih: Tensor  # [G, 4H]
    bias_hh: Tensor  # [G, 4H]


def naive(features: Sequence[Tensor], weights: Sequence[Weights], stages: Sequence[Stage]) -> Tensor:
    """The last hidden states of all groups of all stages, concatenated.

    Args:
        features: per stage [B, G*T, h, w] with h*w = H, any memory format, in the dtype to compute in.
        weights: per stage, in the same dtype.

    Returns:
        [B, sum(G*H)]: stages as given, groups in channel order, then hidden units.
    """
    return torch.cat([_stage(x, w, s) for x, w, s in zip(features, weights, stages, strict=True)], dim=1)


def _stage(feature: Tensor, weights: Weights, stage: Stage) -> Tensor:
    groups, seq_len, hidden = stage
    batch = feature.shape[0]
    x = feature.reshape(batch, groups, seq_len, hidden)  # [B, G, T, S]
    projected = torch.einsum("bgts,gns->tgbn", x, weights.ih)  # [T, G, B, 4H]
    bias = (weights.bias_ih + weights.bias_hh)[:, None]  # [G, 1, 4H]
    h = c = x.new_zeros(groups, batch, hidden)  # [G, B, H]
    for step in projected:
        gates = step + bias + h @ weights.hh.mT  # [G, B, 4H]
        i, f, g, o = gates.chunk(4, dim=-1)  # [G, B, H] each
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h.transpose(0, 1).reshape(batch, groups * hidden)
