"""A prepared set of images of many sizes, shared by the tests of the input pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastnet import prepare
from fastnet.data.prepared import PreparedSet, Split, open_set
from tests.support.streams import GREY, TRAIN, VAL


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """A set of images of many sizes, from 40 to 95 pixels, every fifth one grey."""
    root = tmp_path_factory.mktemp("pipeline")
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            folder = root / "folder" / split / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            height, width = rng.integers(40, 96, 2).tolist()
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
            image = Image.fromarray((smooth * 0.7 + rng.integers(0, 77, smooth.shape)).astype(np.uint8))
            image.convert("L" if i % GREY == 0 else "RGB").save(folder / f"{i:03d}.jpg", quality=90)
    prepare.main([str(root / "folder"), "--out", str(root / "set")])
    return open_set(root / "set")


@pytest.fixture
def train(prepared: PreparedSet) -> Split:
    return prepared.splits["train"]


@pytest.fixture
def val(prepared: PreparedSet) -> Split:
    return prepared.splits["val"]
