"""Runs that evaluate, ensemble and predict cannot use are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastnet import ensemble, evaluate, predict
from fastnet.errors import InputError


def altered(run: Path, to: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a run whose checkpoint is another."""
    content = torch.load(run / "best.pt", weights_only=True)
    change(content)
    to.mkdir()
    torch.save(content, to / "best.pt")
    return to


def test_runs_that_cannot_be_used_are_named(tiny_set: Path, runs: list[Path], tmp_path: Path) -> None:
    baseline, lstm = runs
    data = ["--data", str(tiny_set)]

    def rename_classes(content: dict) -> None:
        content["classes"] = ["n00000001", *content["classes"][1:]]

    def swap_classes(content: dict) -> None:
        content["classes"] = content["classes"][::-1]

    def other_network(content: dict) -> None:
        content["config"]["network"] = "baseline"

    def not_finite(content: dict) -> None:
        content["model"]["classifier.bias"][0] = math.nan

    renamed = altered(lstm, tmp_path / "renamed", rename_classes)
    swapped = altered(lstm, tmp_path / "swapped", swap_classes)
    other = altered(lstm, tmp_path / "other", other_network)
    nan = altered(lstm, tmp_path / "nan", not_finite)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "best.pt").write_bytes((baseline / "best.pt").read_bytes()[:10_000])
    (tmp_path / "begun").mkdir()

    for run, message in [
        (tmp_path / "nowhere", "nowhere: no such run"),
        (tmp_path / "begun", r"begun/best\.pt: no such checkpoint"),
        (torn, r"torn/best\.pt: damaged"),
        (other, r"other/best\.pt: a checkpoint of another network"),
        (renamed, "its classes are not those of run renamed .3 and 3; only one of them has n00000001"),
        (swapped, "its classes are not those of run swapped .in another order"),
        (nan, "nan: its network gives scores that are not finite"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.main([str(run), *data])
    for command in (ensemble.main, predict.main):
        with pytest.raises(InputError, match="run renamed: its classes are not those of run baseline"):
            command([str(baseline), str(renamed), *data, "--out", str(tmp_path / "out")])
        with pytest.raises(InputError, match="baseline: the run is named twice"):
            command([str(baseline), str(baseline), *data, "--out", str(tmp_path / "out")])


def test_a_run_is_evaluated_in_another_way_than_it_was_trained(
    tiny_set: Path, runs: list[Path], tmp_path: Path
) -> None:
    """As if it had been trained with these settings; `altered` says that it was."""

    def other_evaluation(content: dict) -> None:
        content["config"] |= {"eval_crop": 0.5, "flip_average": True}

    def loss(run: Path, *flags: str) -> float:
        return evaluate.main([str(run), "--data", str(tiny_set), *flags])["loss"]

    plain = runs[0]
    other = altered(plain, tmp_path / "other", other_evaluation)
    assert loss(plain, "--eval-crop", "0.5", "--flip-average") == loss(other) != loss(plain)
    assert loss(other, "--eval-crop", "1", "--no-flip-average") == loss(plain)
    assert loss(other, "--no-flip-average") not in (loss(plain), loss(other)), "what is not named stays"

    both = ensemble.main([*map(str, runs), "--data", str(tiny_set), "--eval-crop", "0.5", "--flip-average"])
    assert both["runs"]["baseline"]["loss"] == pytest.approx(loss(other), rel=1e-6)
    with pytest.raises(InputError, match=r"--eval-crop 2.0: must lie between 0.01 and 1"):
        predict.main([str(plain), "--data", str(tiny_set), "--out", str(tmp_path / "x"), "--eval-crop", "2"])
