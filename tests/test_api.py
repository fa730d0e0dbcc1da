"""The Python interface, by the code of its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastnet import api, evaluate
from tests.support.official import jpeg
from tests.support.paths import REPOSITORY


def test_the_code_of_the_page_runs(
    tiny_set: Path, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "data" / "sample").symlink_to(tiny_set)
    (tmp_path / "runs" / "lstm").symlink_to(runs[0])
    (tmp_path / "cat.jpg").write_bytes(jpeg(1))
    (tmp_path / "dog.png").write_bytes(jpeg(2))
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")
    # The page's images are of 64 px, the runs of these tests of 32.
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    exec("".join(blocks).replace("image_size=64", "image_size=32"), names)
    assert isinstance(names["scores"], torch.Tensor) and names["scores"].shape == (2, 3)


def test_batches_in_order_are_what_evaluate_sees(tiny_set: Path, runs: list[Path]) -> None:
    data, run = api.open_set(str(tiny_set)), api.load_run(str(runs[0]), device="cpu")
    scores, labels, order = [], [], []
    for x, y, index in api.batches(data, "val", image_size=32, batch_size=4):
        scores.append(run.predict(x))
        labels.append(y)
        order.append(index)
    assert np.concatenate(order).tolist() == list(range(10))
    hits = (torch.cat(scores).argmax(1) == torch.cat(labels)).sum()
    told = evaluate.main([str(runs[0]), "--data", str(tiny_set), "--batch-size", "4"])
    assert int(hits) == told["correct1"]


def test_an_epoch_with_augmentation_is_shuffled_by_seed_and_epoch(tiny_set: Path) -> None:
    data = api.open_set(tiny_set)

    def epoch(number: int) -> tuple[list[int], torch.Tensor]:
        kept = [
            (index, x.clone())
            for x, _, index in api.batches(
                data, image_size=32, batch_size=8, augment=api.Augment(), seed=3, epoch=number
            )
        ]
        return np.concatenate([index for index, _ in kept]).tolist(), torch.cat([x for _, x in kept])

    first, again, second = epoch(0), epoch(0), epoch(1)
    assert first[0] == again[0] and torch.equal(first[1], again[1])
    assert len(set(first[0])) == 40 and first[0] != second[0]


def test_what_is_not_there_is_named(tiny_set: Path, runs: list[Path]) -> None:
    with pytest.raises(api.InputError, match="nowhere: no such set"):
        api.open_set("nowhere")
    with pytest.raises(api.InputError, match="has no other split; choose one of train, val, test"):
        next(api.batches(api.open_set(tiny_set), "other"))
    data = api.open_set(tiny_set)
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"device": "cuda:1"}, "--device cuda:1: not a device; use auto, cpu or cuda"),
        ({"decode": "rwa"}, "--decode rwa: not a place to decode"),
        ({"batch_size": 0}, "batch_size 0: must be at least 1"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(api.InputError, match=message):
            next(api.batches(data, **{"device": "cpu", **wrong}))
    with pytest.raises(api.InputError, match=r"nowhere\.jpg: no such file"):
        api.load_run(runs[0]).predict(["nowhere.jpg"])
