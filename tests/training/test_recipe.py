"""What a recipe adds to plain training: moving averages, clipping, rates by stage, frozen stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastnet import evaluate
from fastnet.config import Config, sample
from fastnet.data.default import default_set
from fastnet.data.holdout import divide
from fastnet.distributed.ranks import Runtime
from fastnet.network.network import Network
from fastnet.training.checkpoint import load
from fastnet.training.phases import lr_scale, make_optimizer, plan
from fastnet.training.trainer import Trainer
from tests.support.runs import assert_equal, assert_same_end, events
from tests.support.tiny import run_here

BASELINE = ["--network", "baseline", "--head-epochs", "0", "--epochs", "2"]


def trainer(data: Path, run: Path, **settings: Any) -> Trainer:
    config = replace(sample("baseline"), image_size=32, batch_size=8, epochs=1, **settings)
    return Trainer(config, default_set(data), run, Runtime(torch.device("cpu")))


@pytest.mark.slow
def test_a_run_with_every_switch_continues_to_the_bit(tiny_set: Path, tmp_path: Path) -> None:
    """The average is what is validated and what later commands use. With a holdout, val is seen once, at the end."""
    flags = [
        *BASELINE,
        *[
            "--ema",
            "0.8",
            "--flip-average",
            "--mixup",
            "0.4",
            "--cutmix",
            "1",
            "--clip-grad",
            "1",
            "--layer-decay",
            "0.9",
        ],
    ]
    flags += ["--holdout", "0.25"]
    result = run_here(tiny_set, tmp_path / "whole", *flags)
    run_here(tiny_set, tmp_path / "parts", *flags, "--max-steps", "3")
    assert not events(tmp_path / "parts", "final")
    run_here(tiny_set, tmp_path / "parts", *flags)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    saved = load(tmp_path / "whole" / "last.pt")
    assert saved.average and saved.result is saved.average
    assert_equal(saved.average, load(tmp_path / "parts" / "last.pt").average)

    held = len(divide(default_set(tiny_set), 0.25).val_images)
    assert [event["val_count"] for event in events(tmp_path / "whole", "epoch")] == [held] * 2
    (final,) = events(tmp_path / "whole", "final")
    scores = evaluate.main([str(tmp_path / "whole"), "--data", str(tiny_set)])
    assert (final["val_count"], final["val_top1"]) == (10, scores["top1"]) == (10, result["top1"])
    assert final["val_loss"] == pytest.approx(scores["loss"], rel=1e-6)


def test_clipping_bounds_the_step(tiny_set: Path, tmp_path: Path) -> None:
    """Without momentum and weight decay a step moves the weights by the rate times the gradient's norm."""
    limit, moved = 0.1, {}
    for clip in (0.0, limit):
        plain = {"momentum": 0.0, "weight_decay": 0.0, "warmup": 0.0, "clip_grad": clip}
        made = trainer(tiny_set, tmp_path / str(clip), **plain)
        made.resume()
        with made.resources():
            made.begin_phase()
            before = [p.detach().clone() for p in made.network.parameters()]
            made.train_step()
            now = list(made.network.parameters())
            moved[clip] = torch.cat([(a - b).flatten() for a, b in zip(now, before, strict=True)]).norm()
    rate = sample("baseline").lr
    assert moved[0.0] > 10 * rate * limit
    # Each weight is rounded once more when the step is taken.
    rounding = torch.finfo(torch.float32).eps * torch.cat([p.flatten() for p in before]).norm()
    assert rounding < rate * limit / 100
    assert moved[limit].item() == pytest.approx(rate * limit, abs=rounding.item())


def test_rates_fall_from_the_head_to_the_first_convolution() -> None:
    network = Network(Config(network="lstm", image_size=32), 3)
    config = Config(network="lstm", image_size=32, layer_decay=0.5)
    optimizer = make_optimizer(plan(config)[-1], network, config)
    names = {id(p): name for name, p in network.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scales) == len(names)
    found = {name: scales[f"{name}.weight"] for name in ("classifier", "backbone.conv1", "backbone.bn1")}
    assert found == {"classifier": 1.0, "backbone.conv1": 0.5**5, "backbone.bn1": 0.5**5}
    for depth, layer in enumerate(("layer4", "layer3", "layer2", "layer1"), start=1):
        assert scales[f"backbone.{layer}.0.conv1.weight"] == 0.5**depth
    assert all(scale == 1.0 for name, scale in scales.items() if name.startswith("lstm."))


def test_the_deepest_stage_that_is_read_has_the_first_fraction() -> None:
    config = Config(network="linear", stages=("conv3", "conv4"), layer_decay=0.5)
    layers = ("layer3", "layer2", "layer1", "bn1", "conv1")
    assert [lr_scale(f"backbone.{layer}.weight", config) for layer in layers] == [
        0.5,
        0.25,
        0.125,
        0.0625,
        0.0625,
    ]
    assert lr_scale("classifier.weight", config) == 1.0


def test_a_frozen_prefix_stays_to_the_bit(tiny_set: Path, tmp_path: Path) -> None:
    """The stages behind it train, and so do their batch norms."""
    flags = [*BASELINE, "--freeze", "conv4"]
    run_here(tiny_set, tmp_path / "run", *flags, "--max-steps", "1")
    start = load(tmp_path / "run" / "last.pt").model
    run_here(tiny_set, tmp_path / "run", *flags)
    end = load(tmp_path / "run" / "last.pt").model
    for name, tensor in end.items():
        frozen = name.startswith("backbone.") and ".layer4." not in name
        assert torch.equal(tensor, start[name]) == frozen, name
