"""--apex with a stand-in for NVIDIA's optimisers, beside torch's fused ones."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import softgpu
from fastnet import train
from fastnet.errors import InputError
from fastnet.training.checkpoint import load
from tests.softgpu.trainers import begin, tiny_trainer
from tests.support import apex
from tests.support.runs import assert_equal

STEPS = 3


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)


@pytest.mark.parametrize("phase", [0, 1], ids=["adamw", "sgd"])
def test_it_trains_to_the_weights_of_torchs_optimiser(
    phase: int, installed: None, tiny_set: Path, tmp_path: Path
) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    for by_apex in (False, True):
        run = tmp_path / str(by_apex)
        # So little changes that the next gradients hardly do, and enough for a wrong update to stand out.
        small: dict[str, Any] = {"lr": 5e-4, "head_lr": 5e-4, "weight_decay": 0.1}
        with tiny_trainer("baseline", "cuda", None, tiny_set, run, apex=by_apex, **small) as trainer:
            begin(trainer, phase)
            for _ in range(STEPS):
                trainer.train_step()
            weights.append({n: p.detach().clone() for n, p in trainer.network.named_parameters()})
    torchs, apexs = weights
    apart = math.hypot(*((torchs[n] - apexs[n]).norm().item() for n in torchs))
    # A few roundings a step, and the gradients of the next step at weights that differ by them.
    bound = 8 * STEPS * torch.finfo(torch.float32).eps
    assert 0 < apart <= bound * math.hypot(*(p.norm().item() for p in torchs.values()))


def flags(data: Path, run: Path, *more: str) -> list[str]:
    small = ["sample", "--image-size", "32", "--batch-size", "21", "--head-epochs", "1", "--epochs", "1"]
    return [*small, "--lr", "0.005", "--threads", "1", "--data", str(data), "--run-dir", str(run), *more]


def test_a_run_in_fp16_continues_to_the_bit(installed: None, tiny_set: Path, tmp_path: Path) -> None:
    """Its state is saved and restored in both phases; GradScaler waits once a step, as these cannot skip one."""
    given = ["--apex", "--precision", "fp16", "--network", "baseline"]
    train.main(flags(tiny_set, tmp_path / "whole", *given))
    for stop in ("1", "3", "4"):
        train.main(flags(tiny_set, tmp_path / "parts", *given, "--max-steps", stop))
    whole, parts = (load(tmp_path / name / "last.pt").model for name in ("whole", "parts"))
    assert_equal(whole, parts)


@pytest.mark.parametrize(("amp", "waits"), [(torch.bfloat16, 0), (torch.float16, 1)])
def test_loss_scaling_waits_for_the_device(
    amp: torch.dtype, waits: int, installed: None, tiny_set: Path, tmp_path: Path
) -> None:
    with tiny_trainer("baseline", "cuda", amp, tiny_set, tmp_path, apex=True) as trainer:
        begin(trainer, 0)
        trainer.train_step()
        with softgpu.watch() as seen:
            trainer.train_step()
    assert len(seen.waits) == waits, seen.waits


def test_what_apex_lacks_is_named(
    tiny_set: Path, tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_extension(*_: object, **__: object) -> None:
        raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")

    given = flags(tiny_set, tmp_path / "run", "--apex", "--head-epochs", "0", "--network", "baseline")
    with pytest.raises(InputError, match="--apex: NVIDIA Apex needs a GPU"):
        train.main([*given, "--device", "cpu"])
    monkeypatch.setattr(apex, "FusedSGD", without_extension)
    with pytest.raises(InputError, match=r"--apex: .* requires cuda extensions; build Apex with"):
        train.main(given)
    # PyPI has a package apex that is something else.
    monkeypatch.delitem(sys.modules, "apex.optimizers")
    with pytest.raises(InputError, match="--apex: NVIDIA Apex is not installed"):
        train.main(given)
