"""--compile on softgpu: what Inductor writes for a GPU is executed, inside a CUDA graph, and compiled for Hopper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs

import softgpu
from fastnet.config import Augment
from fastnet.metrics import Totals
from fastnet.training import capture
from tests.softgpu.trainers import begin, tiny_trainer
from tests.softgpu.weights import distance, snapshot

BF16 = torch.bfloat16


def one_step(
    device: str, amp: torch.dtype | None, data: Path, run: Path, **settings: Any
) -> tuple[float, dict[str, Tensor], softgpu.Watch]:
    """Loss and weights after a step of the whole network on two images, and what it asked of the device."""
    # Erasing has DALI make the images on the CPU as well.
    given: dict[str, Any] = {
        "batch_size": 2,
        "decode": "cpu",
        "augment": Augment(erase=0.25),
        "backend": "torch",
        **settings,
    }
    with tiny_trainer("baseline", device, amp, data, run, **given) as trainer:
        begin(trainer, 1)
        with softgpu.watch() as seen:
            trainer.train_step()
        return Totals(*trainer.counter.sums.tolist()).mean_loss, snapshot(trainer), seen


def test_compiled_and_captured(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far from float32 as half precision takes the CPU's step: twice that for the loss, three times for weights."""
    monkeypatch.setattr(capture, "COMPARED", 1)  # a step takes seconds
    loss, weights, seen = one_step("cuda", BF16, tiny_set, tmp_path, compile=True, cuda_graph="on")
    exact_loss, exact, _ = one_step("cpu", None, tiny_set, tmp_path)
    half_loss, half, _ = one_step("cpu", BF16, tiny_set, tmp_path)
    eps = torch.finfo(BF16).eps
    assert abs(loss - exact_loss) <= 2 * max(abs(half_loss - exact_loss), eps * exact_loss)
    assert distance(weights, exact) <= 3 * distance(half, exact)
    assert seen.counts["graph_launches"] == 1 and not seen.waits
    names = [launch.name for launch in seen.launches]
    assert any("batch_norm" in name and "relu" in name for name in names), names


def test_for_hopper(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that says it is an sm_90 and drops what it is to run. The LSTMs' kernels are in the compiled network."""
    assert torch.cuda.get_device_capability() == (9, 0)
    targets = {}

    def note(*, src: Any, metadata: dict[str, Any], **_: Any) -> None:
        targets[src.fn.__name__] = metadata["target"].arch

    monkeypatch.setattr(knobs.compilation, "listener", note)
    with tiny_trainer("lstm", "cuda", BF16, tiny_set, tmp_path, compile=True, decode="raw") as trainer:
        begin(trainer, 1)
        for _ in range(2):
            with softgpu.watch() as seen:
                trainer.train_step()
    assert not seen.waits
    written = [launch.name for launch in seen.launches if launch.name.startswith("triton_")]
    assert len(written) > 100 and {targets[name] for name in written} == {90}
    assert "forward_kernel" in [launch.name for launch in seen.launches]
