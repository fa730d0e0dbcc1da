"""The training step as a CUDA graph: replays train as plain steps do, and what does not is found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import softgpu
from fastnet.errors import InputError
from fastnet.input.device import DeviceTrainStream, train_stream
from fastnet.metrics import Counter
from fastnet.training import capture, inputs, step, trainer
from fastnet.training.batches import Copied
from fastnet.training.capture import REHEARSAL_SCALE, CapturedStep
from fastnet.training.running import RunningPhase
from fastnet.training.trainer import Trainer
from tests.softgpu.trainers import begin, tiny_trainer

STEPS = 3
RECIPE = {"ema": 0.9, "clip_grad": 1.0, "layer_decay": 0.5, "mixup": 0.4, "cutmix": 1.0}


def trained(run: Path, data: Path, **settings: Any) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Weights and the counter after some steps of either phase, and what the manifest says of the session."""
    network, amp = settings.pop("network"), settings.pop("amp")
    ends = []
    with tiny_trainer(network, "cuda", amp, data, run, backend="torch", **settings) as made:
        for phase in range(2):
            begin(made, phase)
            for _ in range(STEPS):
                made.train_step()
            ends.append({**made.network.state_dict(), "counter": made.counter.sums})
            if made.evaluated.average:
                average = made.evaluated.average.network.state_dict()
                ends[-1] |= {f"average {name}": tensor for name, tensor in average.items()}
            ends[-1] = {name: tensor.clone() for name, tensor in ends[-1].items()}
        session = json.loads((made.run_dir / "manifest.json").read_text())["sessions"][-1]
    return ends, session


@pytest.mark.parametrize(
    ("network", "amp", "settings"),
    [
        pytest.param(
            "baseline",
            torch.float16,
            {"accumulate": 2, "optimizer": "adamw", "decode": "gpu", **RECIPE},
            id="recipe",
        ),
        pytest.param("lstm", torch.bfloat16, {"decode": "raw"}, id="lstm"),
        pytest.param("baseline", torch.bfloat16, {"decode": "cpu", "cache_features": 1}, id="features"),
        pytest.param("baseline", torch.bfloat16, {"decode": "device"}, id="executed"),
    ],
)
def test_replays_train_as_plain_steps(
    network: str, amp: torch.dtype, settings: dict[str, Any], tiny_set: Path, tmp_path: Path
) -> None:
    """Images of the epoch that the rehearsal used up, or a state that it left, would show here."""
    given = {"network": network, "amp": amp, **settings}
    data = shutil.copytree(tiny_set, tmp_path / "set")  # beside which features are kept
    plain, _ = trained(tmp_path / "plain", data, **given)
    replayed, session = trained(tmp_path / "replayed", data, cuda_graph="on", **given)
    for mine, theirs in zip(replayed, plain, strict=True):
        different = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
        assert not different
    for phase in ("head", "full"):
        assert session[f"cuda_graph_{phase}"] == "on, bit for bit as plain steps"


