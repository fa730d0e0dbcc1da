"""--accumulate auto on a GPU of 64 MB: what is tried, what is chosen, and that nothing is left of it.

The network ends with conv2, so that images take the memory and not weights: 32 of them at 64 px, in one part, do not
fit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastnet import train
from fastnet.cli import run_command
from fastnet.training.accumulation import Trial
from fastnet.training.checkpoint import load
from tests.softgpu.trainers import tiny_trainer
from tests.support.runs import assert_equal, assert_same_end

SMALL: dict[str, Any] = {"stages": ("conv2",), "image_size": 64, "batch_size": 32, "head_epochs": 0}
FLAGS = ["sample", "--network", "linear", "--stages", "conv2", "--image-size", "64", "--batch-size", "32"]
FLAGS += ["--head-epochs", "0", "--epochs", "3", "--precision", "fp32", "--threads", "1", "--decode", "gpu"]
FLAGS += ["--cuda-graph", "off"]


def run_here(data: Path, run: Path, *flags: str) -> dict[str, Any]:
    return train.main([*FLAGS, "--data", str(data), "--run-dir", str(run), *flags])


def session(run: Path) -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["sessions"][-1]


@pytest.fixture(scope="module")
def found(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the number that auto found."""
    run = tmp_path_factory.mktemp("runs") / "auto"
    assert run_here(tiny_set, run, "--accumulate", "auto")["done"]
    return run


def test_the_fewest_parts_that_fit(found: Path, tiny_set: Path, tmp_path: Path) -> None:
    """The run is that of this number, to the bit."""
    assert session(found)["accumulate"] == load(found / "last.pt").config.accumulate == 2
    assert session(found)["accumulate_reason"].startswith("a step takes 0.0")
    assert run_here(tiny_set, tmp_path / "two", "--accumulate", "2")["done"]
    assert_same_end(found, tmp_path / "two")


def test_a_run_that_continues_tries_nothing(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(tiny_set, tmp_path, "--accumulate", "4", "--max-steps", "1")
    monkeypatch.delattr(Trial, "fits")
    run_here(tiny_set, tmp_path, "--accumulate", "auto", "--max-steps", "2")
    assert session(tmp_path)["accumulate"] == 4


def test_nothing_is_left_of_a_trial(tiny_set: Path, tmp_path: Path) -> None:
    """Of one that fits and one that does not: all that a step changes, and random numbers."""
    recipe: dict[str, Any] = {"ema": 0.9, "mixup": 0.2, "optimizer": "adamw"}
    settings = {**SMALL, **recipe, "accumulate": 8, "decode": "gpu"}
    with tiny_trainer("linear", "cuda:0", torch.float16, tiny_set, tmp_path, **settings) as trainer:
        network, average = trainer.network, trainer.evaluated.moving
        assert average
        chosen = {"lstm_backend": "none", "cuda_graph": "on", "decode": "gpu"}
        trial = Trial(trainer.config, trainer.data, network, average, trainer.runtime, chosen)

        def state() -> dict[str, Any]:
            return {
                "network": {name: t.cpu() for name, t in network.state_dict().items()},
                "average": {name: t.cpu() for name, t in average.network.state_dict().items()},
                "trains": [p.requires_grad for p in network.parameters()],
                "modes": [module.training for module in network.modules()],
                "gradients": [p.grad is None for p in network.parameters()],
                "random": [torch.get_rng_state(), torch.cuda.get_rng_state()],
                "memory": torch.cuda.memory_allocated(),
            }

        before = state()
        assert trial.fits(8, last=False)[0]
        assert_equal(state(), before)
        held = torch.empty(40 << 20, dtype=torch.uint8, device="cuda")
        assert not trial.fits(1, last=False)[0]
        del held
        assert_equal(state(), before)


def test_room_is_left_for_what_comes_on_top(tiny_set: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "accumulate": 8, "decode": "gpu"}
    with tiny_trainer("linear", "cuda:0", None, tiny_set, tmp_path, **settings) as trainer:
        chosen = {"lstm_backend": "none", "cuda_graph": "off", "decode": "gpu"}
        trial = Trial(trainer.config, trainer.data, trainer.network, None, trainer.runtime, chosen)
        assert trial.fits(8, last=False)[0]
        trial.beside = round(0.8 * torch.cuda.mem_get_info()[0])
        assert not trial.fits(8, last=False)[0]
        assert trial.fits(8, last=True)[0]  # the smallest parts may try it


def test_where_no_part_fits(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ResNet-18's weights and gradients alone take 90 MB."""
    flags = [*FLAGS, "--network", "baseline", "--accumulate", "auto", "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--data", str(tiny_set)])
    with pytest.raises(SystemExit) as ended:
        run_command(train.main)
    line = capsys.readouterr().err.splitlines()[-1]
    said = "error: rank 0: 32 images at 64 px in the parts of --accumulate auto: out of memory on cuda:0 ("
    assert ended.value.code == 2 and line.startswith(said), line
