"""The DALI graph that turns encoded images into training tensors; one definition for CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType

from fastnet.input.draws import MEAN, STD
from fastnet.input.operators import apply_policy, input_type
from fastnet.input.spec import PREFETCH, InputSpec

# DALI's own buffers for each of nvJPEG's threads, made for photographs: on the device, and twice in pinned memory.
DEVICE_PADDING, HOST_PADDING = 16 << 20, 8 << 20


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
