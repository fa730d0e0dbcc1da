"""How images become tensors, and where: what all streams share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastnet.config import Config
from fastnet.errors import InputError

PREFETCH = 2  # batches prepared ahead
# To wake a thread costs about what a tenth of a small image does, so further threads would only add work.
IMAGES_PER_THREAD = 4


@dataclass(frozen=True)
class InputSpec:
    """How images become tensors. `decode` is gpu (nvJPEG), cpu, raw (decoded once, to a file), or device
    (that file in GPU memory, without DALI's graph).
    """

    image_size: int
    device: torch.device
    dtype: torch.dtype
    decode: str
    threads: int
    eval_crop: float = 1.0

    @staticmethod
    def of(config: Config, device: torch.device, dtype: torch.dtype, decode: str, threads: int) -> InputSpec:
        """What a network of `config` takes, in training and afterwards."""
        return InputSpec(config.image_size, device, dtype, decode, threads, config.eval_crop)


def resolve_decode(choice: str, device: torch.device) -> str:
    """What `--decode` means on this device: auto is gpu on CUDA, cpu elsewhere. (Training: training/placement.py.)"""
    if choice not in ("auto", "device", "gpu", "cpu", "raw"):
        raise InputError(f"--decode {choice}: not a place to decode; use auto, device, gpu, cpu or raw")
    if choice in ("device", "gpu") and device.type != "cuda":
        raise InputError(f"--decode {choice}: there is no GPU here; use cpu, raw or auto")
    if choice == "auto":
        return "gpu" if device.type == "cuda" else "cpu"
    return choice


def decoder_threads(threads: int, batch_size: int) -> int:
    """Of `threads`, those that a batch keeps busy."""
    return min(threads, -(-batch_size // IMAGES_PER_THREAD))
