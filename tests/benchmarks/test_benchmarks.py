"""The benchmarks at tiny sizes: what they compute, record and draw. Nothing here reads a clock."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import harness, lstm, lstm_providers, model, pipeline, plot, step
from benchmarks.lstm_providers import Problem, Provider
from fastnet.config import paper
from fastnet.data.prepared import open_set
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input.streams import Batch
from fastnet_kernels import Stage
from tests.support.kernels import executed
from tests.support.paths import REPOSITORY

CPU = torch.device("cpu")
TINY = [(2, 3, 16), (3, 3, 4)]


def test_turns_change_and_warmup_is_apart() -> None:
    calls: list[str] = []

    def called(name: str) -> harness.Candidate:
        def run(laps: harness.Laps) -> None:
            calls.append(name)
            laps("work")

        return run

    runs = {name: called(name) for name in "ab"}
    times = harness.alternate(runs, CPU, seconds=0, least=3, warmup=2, before=lambda: calls.append("."))
    assert "".join(calls) == "aabb" + ".a.b" + ".b.a" + ".a.b"
    assert {name: len(laps["work"]) for name, laps in times.items()} == {"a": 3, "b": 3}


def test_laps_add_up() -> None:
    laps = harness.Laps(CPU)
    for name, moment in (("one", 0.25), ("two", 1.0)):
        laps.marks.append((name, laps.marks[0][1] + moment))
    assert laps.milliseconds() == pytest.approx({"one": 250, "two": 750, "total": 1000})


def test_a_results_folder_that_cannot_be_made_is_said_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "QUICK", tmp_path / "file")
    harness.QUICK.touch()
    with pytest.raises(InputError, match=r"file/.*cannot be made"):
        harness.Table("lstm", quick=True)


def test_rows_say_what_they_belong_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "QUICK", tmp_path)
    table = harness.Table("lstm", quick=True)
    table.add({"batch": 4}, "slow", "total", "ms", np.array([10.0, 20.0, 30.0]))
    table.add({"batch": 4}, "fast", "total", "ms", np.array([5.0, 5.0, 5.0]))
    table.add({"batch": 8}, "slow", "total", "images/s", [10.0])
    table.add({"batch": 8}, "fast", "total", "images/s", [40.0])
    table.note({"batch": 4}, "absent", "not run: no GPU here")
    harness.mark_ratios(table.rows, "slow", ("batch", "quantity"))
    rows = harness.read_csv(table.write())
    assert (rows[0]["p20"], rows[0]["p50"], rows[0]["p80"], rows[0]["n"]) == ("14", "20", "26", "3")
    assert [row["ratio"] for row in rows] == ["1.000", "4.000", "1.000", "4.000", ""]
    assert rows[4]["note"] == "not run: no GPU here" and rows[4]["p50"] == ""
    for key in (
        "torch",
        "triton",
        "dali",
        "git",
        "machine",
        "date",
        "load_1_min",
        "clocks.sm",
        "driver_version",
    ):
        assert key in rows[0]


@pytest.mark.parametrize("name", ["whole", "recurrent"])
def test_providers_agree_with_float64(name: str) -> None:
    """Every provider of this machine but the compiled ones, which take a compiler's time."""
    p = Problem(TINY, 3, torch.float32, CPU)
    found = {"whole": lstm_providers.providers, "recurrent": lstm_providers.recurrent_providers}[name](
        p, quick=True
    )
    assert len(found) == {"whole": 4, "recurrent": 1}[name]
    for make in found.values():
        if name == "whole":
            assert lstm.check(p, make) == ""
        laps = harness.Laps(CPU)
        lstm.candidate(p, make(p))(laps)
        assert [lap for lap, _ in laps.marks] == ["start", "forward", "backward"]


def test_the_recurrent_launches_alone() -> None:
    """The GPU's provider, its compiled kernels run on the CPU: it gives them what they take, and no more."""
    p = Problem([(1, 2, 16), (1, 2, 4)], 3, torch.bfloat16, CPU)
    with executed() as runs:
        provider = lstm_providers.fused_recurrent(p)
        assert provider.backward is not None
        provider.backward(provider.forward())
    assert {name: len(stats) for name, stats in runs.items()} == {"forward_kernel": 1, "backward_kernel": 1}
    assert not any(stats.races for (stats,) in runs.values())


def test_padded_weights_change_nothing() -> None:
    assert lstm.check(Problem([(1, 3, 196)], 2, torch.float32, CPU), lstm_providers.padded) == ""


def test_the_cell_that_is_compiled_is_the_naive_one() -> None:
    def uncompiled(p: Problem) -> Provider:
        flat, weights = lstm_providers.stacked_parameters(p, p.dtype)
        hh = [w.hh for w in weights]
        run = lambda: lstm_providers.recurrent_loop(lstm_providers.projections(p, weights), hh)
        return Provider(run, flat, "stacked")

    assert lstm.check(Problem(TINY, 3, torch.float32, CPU), uncompiled) == ""


def off_by_a_thousandth(right: Provider) -> Provider:
    return Provider(lambda: right.forward() * 1.001, right.parameters, right.order)


def weights_swapped(right: Provider) -> Provider:
    ih, hh, *biases = right.parameters
    return Provider(right.forward, [hh, ih, *biases], right.order)


