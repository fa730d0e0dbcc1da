"""The pipeline benchmark: all loaders give like images, and one that does not is told."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import pipeline
from fastnet.data.prepared import open_set
from fastnet.input.streams import Batch

CPU = torch.device("cpu")


def test_pipeline_providers_give_like_images(tiny_set: Path, tmp_path: Path) -> None:
    """The same mean and spread of pixels, over draws of their own, to what these few images allow."""
    source = pipeline.Source(open_set(tiny_set).splits["train"], tmp_path / "train", 21)
    means = {}
    for name, opened in pipeline.providers(CPU).items():
        if opened is pipeline.decode_only or name in pipeline.PEERS:
            continue
        with opened(source, 32, 1, CPU) as take:
            assert pipeline.check(take, source, 32, CPU) == ""
            batches = [take() for _ in range(4)]
        images = [b.x if isinstance(b, Batch) else b for b in batches]
        means[name] = float(torch.cat([x.flatten().clone() for x in images]).mean())
    assert len(means) == 5
    assert max(means.values()) - min(means.values()) < 0.5, means


def test_a_loader_of_other_images_is_told(tiny_set: Path, tmp_path: Path) -> None:
    source = pipeline.Source(open_set(tiny_set).splits["train"], tmp_path / "train", 4)
    assert "gives [4, 3, 16, 16]" in pipeline.check(lambda: torch.zeros(4, 3, 16, 16), source, 32, CPU)
    assert "not normalised" in pipeline.check(lambda: torch.rand(4, 3, 32, 32) * 255, source, 32, CPU)
