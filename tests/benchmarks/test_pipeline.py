"""The pipeline benchmark: all loaders give like images, and one that does not is told."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from benchmarks import pipeline
from benchmarks.harness import Table
from fastnet.data.prepared import open_set
from fastnet.input.jpegs import turbojpeg
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
    assert len(means) == 5 + turbojpeg()
    assert max(means.values()) - min(means.values()) < 0.5, means


def test_a_loader_of_other_images_is_told(tiny_set: Path, tmp_path: Path) -> None:
    source = pipeline.Source(open_set(tiny_set).splits["train"], tmp_path / "train", 4)
    assert "gives [4, 3, 16, 16]" in pipeline.check(lambda: torch.zeros(4, 3, 16, 16), source, 32, CPU)
    assert "not normalised" in pipeline.check(lambda: torch.rand(4, 3, 32, 32) * 255, source, 32, CPU)


def test_too_little_shared_memory_is_a_row_that_says_so(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not a worker that is killed."""
    usage = namedtuple("usage", "total")
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage(total=2**20))
    source = pipeline.Source(open_set(tiny_set).splits["train"], tmp_path / "train", 8)
    table = Table("pipeline", quick=True)
    pipeline.measure(table, source, 64, 1, CPU, seconds=0, batches=1)
    notes = {row["provider"]: row["note"] for row in table.rows if "note" in row}
    for name in (pipeline.BASELINE, "DataLoader, decode_jpeg"):
        assert notes[name].startswith("cannot run: 3 loaders with 1 workers each need 0.0 GiB of /dev/shm")
    assert any(row["provider"] == "fastnet, decode cpu" and row["p50"] for row in table.rows)
