"""A run against the loop that it stands for, written out here in plain PyTorch.

Both compute in float64, where nothing but a mistake makes a difference above 1e-9.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastnet.config import Config
from fastnet.data.default import default_set
from fastnet.distributed.ranks import Runtime
from fastnet.input.draws import epoch_order
from fastnet.training.trainer import Trainer
from tests.support.runs import events

EPOCHS, STEPS, BATCH = 2, 5, 8  # of 42 images
SETTINGS: dict[str, Any] = {
    "image_size": 32,
    "batch_size": BATCH,
    "epochs": EPOCHS,
    "weights": "none",
    "lr": 0.05,
    "warmup": 0.5,
    "weight_decay": 0.02,
    "layer_decay": 0.5,
    "label_smoothing": 0.1,
    "clip_grad": 100.0,
    "ema": 0.2,
    "log_every": 2,
}
DEPTHS = {"classifier": 0, "layer4": 1, "layer3": 2, "layer2": 3, "layer1": 4, "bn1": 5, "conv1": 5}


class Rates:
    """Linear warmup over half an epoch, then half a cosine to zero."""

    warmup, total = STEPS // 2, EPOCHS * STEPS

    def __getitem__(self, t: int) -> float:
        if t < self.warmup:
            return SETTINGS["lr"] * (t + 1) / (self.warmup + 1)
        done = (t - self.warmup) / (self.total - self.warmup)
        return SETTINGS["lr"] / 2 * (1 + math.cos(math.pi * done))


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropies [B] with a tenth of the label spread over all classes."""
    logp = logits.log_softmax(dim=1)  # [B, K]
    return -0.9 * logp.gather(1, y[:, None])[:, 0] - 0.1 * logp.mean(dim=1)


class PlainLoop:
    """SGD with Nesterov momentum, or AdamW, on the images that the run saw."""

    def __init__(self, network: nn.Module, optimizer: str) -> None:
        self.network = network.train()
        self.parameters = dict(network.named_parameters())
        self.average = {name: t.clone() for name, t in network.state_dict().items() if t.is_floating_point()}
        self.adamw = optimizer == "adamw"
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.clipped = 0

    def step(self, t: int, x: Tensor, y: Tensor) -> None:
        """x [B, 3, S, S], y [B]."""
        loss = smoothed(self.network(x), y).mean()
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        self.clipped += norm > SETTINGS["clip_grad"]
        scale = min(1.0, SETTINGS["clip_grad"] / (norm + 1e-6))
        with torch.no_grad():
            for (name, p), g in zip(self.parameters.items(), gradients, strict=True):
                layer = name.removeprefix("backbone.").split(".")[0]
                rate = Rates()[t] * SETTINGS["layer_decay"] ** DEPTHS[layer]
                decay = SETTINGS["weight_decay"] if p.ndim > 1 else 0.0
                (self.move_adamw if self.adamw else self.move_sgd)(name, p, scale * g, rate, decay, t)
            moved = float(np.float32(1 - min(SETTINGS["ema"], (1 + t) / (10 + t))))  # as the device has it
            for name, now in self.network.state_dict().items():
                if name in self.average:
                    self.average[name] += moved * (now - self.average[name])

    def move_sgd(self, name: str, p: Tensor, g: Tensor, rate: float, decay: float, t: int) -> None:
        g = g + decay * p
        self.first[name] = 0.9 * self.first[name] + g
        p -= rate * (g + 0.9 * self.first[name])

    def move_adamw(self, name: str, p: Tensor, g: Tensor, rate: float, decay: float, t: int) -> None:
        self.first[name] = 0.9 * self.first[name] + 0.1 * g
        self.second[name] = 0.999 * self.second[name] + 0.001 * g * g
        unbiased = self.first[name] / (1 - 0.9 ** (t + 1))
        spread = (self.second[name] / (1 - 0.999 ** (t + 1))).sqrt()
        p *= 1 - rate * decay
        p -= rate * unbiased / (spread + 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", ["sgd", pytest.param("adamw", marks=[pytest.mark.long, pytest.mark.slow])]
)
def test_a_run_is_the_loop_it_stands_for(optimizer: str, tiny_set: Path, tmp_path: Path) -> None:
    """Loss, gradients, clipping, rates by step and stage, weight decay and the moving average."""
    data = default_set(tiny_set)
    config = Config(optimizer=optimizer, **SETTINGS)
    made = Trainer(config, data, tmp_path / "run", Runtime(torch.device("cpu")))
    made.network.double()
    plain = PlainLoop(copy.deepcopy(made.network), optimizer)
    seen: list[Tensor] = []

    def in_double(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        if module.training:
            seen.append(given[0].clone())
        return (given[0].double(),)

    made.network.register_forward_pre_hook(in_double)
    made.fit()

    labels = data.splits["train"].labels
    for t, x in enumerate(seen):
        epoch, step = divmod(t, STEPS)
        index = epoch_order(len(labels), config.seed, epoch)[step * BATCH : (step + 1) * BATCH]
        plain.step(t, x.double(), torch.from_numpy(labels[index]))
    assert len(seen) == EPOCHS * STEPS and 0 < plain.clipped < EPOCHS * STEPS

    for mine, theirs in (
        (made.network.state_dict(), plain.network.state_dict()),
        (made.evaluated.network.state_dict(), plain.average),
    ):
        for name, expected in theirs.items():
            assert torch.allclose(mine[name], expected, rtol=1e-9, atol=1e-9), name
    recorded = {line["step"]: line["lr"] for line in events(tmp_path / "run", "step")}
    assert recorded == {t + 1: pytest.approx(Rates()[t], rel=1e-12) for t in range(1, EPOCHS * STEPS, 2)}
