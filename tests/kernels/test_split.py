"""Small batches: a group's hidden units split over programs that meet once a step.

The compiled PTX, run with all programs of a launch at once. The interpreter runs programs one after the other, so that
the first would wait for ever; it never sees a split plan.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fastnet_kernels import ChannelGroupLSTM, Stage, launch, tune
from fastnet_kernels.plan import (
    BATCH_TILE,
    LAUNCH,
    MEETINGS,
    is_split,
    plan,
    plans_for,
    programs,
    programs_per_sm,
    sizes,
)
from ptxrun import Stats
from tests.support.kernels import executed, failures, feature_maps, on_multiprocessors

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAPER = (Stage(4, 64, 196), Stage(8, 64, 49))


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    on_multiprocessors(launch, 132, monkeypatch)


def assert_split_and_clean(runs: dict[str, list[Stats]], programs: int) -> None:
    for name in ("forward_kernel", "backward_kernel"):
        assert {len(stats.per_cta) for stats in runs[name]} == {programs}
        for stats in runs[name]:
            assert stats.metadata.launch_cooperative_grid
            assert not stats.races, f"{name}: {stats.races[0]}"
            assert not stats.cta_races, f"{name}: {stats.cta_races[0]}"
            assert not stats.uninit, f"{name}: {stats.uninit}"


@pytest.mark.parametrize(
    ("stages", "batch", "dtype", "recompute", "programs"),
    [
        pytest.param(
            [(1, 3, 68), (1, 2, 16)],
            2,
            BF16,
            False,
            3 + 1,
            id="bf16",
            marks=[pytest.mark.long, pytest.mark.slow],
        ),
        pytest.param([(2, 2, 68)], 19, FP16, True, 2 * 3 * 2, id="ragged-recomputed-fp16"),
        pytest.param([(1, 3, 37)], 3, FP32, False, 2, id="fp32", marks=[pytest.mark.long, pytest.mark.slow]),
        pytest.param(
            [(1, 3, 196), (2, 3, 49)],
            5,
            BF16,
            False,
            7 + 2,
            id="paper-bf16",
            marks=[pytest.mark.long, pytest.mark.slow],
        ),
        pytest.param(
            [(1, 2, 272)], 2, BF16, False, 10, id="blocked-bf16", marks=[pytest.mark.long, pytest.mark.slow]
        ),
        pytest.param(
            [(1, 1, 68)], 2, FP16, False, 3, id="one-step", marks=[pytest.mark.long, pytest.mark.slow]
        ),
    ],
)
def test_against_float64(
    stages: Sequence[tuple[int, int, int]], batch: int, dtype: torch.dtype, recompute: bool, programs: int
) -> None:
    with executed() as runs:
        assert not failures(launch, stages, batch, dtype, recompute=recompute)
    assert_split_and_clean(runs, programs)


@pytest.mark.long
@pytest.mark.slow
def test_random_schedules() -> None:
    """Warps and thread blocks in random order, two tiles of the batch."""
    with executed(schedule="random", seed=1) as runs:
        assert not failures(launch, [(1, 3, 68)], 17, BF16)
    assert_split_and_clean(runs, 3 * 2)


@pytest.mark.long
@pytest.mark.slow
def test_work_of_a_step() -> None:
    """Tensor-core instructions, and bytes of h and of dh's sums, exactly as computed from the tiles."""
    steps = 3
    with executed() as runs:
        assert not failures(launch, [(1, steps, 196)], 5, BF16)
    (forward,), (backward,) = runs["forward_kernel"], runs["backward_kernel"]
    assert forward.mma == steps * 7 * (208 // 16) * (128 // 8)
    assert backward.mma == (steps - 1) * 7 * (128 // 16) * (224 // 8)
    rows, padded = BATCH_TILE, 7 * 32
    assert forward.unique["h"] == (steps * rows * 208 * 2, (steps + 1) * rows * padded * 2)
    assert backward.unique["carry"] == (2 * 7 * rows * padded * 4, 2 * 7 * rows * padded * 4)


@pytest.mark.slow
def test_inference_and_second_backward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two slots of h in turn; and counters that a backward leaves as it found them. Said once."""
    monkeypatch.setattr(launch, "_said", False)
    module, batch = ChannelGroupLSTM([(1, 4, 68)]), 2
    x = [f.to(BF16).contiguous(memory_format=torch.channels_last) for f in feature_maps(module.stages, batch)]
    dout = torch.ones(batch, module.out_features, dtype=BF16)
    given = (x, module.weights(), module.stages)
    with torch.no_grad(), executed() as runs:
        y = launch.forward(*given, save=False, recompute=False)[0]
        expected, *saved = launch.forward(*given, save=True, recompute=False)
        (first,), (of_first,) = launch.backward(dout, *given, *saved, needs_dx=True)
        (second,), (of_second,) = launch.backward(dout, *given, *saved, needs_dx=True)
    assert capsys.readouterr().err.count("batches of 2 split over programs (3 for 68 units)") == 1
    assert_split_and_clean(runs, 3)
    assert torch.equal(y, expected) and torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(of_first, of_second, strict=True))


@pytest.mark.slow
def test_as_the_streamed_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of the streamed kernels to the rounding of the dtype."""
    module = ChannelGroupLSTM([(1, 4, 100)])
    x = [f.to(FP16).contiguous(memory_format=torch.channels_last) for f in feature_maps(module.stages, 17)]
    outputs = []
    for processors in (132, 0):
        on_multiprocessors(launch, processors, monkeypatch)
        with torch.no_grad(), executed():
            outputs.append(launch.forward(x, module.weights(), module.stages, save=False, recompute=False)[0])
    torch.testing.assert_close(*outputs, rtol=torch.finfo(FP16).eps, atol=torch.finfo(FP32).eps)


@pytest.mark.parametrize(
    ("batch", "processors", "split"),
    [
        (1, 132, True),
        (80, 132, True),
        (81, 132, False),
        (64, 108, True),
        (65, 108, False),
        (32, 68, True),
        (32, 67, False),
        (1, 20, False),
        (1, 0, False),
    ],
)
def test_choice(batch: int, processors: int, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's call has 4 * 7 + 8 programs for 16 images; two fit a multiprocessor, of which 32 are left free."""
    on_multiprocessors(launch, processors, monkeypatch)
    plans = launch.plans_for(torch.empty(batch, 1, dtype=BF16), PAPER, save=True)
    assert is_split(plans) == split
    assert [p.parts for p in plans] == ([7, 1] if split else [1, 1])


def test_no_cpu_call_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not is_split(plans_for(torch.empty(1, 1, dtype=BF16), PAPER, save=True))


def test_the_choice_follows_the_launch_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tune.py changes it: no plan of another table comes from a cache."""
    x, stage = torch.empty(1, 1, dtype=BF16), [Stage(1, 2, 196)]
    assert plans_for(x, stage, save=True)[0].block == 64
    monkeypatch.setitem(LAUNCH, 80, (LAUNCH[80][2]._replace(block=32),))
    assert plans_for(x, stage, save=True)[0].block == 32


@pytest.mark.parametrize(("stages", "batch"), [("4x64x196", "32"), ("4x64x64", "256")])
def test_tuning_refuses_a_batch_that_is_split(
    stages: str, batch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second by rows that are candidates, not by the table's."""
    monkeypatch.setattr("sys.argv", ["tune", "--stages", stages, "--batch", batch])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "architecture", lambda device: 90)
    monkeypatch.setattr(tune, "multiprocessors", lambda device: 132)
    before = dict(LAUNCH)
    assert tune.main() == 2
    assert f"--batch {batch}" in capsys.readouterr().err and before == LAUNCH


@pytest.mark.parametrize("arch", LAUNCH)
def test_shared_memory_decides_too(arch: int) -> None:
    assert programs_per_sm(arch) == (1 if arch in (86, 89, 120) else 2)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_layout(dtype: torch.dtype) -> None:
    """What is saved for backward, or allocated by who does not know the choice, is the same split or not."""
    stages = [Stage(2, 3, 196), Stage(1, 2, 49), Stage(1, 3, 300)]
    plain, split = (plan(stages, dtype, 80, save=True, split=split) for split in (False, True))
    assert sizes(plain, 32)._replace(carry=0) == sizes(split, 32)._replace(carry=0)
    alike = [
        [p._replace(parts=1, first_program=0, first_meeting=0, carry_at=0) for p in plans]
        for plans in (plain, split)
    ]
    assert alike[0] == alike[1]
    assert programs(split) == sum(s.groups * p.parts for s, p in zip(stages, split, strict=True))
    meetings = [p.first_meeting + g for p in split if p.parts > 1 for g in range(p.groups)]
    assert meetings == list(range(len(meetings))) and len(meetings) <= MEETINGS
