"""The figures, from the files of results alone."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from benchmarks import harness, lstm_providers, plot


def lstm_row(provider: str, p50: float) -> dict[str, Any]:
    case = {"stages": "conv4,conv5", "image_size": 224, "seq_len": 64, "batch": 64, "dtype": "float32"}
    timing = {"quantity": "total", "unit": "ms", "p20": p50 * 0.9, "p50": p50, "p80": p50 * 1.1, "n": 5}
    return {
        "benchmark": "lstm",
        **case,
        "part": "whole",
        "l2": "",
        "provider": provider,
        **timing,
        **harness.about(),
    }


def test_figures_from_files_alone(tmp_path: Path) -> None:
    """Bars as high as the rows say; a provider without a time has none."""
    rows = [lstm_row(lstm_providers.BASELINE, 20), lstm_row("fastnet (torch backend)", 10)]
    rows.append({**rows[0], "provider": "FlashRNN", **dict.fromkeys(("quantity", "p20", "p50", "p80"), "")})
    harness.write_csv(tmp_path / "lstm.csv", rows)
    assert [path.name for path in plot.draw_all(tmp_path)] == ["lstm.png", "lstm.svg"]
    assert all((tmp_path / f"lstm.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))
    (axes,) = plot.draw_lstm(harness.read_csv(tmp_path / "lstm.csv")).axes
    assert sorted(bar.get_height() for bar in axes.patches) == [1, 2]  # type: ignore[attr-defined]


def test_committed_results_can_be_drawn(tmp_path: Path) -> None:
    for folder in sorted(harness.RESULTS.glob("*")):
        for name in plot.DRAW:
            if (folder / f"{name}.csv").exists():
                rows = harness.read_csv(folder / f"{name}.csv")
                assert plot.DRAW[name](rows).axes, folder
                with (folder / f"{name}.csv").open(newline="") as file:
                    assert {"git", "torch", "triton", "dali"} <= set(next(csv.reader(file)))
