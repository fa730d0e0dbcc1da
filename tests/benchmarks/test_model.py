"""The bounds counted in the compiled kernels."""

from __future__ import annotations

import csv

from benchmarks import model, model_tables
from fastnet_kernels import Stage
from tests.support.paths import REPOSITORY


def test_model_counts_are_lines_and_bounds_follow() -> None:
    """The streamed recurrent kernel's tensor work per step, counted and computed; a bound that is its largest part."""
    lines = model.lines(16, (8, 16))
    # H = 16 is one resident tile: K = 16 by N = 64 in m16n8k16 instructions.
    assert lines["forward_kernel"]["mma"].step == 64 // 8
    assert lines["forward_kernel"]["mma flops"].step == 2 * 16 * 16 * 64
    gpu = model.Gpu(80, 1, 1.0, 2048, 10**9, 1e9, "", issue=10**9, shared=10**9)
    work = {name: model.Line(0, 0) for name in lines["forward_kernel"]}
    work["mma flops"] = model.Line(0, 2048 * 1000)  # a microsecond a step at 1 GHz
    assert model.bound(gpu, [(Stage(3, 5, 16), work)], 32, recurrent=False) == (3 * 5 * 2, "tensor")
    more = model.Gpu(80, 100, 1.0, 2048, 10**9, 1e9, "", issue=10**9, shared=10**9)
    assert model.bound(more, [(Stage(3, 5, 16), work)], 32, recurrent=True) == (5, "steps of one block")


def test_readme_has_the_tables_of_the_committed_results() -> None:
    """After a new model.csv: the tables that `python -m benchmarks.lstm --model` prints go into the README."""
    with (REPOSITORY / "benchmarks/results/modelled/model.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    readme = (REPOSITORY / "kernels/README.md").read_text(encoding="utf-8")
    for table in model_tables.tables(rows):
        assert table in readme
    parameters = {
        (r["where"], r["quantity"]): float(r["value"]) for r in rows if r["quantity"].startswith("parameter")
    }
    figures = {k: v for k, v in vars(model.GPUS["H100 SXM"]).items() if k != "source"}
    assert {name: parameters["H100 SXM", f"parameter {name}"] for name in figures} == figures
