"""The times that an epoch reports are those of its steps."""

from __future__ import annotations

import pytest
import torch

from fastnet.metrics import Counter, Totals
from fastnet.training import meter


def test_a_save_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a second each, a save of seven, and a step of two seconds."""
    clock = iter([0.0, 1.0, 2.0, 9.0, 11.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    watch = meter.Stopwatch(torch.device("cpu"))
    watch.step()
    watch.step()
    watch.resume()
    watch.step()
    assert watch.milliseconds().tolist() == [1000.0, 1000.0, 2000.0]
    summary = watch.summary(batch_size=8)
    assert (summary["seconds"], summary["images_per_s"]) == (4.0, 3 * 8 / 4)


def test_an_epoch_without_a_step_has_no_pace() -> None:
    assert meter.Stopwatch(torch.device("cpu")).summary(batch_size=8).keys() == {"peak_mem_mb"}


def test_a_loss_whose_sum_would_overflow_is_not_finite() -> None:
    """Two images of 2^39 nats would add up to 0 in 64 bits."""
    counter = Counter(torch.device("cpu"))
    logits = torch.tensor([[2.0**39, 0.0], [2.0**39, 0.0], [1.0, 0.0]])
    counter.add(logits, torch.tensor([1, 1, 0]))
    totals = Totals(*counter.sums.tolist())
    assert (totals.not_finite, totals.images, totals.correct1) == (2, 3, 1) and 0 < totals.loss < 2**24
