"""A training step of each phase on "cuda" against the CPU, in float32, bf16 and fp16; Triton kernels executed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

import softgpu
from fastnet.config import Augment
from fastnet.metrics import Totals
from fastnet.training.ema import Average
from fastnet.training.step import set_learning_rate
from softgpu import forms
from tests.softgpu.trainers import begin, tiny_trainer
from tests.softgpu.weights import distance, snapshot

NETWORKS = ("baseline", "lstm")
AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    double: bool = False,
) -> list[Outcome]:
    """One step of the frozen phase, then one of the whole network, on the same images everywhere."""
    outcomes = []
    same: dict[str, Any] = {
        "decode": "cpu",
        "augment": Augment(erase=0.25),  # without it, the CPU's images are resized by other code than DALI's
    }
    # AdamW's first step is as long for a gradient near 0 as for a large one, and a rounding can turn it round. SGD's is
    # in proportion to the gradient, and so is its error.
    linear: dict[str, Any] = {"head_optimizer": "sgd", "head_lr": 0.05}
    with tiny_trainer(network, device, amp, data, run_dir, backend=backend, **same, **linear) as trainer:
        if double:
            trainer.network.double().register_forward_pre_hook(lambda _, images: (images[0].double(),))
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
    """The CPU in float64."""
    return steps(network, "cpu", None, tiny_set, tmp_path_factory.mktemp("exact"), double=True)


@pytest.mark.parametrize("amp", AMP.values(), ids=list(AMP))
def test_steps(
    amp: torch.dtype | None, network: str, exact: list[Outcome], tiny_set: Path, tmp_path: Path
) -> None:
    """The bound for each tensor is the kernels': 2 times (loss) or 3 times (updates) the error of the CPU in the same
    dtype, or of the rounding of the result itself where the CPU is more exact by chance."""
    dtype = amp or torch.float32
    eps = torch.finfo(dtype).eps
    cpu = steps(network, "cpu", amp, tiny_set, tmp_path / "cpu")
    ours = steps(network, "cuda", amp, tiny_set, tmp_path / "cuda", backend="auto" if amp else "torch")
    for mine, true, theirs in zip(ours, exact, cpu, strict=True):
        assert abs(mine.loss - true.loss) <= 2 * max(abs(theirs.loss - true.loss), eps * true.loss)
        for name, moved in true.moved.items():
            error = (mine.moved[name] - moved).norm().item()
            bound = 3 * max((theirs.moved[name] - moved).norm().item(), eps * moved.norm().item())
            assert error <= bound, f"{name}: {error:.2g} above {bound:.2g}"
        assert not mine.seen.waits, mine.seen.waits
        assert not mine.seen.problems, mine.seen.problems
        assert network == "baseline" or amp is None or mine.seen.launches
        if amp:
            check_operands(mine.seen, amp)
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


def test_adamw(tiny_set: Path, tmp_path: Path) -> None:
    """From the same gradients it takes the CPU's steps, but for a few float32 roundings of a weight in each."""
    count, ended = 3, []
    for device in ("cpu", "cuda"):
        with tiny_trainer("lstm", device, None, tiny_set, tmp_path, backend="torch") as trainer:
            running = begin(trainer, 0)
            generator = torch.Generator().manual_seed(0)
            trained = [p for group in running.optimizer.param_groups for p in group["params"]]
            for _ in range(count):
                for p in trained:
                    p.grad = torch.randn(p.shape, generator=generator).to(device)
                set_learning_rate(running.optimizer, 0.01)
                running.optimizer.step()
            ended.append(snapshot(trainer))
    cpu, cuda = ended
    weights = math.hypot(*(weight.norm().item() for weight in cpu.values()))
    assert distance(cuda, cpu) <= 4 * count * torch.finfo(torch.float32).eps * weights


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


def test_gradients_are_clipped_at_their_own_size(tiny_set: Path, tmp_path: Path) -> None:
    """And not at that of the loss scale, in fp16: a step moves the weights by the rate times the limit."""
    limit = 0.1
    plain: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "clip_grad": limit}
    with tiny_trainer("baseline", "cuda", torch.float16, tiny_set, tmp_path, **plain) as trainer:
        running = begin(trainer, 1)
        running.scaler.load_state_dict({**running.scaler.state_dict(), "scale": SCALE})
        before = [p.detach().clone() for p in trainer.network.parameters()]
        trainer.train_step()
        moved = math.hypot(
            *((p - was).norm().item() for p, was in zip(trainer.network.parameters(), before, strict=True))
        )
    # Each weight is rounded once more when the step is taken.
    rounding = torch.finfo(torch.float32).eps * math.hypot(*(was.norm().item() for was in before))
    step = trainer.config.lr * limit
    assert rounding < step / 100 and moved == pytest.approx(step, abs=rounding)


def test_an_average_moves_as_on_the_cpu(tiny_set: Path, tmp_path: Path) -> None:
    """To a quarter of the way, but for a few roundings."""
    moved = []
    for device in ("cpu", "cuda"):
        with tiny_trainer("baseline", device, None, tiny_set, tmp_path) as trainer:
            average = Average(trainer.network)
            with torch.no_grad():
                trainer.network.classifier.weight.mul_(2)
                trainer.network.backbone.get_buffer("bn1.running_mean").add_(1)
            average.move(0.25)
            moved.append({name: tensor.cpu() for name, tensor in average.network.state_dict().items()})
    for name, theirs in moved[0].items():
        torch.testing.assert_close(moved[1][name], theirs, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