@pytest.mark.parametrize("decode", ["gpu", pytest.param("device", id="executed")])
def test_replays_train_as_plain_steps_where_images_grow(
    decode: str, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimiser, loss scale and moving average go on, into another graph; the decoded set is never there twice."""
    sizes: list[int] = []
    opened: list[DeviceTrainStream] = []

    def noted(*given: Any, **options: Any) -> Any:
        assert all(stream._images is None for stream in opened)
        stream = train_stream(*given, **options)
        sizes.append(given[1].image_size)
        opened.extend([stream] if isinstance(stream, DeviceTrainStream) else [])
        return stream

    monkeypatch.setattr(inputs, "train_stream", noted)
    monkeypatch.setattr(capture, "COMPARED", 1)  # what is executed takes its time
    ends, outcomes = [], []
    given: dict[str, Any] = {"decode": decode, "epochs": 2, "start_size": 32, "image_size": 64, "ema": 0.9}
    for graph in ("off", "on"):
        with tiny_trainer(
            "baseline", "cuda", torch.float16, tiny_set, tmp_path / graph, cuda_graph=graph, **given
        ) as made:
            scaler = begin(made, 1).scaler
            scaler.load_state_dict({**scaler.state_dict(), "scale": REHEARSAL_SCALE})
            for epoch in range(2):
                made.state.epoch = made.state.phase_epoch = epoch
                made.state.step_in_epoch = 0
                made.begin_phase()
                made.train_step()
                outcomes.append(json.loads((made.run_dir / "manifest.json").read_text())["sessions"][-1])
            assert made.running and made.evaluated.average
            assert made.running.scaler.get_scale() == REHEARSAL_SCALE
            tensors = made.network.state_dict()
            average = made.evaluated.average.network.state_dict()
            tensors |= {f"average {name}": tensor for name, tensor in average.items()}
            ends.append({name: tensor.clone() for name, tensor in tensors.items()})
    assert not [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])]
    assert sizes == [64, 32, 64] * 2
    assert [session["cuda_graph_full"] for session in outcomes[2:]] == ["on, bit for bit as plain steps"] * 2


def test_no_save_is_under_way_while_a_graph_is_captured(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pinned memory, freed meanwhile, would be marked with an event of the capture."""
    given: dict[str, Any] = {"decode": "cpu", "cuda_graph": "on"}
    with tiny_trainer("baseline", "cuda", torch.bfloat16, tiny_set, tmp_path, **given) as made:
        begin(made, 0)
        made.train_step()
        made.save()
        assert made.writer.pending
        under_way: list[object] = []
        captured = RunningPhase.capture

        def noted(self: RunningPhase) -> str:
            under_way.append(made.writer.pending)
            return captured(self)

        monkeypatch.setattr(RunningPhase, "capture", noted)
        begin(made, 1)
    assert under_way == [None]


class Waiting(Counter):
    """Asks the device for a number in each step."""

    def add(self, logits: Tensor, y: Tensor) -> None:
        super().add(logits, y)
        self.sums.tolist()


def test_a_step_that_waits_is_not_captured(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """auto goes on with plain steps, which train as if nothing had been tried; on is refused."""
    given = {"network": "baseline", "amp": torch.float16, "decode": "cpu"}
    plain, _ = trained(tmp_path / "plain", tiny_set, **given)
    monkeypatch.setattr(trainer, "Counter", Waiting)
    ends, session = trained(tmp_path / "auto", tiny_set, cuda_graph="auto", **given)
    assert all(torch.equal(ends[i][name], plain[i][name]) for i in range(2) for name in plain[i])
    assert session["cuda_graph_full"].startswith("off, the training step cannot be captured (")
    assert session["cuda_graph_full"] in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--cuda-graph on: .* cannot be captured .*; use auto or off"):
        trained(tmp_path / "on", tiny_set, cuda_graph="on", **given)


def test_a_rate_that_the_graph_does_not_see_is_found_out(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's number becomes a constant of the graph."""

    def set_on_host(optimizer: torch.optim.Optimizer, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    monkeypatch.setattr(step, "set_learning_rate", set_on_host)
    given = {"network": "baseline", "amp": torch.bfloat16, "decode": "cpu"}
    _, session = trained(tmp_path / "run", tiny_set, cuda_graph="auto", **given)
    assert session["cuda_graph_full"].startswith("off, 4 replayed steps end ")


def test_a_batch_that_the_graph_does_not_see_is_found_out(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = CapturedStep.capture

    def stale(self: CapturedStep) -> None:
        taken(self)
        assert isinstance(self.batches, Copied)
        self.batches.x = [x.clone() for x in self.batches.x]

    monkeypatch.setattr(CapturedStep, "capture", stale)
    given = {"network": "baseline", "amp": torch.bfloat16, "decode": "cpu"}
    _, session = trained(tmp_path / "run", tiny_set, cuda_graph="auto", **given)
    assert session["cuda_graph_full"].startswith("off, 4 replayed steps end ")


def test_a_stopped_run_continues_to_the_bit(tiny_set: Path, tmp_path: Path) -> None:
    """The capture at the start of a session leaves the checkpoint's state and its images as they were."""

    def until(made: Trainer, step: int) -> None:
        while made.state.step < step:
            made.train_step()

    given: dict[str, Any] = {"cuda_graph": "on", "decode": "cpu"}
    ends = []
    for stops in ((4,), (2, 4)):
        for stop in stops:
            run = tmp_path / f"stops {len(stops)}"
            with tiny_trainer("baseline", "cuda", torch.float16, tiny_set, run, **given) as made:
                made.begin_phase()
                until(made, stop)
                made.save()
        ends.append({name: tensor.cpu() for name, tensor in made.network.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_on_kept_features_continues_after_its_last_step(tiny_set: Path, tmp_path: Path) -> None:
    """It has to be validated still. The next epoch's draw, with which a capture would begin, is in no file."""
    data = shutil.copytree(tiny_set, tmp_path / "set")
    given: dict[str, Any] = {"cuda_graph": "on", "decode": "cpu", "cache_features": 3}
    for _ in range(2):
        with tiny_trainer("baseline", "cuda", torch.float16, data, tmp_path / "run", **given) as made:
            assert made.begin_phase() and made.running
            assert (made.running.graph is None) == (made.state.step > 0)
            while made.state.step < made.inputs.steps_per_epoch:
                made.train_step()
            made.save()


def test_no_gradient_outlives_a_replay(tiny_set: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"cuda_graph": "on", "decode": "cpu"}
    with tiny_trainer("baseline", "cuda", torch.float16, tiny_set, tmp_path, **given) as made:
        begin(made, 1)
        with softgpu.watch() as seen:
            made.train_step()
        assert not seen.waits and all(p.grad is None for p in made.network.parameters())


def test_the_lstm_kernels_are_executed_in_replays(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step each: they are executed from their PTX."""
    monkeypatch.setattr(capture, "COMPARED", 1)
    given: dict[str, Any] = {"cuda_graph": "on", "stages": ("conv5",)}
    with tiny_trainer("lstm", "cuda", torch.bfloat16, tiny_set, tmp_path, **given) as made:
        begin(made, 0)
        with softgpu.watch() as seen:
            made.train_step()
        assert len(seen.launches) == 7 and not seen.problems and not seen.waits
