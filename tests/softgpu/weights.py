"""Weights of trainers, to be compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastnet.training.trainer import Trainer


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    """Weights and batch norm statistics in float64 on the host."""
    state = trainer.network.state_dict()
    return {name: t.to("cpu", torch.float64, copy=True) for name, t in state.items() if t.is_floating_point()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return math.hypot(*((a[name] - b[name]).norm().item() for name in b))
