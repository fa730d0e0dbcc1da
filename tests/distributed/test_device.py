"""What --device picks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastnet.distributed import device
from fastnet.distributed.device import choose_device
from fastnet.errors import InputError

# Hidden GPUs would come back with the variable that hides them.
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available() or any(Path("/dev").glob("nvidia[0-9]*")),
    reason="needs a machine on which CUDA does not work",
)


@without_gpu
def test_a_gpu_that_cuda_cannot_use_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a driver that is too old: the device file is there, torch.cuda.is_available() is false."""
    monkeypatch.setattr(device, "NVIDIA_DEVICES", (tmp_path, "nvidia[0-9]*"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_device() == torch.device("cpu")
    (tmp_path / "nvidiactl").touch()
    assert choose_device() == torch.device("cpu")
    (tmp_path / "nvidia0").touch()
    with pytest.raises(InputError, match=r"CUDA does not work \(.*--device cpu"):
        choose_device()
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device() == torch.device("cpu")


@without_gpu
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="--device cuda: CUDA does not work"):
        choose_device("cuda")
