"""--precision bf16 on the CPU: what computes in which type, and that a run continues exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastnet.distributed.device import choose_precision, nearest_precision
from fastnet.errors import InputError
from fastnet.network.network import Network
from tests.support.runs import assert_same_end, events
from tests.support.tiny import run_here

BF16 = ["--precision", "bf16", "--head-epochs", "1", "--epochs", "1", "--log-every", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", [pytest.param("baseline", marks=[pytest.mark.long, pytest.mark.slow]), "lstm"]
)
def test_a_run_in_bf16(network: str, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are float32, convolutions give bfloat16 in training and in validation, weights and logits are float32."""
    seen: set[tuple[bool, torch.dtype, torch.dtype, torch.dtype]] = set()
    forward, head = Network.forward, Network.head
    images: list[torch.dtype] = []

    def noting_images(self: Network, x: Tensor) -> Tensor:
        images.append(x.dtype)
        return forward(self, x)

    def noting_features(self: Network, features: Sequence[Tensor]) -> Tensor:
        logits = head(self, features)
        seen.add((self.training, images[-1], features[-1].dtype, logits.dtype))
        return logits

    monkeypatch.setattr(Network, "forward", noting_images)
    monkeypatch.setattr(Network, "head", noting_features)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here(tiny_set, whole, "--network", network, *BF16)["done"]
    types = (torch.float32, torch.bfloat16, torch.float32)
    assert seen == {(True, *types), (False, *types)}

    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["sessions"][0]["precision"] == "bfloat16"
    saved = torch.load(whole / "last.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}
    losses = [event["train_loss"] for event in events(whole, "step")]
    assert len(losses) == 10 and min(losses[5:]) < losses[0]

    for stop in (["--max-steps", "3"], ["--max-steps", "8"], []):
        run_here(tiny_set, parts, "--network", network, *BF16, *stop)
    assert_same_end(parts, whole)


def test_the_cpu_takes_bf16_only_if_asked() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) is choose_precision("fp32", cpu) is None
    assert choose_precision("bf16", cpu) is torch.bfloat16
    with pytest.raises(InputError, match="--precision fp16: needs a GPU; use auto, fp32 or bf16 here"):
        choose_precision("fp16", cpu)


def test_bf16_that_a_processor_lacks_is_said(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if not flags & {"x86_64", "lm"}:
        pytest.skip("of other processors it is not known")
    run_here(tiny_set, tmp_path, "--network", "baseline", "--precision", "bf16", "--max-steps", "1")
    lacks = not flags & {"amx_bf16", "avx512_bf16"}
    assert ("bf16: this processor has no instructions for it" in capsys.readouterr().err) == lacks


def test_a_network_is_used_with_the_precision_of_its_training() -> None:
    """Where the device has it; else in that of auto."""
    cpu = torch.device("cpu")
    assert nearest_precision("fp32", cpu) is nearest_precision("fp16", cpu) is None
    lacks = not set(Path("/proc/cpuinfo").read_text().split()) & {
        "amx_bf16",
        "avx512_bf16",
        "aarch64",
        "bf16",
    }
    assert nearest_precision("bf16", cpu) is (None if lacks else torch.bfloat16)
