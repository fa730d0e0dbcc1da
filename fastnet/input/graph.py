"""The DALI graph that turns encoded images into training tensors; one definition for CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from fastnet.config import Config
from fastnet.errors import InputError
from fastnet.input.draws import MEAN, STD
from fastnet.input.operators import apply_policy, input_type

PREFETCH = 2
# To wake a thread costs about what a tenth of a small image does, so further threads would only add work.
IMAGES_PER_THREAD = 4
# DALI's own buffers for each of nvJPEG's threads, made for photographs: on the device, and twice in pinned memory.
DEVICE_PADDING, HOST_PADDING = 16 << 20, 8 << 20


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
        raise InputError(f"--decode {choice}: not a place to decode; use auto, gpu, cpu or raw")
    if choice in ("device", "gpu") and device.type != "cuda":
        raise InputError(f"--decode {choice}: there is no GPU here; use cpu, raw or auto")
    if choice == "auto":
        return "gpu" if device.type == "cuda" else "cpu"
    return choice


def decoder_threads(threads: int, batch_size: int) -> int:
    """Of `threads`, those that a batch keeps busy."""
    return min(threads, -(-batch_size // IMAGES_PER_THREAD))


def decoder_padding(pixels: int) -> dict[str, Any]:
    """Bytes of nvJPEG's buffers for images of up to `pixels`: 16-bit coefficients in three colours, and the pixels.

    Where an image needs more, nvJPEG enlarges them once.
    """
    needed = 9 * pixels
    return {
        "device_memory_padding": min(DEVICE_PADDING, needed),
        "host_memory_padding": min(HOST_PADDING, needed),
    }


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=PREFETCH)
def graph(
    source: Callable,
    names: tuple[str, ...],
    spec: InputSpec,
    policy: str,
    pixels: int,
) -> DataNode:
    """The DALI graph. `source()` gives one batch: a list of images, then an array per name in `names`.

    pixels: of the largest image.
    Output: [H, W, 3] per image in `spec.dtype`, on `spec.device`.
    """
    forms = [(DALIDataType.UINT8, 3 if spec.decode == "raw" else 1)] + [input_type(name) for name in names]
    given: Any = fn.external_source(
        source=source,
        num_outputs=len(forms),
        dtype=[form[0] for form in forms],
        ndim=[form[1] for form in forms],
        batch=True,
        no_copy=True,
    )
    images: Any = given[0]
    inputs = {name: given[1 + i] for i, name in enumerate(names)}
    if spec.decode == "gpu":
        # The same chroma upsampling as on the CPU: a network sees the same pixels wherever they are decoded.
        images = fn.decoders.image(
            images,
            device="mixed",
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
            **decoder_padding(pixels),
        )
    elif spec.decode == "cpu":
        images = fn.decoders.image(images, adjust_orientation=False)
    if spec.device.type == "cuda" and spec.decode != "gpu":
        images = images.gpu()
    images = fn.resize(
        images,
        size=[spec.image_size, spec.image_size],
        roi_start=inputs["start"],
        roi_end=inputs["end"],
    )
    images = apply_policy(images, inputs, policy, spec.image_size)
    return fn.crop_mirror_normalize(
        images,
        mirror=inputs.get("mirror", 0),
        mean=list(MEAN),
        std=list(STD),
        dtype=DALIDataType.FLOAT16 if spec.dtype == torch.float16 else DALIDataType.FLOAT,
        output_layout="HWC",
    )
