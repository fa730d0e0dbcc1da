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
