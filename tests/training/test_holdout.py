"""--holdout: what validates is a part of train, and val is evaluated once, at the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastnet import evaluate
from fastnet.data.default import default_set
from fastnet.data.holdout import divide
from fastnet.errors import InputError
from fastnet.training.events import FinalEvent, read_events
from tests.support.runs import assert_same_end, events
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


def test_val_is_seen_once_at_the_end(tiny_set: Path, tmp_path: Path) -> None:
    """Stopped or not, on images or kept features: the same holdout, and the same end."""
    run = tmp_path / "whole"
    result = run_here(tiny_set, run, *FLAGS)
    held = len(divide(default_set(tiny_set), 0.25).val_images)
    assert [event["val_count"] for event in events(run, "epoch")] == [held] * 4
    (final,) = [event for event in read_events(run / "metrics.jsonl") if isinstance(event, FinalEvent)]
    scores = evaluate.main([str(run), "--data", str(tiny_set)])
    assert (final.val_count, final.val_top1) == (10, scores["top1"]) == (10, result["top1"])
    assert final.val_loss == pytest.approx(scores["loss"], rel=1e-6)
    run_here(tiny_set, tmp_path / "parts", *FLAGS, "--max-steps", "5")
    assert not events(tmp_path / "parts", "final")
    run_here(tiny_set, tmp_path / "parts", *FLAGS)
    assert_same_end(run, tmp_path / "parts")


def test_kept_features_of_the_holdout(tiny_set: Path, tmp_path: Path) -> None:
    own = shutil.copytree(tiny_set, tmp_path / "set")
    run_here(tiny_set, tmp_path / "images", *FLAGS, "--max-steps", "4")
    run_here(own, tmp_path / "features", *FLAGS, "--max-steps", "4", "--cache-features", "2")
    images, features = (events(tmp_path / name, "epoch")[-1] for name in ("images", "features"))
    assert images["val_count"] == features["val_count"]
    # float16's rounding, over four steps
    assert features["val_loss"] == pytest.approx(images["val_loss"], rel=4e-3)
