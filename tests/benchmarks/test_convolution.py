"""The benchmark of convolutions as products of matrices, at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import convolution, harness


def test_every_case_has_both_ways_and_a_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "QUICK", tmp_path)
    monkeypatch.setattr(convolution, "IMAGE_SIZES", (64, 96))
    monkeypatch.setattr(convolution, "LAYERS", ((4, 8, 1), (2, 8, 2)))
    convolution.main(["--quick", "--threads", "1"])
    rows = harness.read_csv(next(tmp_path.glob("*/convolution.csv")))
    assert len(rows) == 2 * 2 * 2 * 2 * 3  # sizes, layers, types, ways, laps
    assert {row["provider"] for row in rows} == {"nn.Conv2d", "product of matrices"}
    assert all(float(row["p50"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert {row["ratio"] for row in rows if row["provider"] == "nn.Conv2d"} == {"1.000"}
    # 2x2 and 3x3 positions: the product is for four of them in float32, for sixteen in bfloat16.
    taken = {(row["image_size"], row["dtype"]): row["taken"] for row in rows}
    assert [key for key, way in taken.items() if way == "convolution"] == [("96", "float32")]