@pytest.mark.parametrize(("wrong", "told"), [(off_by_a_thousandth, "output"), (weights_swapped, "weight_ih")])
def test_wrong_providers_are_not_timed(
    wrong: Callable[[Provider], Provider], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    makes = {"right": lstm_providers.batched, "wrong": lambda p: wrong(lstm_providers.batched(p))}
    monkeypatch.setattr(lstm, "providers", lambda p, quick: makes)
    table = harness.Table("lstm", quick=True)
    lstm.measure(table, lstm.Case("conv5", 64, 64, 2), CPU, 1, seconds=0, quick=True)
    rows = [row for row in table.rows if row["provider"] == "wrong"]
    assert len(rows) == 1 and told in rows[0]["note"] and "p50" not in rows[0]
    assert any(row.get("p50") for row in table.rows if row["provider"] == "right")


def test_model_counts_are_lines_and_bounds_follow() -> None:
    """The streamed recurrent kernel's tensor work per step, counted and computed; a bound that is its largest part."""
    lines = model.lines(16, (8, 16))
    # H = 16 is one resident tile: K = 16 by N = 64 in m16n8k16 instructions.
    assert lines["forward_kernel"]["mma"].step == 64 // 8
    assert lines["forward_kernel"]["mma flops"].step == 2 * 16 * 16 * 64
    gpu = model.Gpu(80, 1, 1.0, 2048, 10**9, 1e9, issue=10**9, shared=10**9)
    work = {name: model.Line(0, 0) for name in lines["forward_kernel"]}
    work["mma flops"] = model.Line(0, 2048 * 1000)  # a microsecond a step at 1 GHz
    assert model.bound(gpu, [(Stage(3, 5, 16), work)], 32, recurrent=False) == (3 * 5 * 2, "tensor")
    more = model.Gpu(80, 100, 1.0, 2048, 10**9, 1e9, issue=10**9, shared=10**9)
    assert model.bound(more, [(Stage(3, 5, 16), work)], 32, recurrent=True) == (5, "steps of one block")


def test_pipeline_providers_give_like_images(tiny_set: Path, tmp_path: Path) -> None:
    """The same mean and spread of pixels, over draws of their own, to what these few images allow."""
    source = pipeline.Source(open_set(tiny_set).splits["train"], tmp_path / "train", 21)
    means = {}
    for name, opened in pipeline.providers(CPU).items():
        if opened is pipeline.decode_only:
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


@pytest.mark.parametrize("network", ["baseline", "lstm"])
def test_step_and_its_breakdown(network: str, tiny_set: Path, tmp_path: Path) -> None:
    """Rows of every candidate, shares that make a whole, and no LSTM in the baseline."""
    data, table = open_set(tiny_set), harness.Table("step", quick=True)
    source = pipeline.Source(data.splits["train"], tmp_path / "train", 8)
    case = {"network": network, "phase": "full", "image_size": 32, "batch": 8, "threads": 1, "device": "cpu"}
    step.measure(table, data, source, case, Runtime(CPU), seconds=0)
    rows = {(row["provider"], row["quantity"]): row for row in table.rows}
    assert {name for name, quantity in rows if quantity == "step"} == {step.EPOCH, step.LIMIT, step.PLAIN}
    share = {
        quantity: float(row["p50"]) for (_, quantity), row in rows.items() if quantity.startswith("share")
    }
    parts = ("data", "forward", "backward", "optimizer", "rest")
    assert sum(share[f"share {name}"] for name in parts) == pytest.approx(1, abs=1e-3)
    assert (share["share lstm"] > 0) == (share["share lstm backward"] > 0) == (network == "lstm")
    assert share["share lstm"] + share["share backbone"] <= share["share forward"]


def test_another_network_is_not_timed(tiny_set: Path) -> None:
    config = replace(paper("lstm"), image_size=32)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    stream = step.Resident(Batch(x, torch.zeros(2, dtype=torch.int64), np.arange(2)), 4)
    job = step.make_job(config, "full", 3, stream, Runtime(CPU))
    plain = step.Plain(job.network, config)
    assert step.check(job.network, plain, x, Runtime(CPU)) == ""
    nn.init.normal_(plain.lstms[5].get_parameter("weight_hh_l0"))
    assert "plainly written" in step.check(job.network, plain, x, Runtime(CPU))


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


@pytest.mark.parametrize(
    ("script", "tool", "flag"), [("nsys.sh", "NSYS", "--output"), ("ncu.sh", "NCU", "--export")]
)
def test_profiler_scripts_name_a_file_per_rank(script: str, tool: str, flag: str, tmp_path: Path) -> None:
    """The profiler is not here: `echo` in its place shows the command line that it would be given."""
    path = REPOSITORY / "benchmarks" / script
    env = {**os.environ, tool: "echo", "OUT": str(tmp_path / "out"), "RANK": "3"}
    line = [str(path), "python", "train.py", "--run-dir", "a b"]
    said = subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout.strip()
    assert said.endswith("python train.py --run-dir a b")
    assert str(tmp_path / "out" / "rank3") in said.partition(flag)[2]
    assert (tmp_path / "out").is_dir()
    assert subprocess.run([str(path)], env=env, capture_output=True, text=True).returncode == 2
