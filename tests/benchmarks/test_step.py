"""The step benchmark: what it computes at tiny sizes, and where it says the time goes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import harness, pipeline, plain, step
from benchmarks.phase import OneBatch, at_phase
from benchmarks.step_peers import peers
from fastnet.config import paper
from fastnet.data.prepared import open_set
from fastnet.distributed.ranks import Runtime
from fastnet.input.streams import Batch

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["baseline", "lstm"])
def test_step_and_its_breakdown(network: str, tiny_set: Path, tmp_path: Path) -> None:
    """Rows of every candidate, shares that make a whole, and no LSTM in the baseline."""
    data, table = open_set(tiny_set), harness.Table("step", quick=True)
    source = pipeline.Source(data.splits["train"], tmp_path / "train", 8)
    case = {
        "set": data.hash,
        "network": network,
        "phase": "full",
        "image_size": 32,
        "batch": 8,
        "threads": 1,
        "device": "cpu",
    }
    step.measure(table, data, source, case, Runtime(CPU), seconds=0)
    rows = {(row["provider"], row["quantity"]): row for row in table.rows}
    expected = {step.EPOCH, step.LIMIT, step.PLAIN} | (set(peers()) if network == "baseline" else set())
    assert {name for name, quantity in rows if quantity == "step"} == expected
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
    stream = OneBatch(Batch(x, torch.zeros(2, dtype=torch.int64), np.arange(2)), 4)
    with at_phase(config, "full", open_set(tiny_set), Runtime(CPU), stream) as trainer:
        written = plain.plain(trainer.network, config)
        assert plain.difference(trainer.network, written, x, Runtime(CPU)) == ""
        nn.init.normal_(written.get_parameter("lstms.layer4.1.weight_hh_l0"))
        assert "plainly written" in plain.difference(trainer.network, written, x, Runtime(CPU))


def test_float32_on_a_gpu_is_held_to_tf32() -> None:
    """TF32 rounds an operand by up to 2^-11; twenty layers of float32 roundings would allow 2^-19."""
    gpu = torch.device("cuda", 0)
    assert plain.rounding(torch.float32, gpu) == 2.0**-10
    assert plain.rounding(torch.float32, CPU) == 2.0**-23
    assert plain.rounding(torch.bfloat16, gpu) == 2.0**-7


@pytest.mark.parametrize(
    ("batch_s", "expected"),
    [(0.5, ["step"] * 3), (2.0, ["take"] * 4 + ["step"] * 7)],
)
def test_a_queue_is_measured_as_a_long_run_has_it(
    batch_s: float, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full where a batch is made faster than a step of a second. Otherwise empty, for a number of steps that the three
    workers share evenly. One step ahead is not measured.
    """
    now, calls = [0.0], []
    slept: list[float] = []

    def lasting(name: str, seconds: float) -> None:
        now[0] += seconds
        calls.append(name)

    monkeypatch.setattr(step.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(step.time, "sleep", slept.append)
    run = step.FedSteps(
        partial(lasting, "step", 1 + batch_s),
        2,
        take=partial(lasting, "take", batch_s),
        prepared=4,
        workers=3,
        alone=partial(lasting, "alone", 1.0),
        device=CPU,
    )
    calls.clear()
    laps = harness.Laps(CPU)
    run(laps)
    assert calls == expected
    assert slept == pytest.approx([1.5 * 4 * batch_s, 1.5 * max(4, run.count) * batch_s])
    assert laps.milliseconds()["steps"] == pytest.approx(1e3 * run.count * (1 + batch_s))
    assert run.count == {0.5: 2, 2.0: 6}[batch_s]


@pytest.mark.slow
def test_steps_on_kept_features(tiny_set: Path, tmp_path: Path) -> None:
    """A frozen phase is timed on images and on kept features, and compared with full training."""
    data, table = open_set(tiny_set), harness.Table("step", quick=True)
    source = pipeline.Source(data.splits["train"], tmp_path / "train", 8)
    for phase in ("head", "full"):
        case = {
            "set": data.hash,
            "network": "lstm",
            "phase": phase,
            "image_size": 32,
            "batch": 8,
            "threads": 1,
            "device": "cpu",
        }
        step.measure(table, data, source, case, Runtime(CPU), seconds=0)
    step.paces(table)
    pace = {
        (row["phase"], row["provider"]): float(row["p50"]) for row in table.rows if row["quantity"] == "step"
    }
    ratio = {row["quantity"]: float(row["p50"]) for row in table.rows if row["unit"] == "times"}
    kept, full = pace["head", step.KEPT], pace["full", step.EPOCH]
    assert ratio["kept over full"] == pytest.approx(kept / full, rel=1e-3)
    assert ratio["kept over frozen"] == pytest.approx(kept / pace["head", step.EPOCH], rel=1e-3)
    assert set(ratio) == {"frozen over full", "kept over full", "kept over frozen"}
    assert not (data.path / "features").exists()
