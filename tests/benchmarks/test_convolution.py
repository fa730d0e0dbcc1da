"""The benchmark of a network's own convolutions, at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import convolution, harness


@pytest.mark.slow
def test_every_case_has_its_ways_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "QUICK", tmp_path)
    monkeypatch.setattr(convolution, "IMAGE_SIZES", (64, 96))
    monkeypatch.setattr(convolution, "LAYERS", ((32, 32, 1, 16), (8, 512, 1, 32), (8, 512, 2, 32)))
    convolution.main(["--quick", "--threads", "1"])
    rows = harness.read_csv(next(tmp_path.glob("*/convolution.csv")))
    ways = {
        (row["channels_in"], row["stride"], row["dtype"], row["provider"]): row["taken"]
        for row in rows
        if row["image_size"] == "64"
    }
    plain, product, gradient = convolution.CONVOLUTION, convolution.PRODUCT, convolution.WINOGRAD
    expected = [("32", "1", "float32", way) for way in (plain, gradient)]
    expected += [("8", "1", "float32", way) for way in (plain, product, gradient)]
    expected += [("8", "2", "float32", way) for way in (plain, product)]
    expected += [("8", stride, "bfloat16", way) for stride in "12" for way in (plain, product)]
    assert sorted(ways) == sorted(expected)
    times = [row for row in rows if row["unit"] == "ms"]
    assert all(float(row["p50"]) > 0 and float(row["ratio"]) > 0 for row in times)
    assert {row["ratio"] for row in times if row["provider"] == plain} == {"1.000"}
    errors = [float(row["p50"]) for row in rows if row["quantity"].startswith("error")]
    most = 128 * 6 * 6 * float(np.finfo(np.float32).eps)  # of sums over so many positions
    assert len(errors) == 2 * 7 and min(errors) > 0 and max(errors) < most
    # 2x2 and 3x3 positions: the product is for four of them in float32, for sixteen in bfloat16.
    conv5 = {(row["image_size"], row["dtype"]): row["taken"] for row in rows if row["channels_out"] == "512"}
    assert [key for key, way in conv5.items() if way == plain] == [("96", "float32")]
