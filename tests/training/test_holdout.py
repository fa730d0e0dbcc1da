"""--holdout: what validates is a part of train, and val is evaluated once, at the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastnet.data.default import default_set
from fastnet.data.holdout import divide
from fastnet.errors import InputError
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
def test_kept_features_of_the_holdout(tiny_set: Path, tmp_path: Path) -> None:
    own = shutil.copytree(tiny_set, tmp_path / "set")
    run_here(tiny_set, tmp_path / "images", *FLAGS, "--max-steps", "4")
    run_here(own, tmp_path / "features", *FLAGS, "--max-steps", "4", "--cache-features", "2")
    images, features = (events(tmp_path / name, "epoch")[-1] for name in ("images", "features"))
    assert images["val_count"] == features["val_count"]
    # float16's rounding, over four steps
    assert features["val_loss"] == pytest.approx(images["val_loss"], rel=4e-3)
