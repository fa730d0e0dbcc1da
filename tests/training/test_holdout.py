"""--holdout: what validates is a part of train, and val is evaluated once, at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnet.data.default import default_set
from fastnet.data.holdout import divide
from fastnet.errors import InputError
from fastnet.training.manifest import read_manifest
from tests.support.runs import events
from tests.support.tiny import run_here

FLAGS = ["--network", "baseline", "--epochs", "2", "--holdout", "0.25"]  # 42 images in 3 classes


def test_every_class_gives_its_share(tiny_set: Path) -> None:
    data = default_set(tiny_set)
    division = divide(data, 0.25)
    labels = data.splits["train"].labels
    together = np.concatenate([division.train_images, division.val_images])
    assert sorted(together) == list(range(len(labels)))
    for label in range(3):
        total = int((labels == label).sum())
        assert (labels[division.val_images] == label).sum() == round(0.25 * total)
    whole = divide(data, 0.0)
    assert whole.val is data.splits["val"] and len(whole.train_images) == len(labels)
    with pytest.raises(InputError, match=r"--holdout 0\.01: holds out 0 of the 14 images of class 0"):
        divide(data, 0.01)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_look_at_val_makes_it(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = [*FLAGS, "--head-epochs", "0", "--epochs", "1"]
    run_here(tiny_set, run, *flags)
    (final,) = events(run, "final")
    metrics, manifest = run / "metrics.jsonl", run / "manifest.json"
    lines = metrics.read_bytes().splitlines(keepends=True)
    said = json.loads(manifest.read_bytes())
    del said["sessions"][-1]["done"]
    for torn in (b"", lines[-1][:-9]):
        metrics.write_bytes(b"".join(lines[:-1]) + torn)
        manifest.write_text(json.dumps(said))
        result = run_here(tiny_set, run, *flags)
        assert events(run, "final") == [final]
        assert result["done"] and result["top1"] == final["val_top1"]
        assert read_manifest(run).sessions[-1]["done"]
    manifest.write_text(json.dumps(said))
    run_here(tiny_set, run, *flags)
    assert "already done" in capsys.readouterr().err
    assert read_manifest(run).sessions[-1]["done"]


def test_a_look_at_val_with_losses_that_are_not_finite_is_no_result(tiny_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_here(tiny_set, run, *FLAGS, "--head-epochs", "0", "--epochs", "2", "--max-steps", "4")
    best = torch.load(run / "best.pt", weights_only=True)
    best["model"]["classifier.bias"][0] = torch.nan
    best["position"]["best_top1"] = 1.0  # so that it stays the best
    last = torch.load(run / "last.pt", weights_only=True)
    last["position"]["best_top1"] = 1.0
    torch.save(best, run / "best.pt")
    torch.save(last, run / "last.pt")
    with pytest.raises(
        InputError, match="the validation loss of 10 images is not finite, or huge; lower --lr"
    ):
        run_here(tiny_set, run, *FLAGS, "--head-epochs", "0", "--epochs", "2")
    assert not events(run, "final")


def test_what_the_last_look_needs_is_made_first(tiny_set: Path, tmp_path: Path) -> None:
    own = shutil.copytree(tiny_set, tmp_path / "set")
    run_here(own, tmp_path / "run", *FLAGS, "--decode", "raw", "--max-steps", "1")
    assert (own / "val.raw").exists()


def test_scores_of_the_holdout_are_called_so(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(tiny_set, tmp_path / "run", *FLAGS, "--max-steps", "2")
    assert "step 2, holdout top-1" in capsys.readouterr().out


@pytest.mark.slow
def test_kept_features_of_the_holdout(tiny_set: Path, tmp_path: Path) -> None:
    own = shutil.copytree(tiny_set, tmp_path / "set")
    run_here(tiny_set, tmp_path / "images", *FLAGS, "--max-steps", "4")
    run_here(own, tmp_path / "features", *FLAGS, "--max-steps", "4", "--cache-features", "2")
    images, features = (events(tmp_path / name, "epoch")[-1] for name in ("images", "features"))
    assert images["val_count"] == features["val_count"]
    # float16's rounding, over four steps
    assert features["val_loss"] == pytest.approx(images["val_loss"], rel=4e-3)
