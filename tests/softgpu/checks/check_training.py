"""A training step of each phase on "cuda" against the CPU, in float32, bf16 and fp16; Triton kernels executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

import softgpu
from fastnet.config import Augment
from fastnet.metrics import Totals
from softgpu import forms
from tests.softgpu.trainers import begin, tiny_trainer
from tests.softgpu.weights import distance, snapshot

NETWORKS = ("baseline", "lstm")
HALF = (torch.bfloat16, torch.float16)
SCALE, TOO_LARGE = 2.0**7, 2.0**24  # of the loss: no gradient, or every step, overflows in fp16
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm")
LOSS = ("_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward")


class Outcome(NamedTuple):
    """A phase after one step: the mean loss, how each tensor of the state moved, and what was asked of the device."""

    loss: float
    moved: dict[str, Tensor]
    seen: softgpu.Watch


def steps(
    network: str,
    device: str,
    amp: torch.dtype | None,
    data: Path,
    run_dir: Path,
    *,
    backend: Literal["auto", "torch"] = "torch",
) -> list[Outcome]:
    """One step of the frozen phase, then one of the whole network, on the same images everywhere."""
    outcomes = []
    same: dict[str, Any] = {
        "decode": "cpu",
        "augment": Augment(erase=0.25),
    }  # without erasing, the CPU's images are resized by other code than DALI's
    with tiny_trainer(network, device, amp, data, run_dir, backend=backend, **same) as trainer:
        for phase in range(2):
            running = begin(trainer, phase)
            running.scaler.load_state_dict({**running.scaler.state_dict(), "scale": SCALE})
            before = snapshot(trainer)
            with softgpu.watch(operands=True) as seen:
                trainer.train_step()
            after = snapshot(trainer)
            moved = {name: after[name] - before[name] for name in after}
            loss = Totals(*trainer.counter.sums.tolist()).mean_loss
            outcomes.append(Outcome(loss, moved, seen))
    return outcomes


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def exact(network: str, tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """The CPU in float32."""
    return steps(network, "cpu", None, tiny_set, tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def rounded(
    network: str, tiny_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[torch.dtype, list[Outcome]]:
    """The CPU under autocast: how far half precision alone takes a step from float32's."""
    return {
        dtype: steps(network, "cpu", dtype, tiny_set, tmp_path_factory.mktemp("rounded")) for dtype in HALF
    }


def test_float32(
    network: str,
    exact: list[Outcome],
    rounded: dict[torch.dtype, list[Outcome]],
    tiny_set: Path,
    tmp_path: Path,
) -> None:
    """As the CPU in float32, but for the order of sums. How much a rounding error grows on its way to the weights is
    known from bf16's: in float32 it is smaller by the ratio of their eps."""
    ratio = torch.finfo(torch.float32).eps / torch.finfo(torch.bfloat16).eps
    ours = steps(network, "cuda", None, tiny_set, tmp_path)
    for mine, cpu, bf16 in zip(ours, exact, rounded[torch.bfloat16], strict=True):
        assert mine.loss == pytest.approx(cpu.loss, rel=4 * torch.finfo(torch.float32).eps)
        assert distance(mine.moved, cpu.moved) <= 3 * ratio * distance(bf16.moved, cpu.moved)
        assert not mine.seen.waits, mine.seen.waits


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(
    dtype: torch.dtype,
    network: str,
    exact: list[Outcome],
    rounded: dict[torch.dtype, list[Outcome]],
    tiny_set: Path,
    tmp_path: Path,
) -> None:
    """The bound for each tensor is the kernels': 2 times (loss) or 3 times (updates) the error of the CPU in the same
    dtype, or of the rounding of the result itself where the CPU is more exact by chance."""
    eps = torch.finfo(dtype).eps
    ours = steps(network, "cuda", dtype, tiny_set, tmp_path, backend="auto")
    for mine, true, theirs in zip(ours, exact, rounded[dtype], strict=True):
        assert abs(mine.loss - true.loss) <= 2 * max(abs(theirs.loss - true.loss), eps * true.loss)
        for name, moved in true.moved.items():
            error = (mine.moved[name] - moved).norm().item()
            bound = 3 * max((theirs.moved[name] - moved).norm().item(), eps * moved.norm().item())
            assert error <= bound, f"{name}: {error:.2g} above {bound:.2g}"
        assert not mine.seen.waits, mine.seen.waits
        assert not mine.seen.problems, mine.seen.problems
        assert network == "baseline" or mine.seen.launches
        check_operands(mine.seen, dtype)
    assert not forms.unknown


def check_operands(seen: softgpu.Watch, dtype: torch.dtype) -> None:
    """Everything is on the GPU, what has four dimensions is channels_last and never copied into another order, and
    products are taken in `dtype`, losses in float32."""
    assert seen.calls
    for call in seen.calls:
        copies = call.name == "copy_"
        for operand in call.operands:
            assert copies or operand.device.type == "cuda" or not operand.shape, call
            assert copies or len(operand.shape) != 4 or is_channels_last(operand), call
            assert call.name not in PRODUCTS or operand.dtype == dtype, call
            assert call.name not in LOSS or operand.dtype in (torch.float32, torch.int64), call
        if copies and len(call.operands[0].shape) == 4:
            assert call.operands[0].stride == call.operands[1].stride, call
    assert {"convolution", "_log_softmax"} <= seen.operators.keys()


def is_channels_last(operand: softgpu.Operand) -> bool:
    made = torch.empty_strided(operand.shape, operand.stride, device="meta")
    return made.is_contiguous(memory_format=torch.channels_last)


def test_an_overflowing_step_is_skipped(tiny_set: Path, tmp_path: Path) -> None:
    """No weight and no momentum moves, and the loss scale is halved, on the device."""
    with tiny_trainer("baseline", "cuda", torch.float16, tiny_set, tmp_path) as trainer:
        running = begin(trainer, 1)
        running.scaler.load_state_dict({**running.scaler.state_dict(), "scale": TOO_LARGE})
        before = [p.clone() for p in trainer.network.parameters()]
        with softgpu.watch() as seen:
            trainer.train_step()
        assert not seen.waits and running.scaler.get_scale() == TOO_LARGE / 2
        assert all(map(torch.equal, before, trainer.network.parameters()))
        assert not any(state["momentum_buffer"].any() for state in running.optimizer.state.values())
