"""The LSTM benchmark: its providers agree with float64, and one that does not is listed without times."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import harness, lstm, lstm_providers, lstm_recurrent
from benchmarks.lstm_providers import Problem, Provider
from tests.support.kernels import executed

CPU = torch.device("cpu")
TINY = [(2, 3, 16), (3, 3, 4)]


@pytest.mark.parametrize("name", ["whole", "recurrent"])
def test_providers_agree_with_float64(name: str) -> None:
    """Every provider of this machine but the compiled ones, which take a compiler's time."""
    p = Problem(TINY, 3, torch.float32, CPU)
    found = {"whole": lstm_providers.providers, "recurrent": lstm_recurrent.recurrent_providers}[name](
        p, quick=True
    )
    assert len(found) == {"whole": 4, "recurrent": 1}[name]
    for make in found.values():
        if name == "whole":
            assert lstm.check(p, make) == ""
        laps = harness.Laps(CPU)
        lstm.candidate(p, make(p))(laps)
        assert [lap for lap, _ in laps.marks] == ["start", "forward", "backward"]


@pytest.mark.parametrize(("hidden", "split"), [(16, False), (68, True)])
def test_the_recurrent_launches_alone(hidden: int, split: bool) -> None:
    """The GPU's provider, its compiled kernels run on the CPU: it gives them what they take, and no more; twice."""
    p = Problem([(1, 2, hidden), (1, 2, 4)], 3, torch.bfloat16, CPU)
    with executed() as runs:
        provider = lstm_recurrent.fused_recurrent(p, split=split)
        assert provider.backward is not None
        for _ in range(2):
            provider.backward(provider.forward())
    assert {name: len(stats) for name, stats in runs.items()} == {
        "pack_kernel": 1,
        "forward_kernel": 2,
        "backward_kernel": 2,
    }
    assert not any(stats.races or stats.cta_races for both in runs.values() for stats in both)


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
