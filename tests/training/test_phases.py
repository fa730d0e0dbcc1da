"""The plan of phases: learning rates, plateaus, and how a run moves through them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from fastnet.config import PRESETS, Config
from fastnet.training import phases
from fastnet.training.state import TrainState


def test_the_plan_of_a_run() -> None:
    assert [phase.name for phase in phases.plan(PRESETS["paper"]("lstm"))] == ["head", "full"]
    assert [phase.name for phase in phases.plan(PRESETS["paper"]("baseline"))] == ["full"]


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    phase = phases.Phase("full", "none", 4, "sgd", 0.5, 0, 0.0, (224,))
    rates = [phases.learning_rate(phase, step, 10, warmup_epochs=1.0) for step in range(40)]
    assert rates[:10] == pytest.approx([0.5 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == 0.5
    assert rates[25] == pytest.approx(0.25)  # half way between warmup and end
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[39] < 0.002


def test_a_plateau_keeps_the_rate_and_ends_the_phase() -> None:
    plan = [
        phases.Phase("head", "conv5", 20, "adamw", 0.1, 2, 0.01, (224,)),
        phases.Phase("full", "none", 2, "sgd", 0.1, 0, 0.0, (224,)),
    ]
    assert {phases.learning_rate(plan[0], step, 10, 1.0) for step in range(10, 200)} == {0.1}
    position = TrainState()
    for top1 in (0.5, 0.505, 0.52, 0.525):  # better, flat, better, flat
        phases.finish_epoch(plan, position, top1)
        assert position.phase == 0
    phases.finish_epoch(plan, position, 0.52)
    assert (position.phase, position.epoch, position.phase_epoch, position.best_top1) == (1, 5, 0, 0.525)
    phases.finish_epoch(plan, position, 0.1)
    assert not position.done
    phases.finish_epoch(plan, position, 0.1)
    assert position.done


def test_images_grow_over_two_thirds_of_the_epochs() -> None:
    def sizes(epochs: int) -> list[int]:
        phase = phases.Phase("full", "none", epochs, "sgd", 0.1, 0, 0.0, (128, 160, 192, 224))
        return [phases.image_size(phase, epoch) for epoch in range(epochs)]

    assert sizes(9) == [128, 128, 160, 160, 192, 192, 224, 224, 224]
    assert sizes(8) == [128, 128, 160, 160, 192, 224, 224, 224]
    assert sizes(2) == [128, 224] and sizes(3) == [128, 160, 224]
    config = Config(start_size=160, head_epochs=2)
    assert [phase.sizes for phase in phases.plan(config)] == [(224,), (160, 192, 224)]
    assert phases.plan(Config())[0].sizes == (224,)


def test_the_averaged_epochs_are_the_last_ones_of_the_last_phase() -> None:
    plan = phases.plan(Config(network="linear", head_epochs=3, epochs=3))
    found = [
        [phases.averaged_before(plan, TrainState(phase=phase, phase_epoch=epoch), 2) for epoch in range(3)]
        for phase in range(2)
    ]
    assert found == [[-1, -1, -1], [-1, 0, 1]]
