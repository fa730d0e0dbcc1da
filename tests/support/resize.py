"""Images, boxes to cut out of them, and DALI's float resize, the reference of both passes that make batches.

Shapes: B images of a batch, S image size, H and W of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType

from fastnet.input.draws import MEAN, STD

LEVELS = 256


class Sample(NamedTuple):
    """An image [H, W, 3] and what is done to it; the box is (top, left, bottom, right)."""

    image: NDArray[np.uint8]
    box: NDArray[np.float32]
    mirror: bool


def sample(height: int, width: int, box: tuple[float, ...] | None = None, mirror: bool = False) -> Sample:
    """Noise, in which every wrong pixel shows; the whole image without a box."""
    noise = np.random.default_rng(1000 * height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(noise, np.array(box or (0, 0, height, width), np.float32), mirror)


def grey(height: int, width: int) -> Sample:
    plain = sample(height, width, mirror=True)
    return plain._replace(image=np.repeat(plain.image[:, :, :1], 3, axis=2))


SAMPLES = [
    sample(64, 64),  # every pixel of the result from 4 x 4
    sample(40, 95, (3.3, 20.7, 37.1, 80.2), mirror=True),  # smaller in both directions
    sample(64, 48, (30.25, 0, 48.5, 20.125)),  # larger, at the left edge
    sample(33, 64, (14.5, 44.4, 33, 64), mirror=True),  # larger, in a corner
    sample(20, 70, (0, 1.5, 20, 69.5)),  # larger down, smaller across
    sample(150, 32, (10, 0, 149, 31)),  # much smaller down
    grey(50, 41),
    sample(1, 1, mirror=True),
    sample(1, 9),
    sample(37, 2, (36.2, 0.1, 36.9, 1.7)),  # less than a pixel
]


@pipeline_def(num_threads=1, prefetch_queue_depth=1)
def dali_graph(source: Callable[[], Any], size: int) -> Any:
    given: Any = fn.external_source(source, num_outputs=4, batch=True)
    image, start, end, mirror = given
    resized: Any = fn.resize(image, size=[size, size], roi_start=start, roi_end=end, dtype=DALIDataType.FLOAT)
    return fn.crop_mirror_normalize(
        resized,
        mean=list(MEAN),
        std=list(STD),
        mirror=mirror,
        output_layout="HWC",
    )


def by_dali(samples: list[Sample], size: int) -> torch.Tensor:
    """[B, 3, S, S] float32."""
    given = (
        [s.image for s in samples],
        [s.box[:2] for s in samples],
        [s.box[2:] for s in samples],
        [np.array(s.mirror, np.int32) for s in samples],
    )
    (batch,) = dali_graph(lambda: given, size, batch_size=len(samples), device_id=None).run()
    return torch.from_numpy(np.array(batch.as_tensor())).permute(0, 3, 1, 2)


def resize_bound(extent: int) -> float:
    """By how much two implementations of the resize may differ in a normalised image of up to `extent` pixels a side.

    A pixel's place in the image follows from its box by four operations in float32 on numbers up to the extent E, so
    two differ by up to 2 * 4 * E * eps / 2 pixels in each of two directions; a pixel's shift is worth 256 levels at
    most. What is added then (4 * E products at most) is rounded less.
    """
    return 2 * (2 * 4 * extent + 4 * extent) * torch.finfo(torch.float32).eps / 2 * LEVELS / min(STD)


def assert_resized(x: torch.Tensor, samples: list[Sample], size: int) -> None:
    """`x` is what DALI makes of the samples, but for the roundings of float32 and of `x`'s own type."""
    assert x.is_contiguous(memory_format=torch.channels_last)
    expected = by_dali(samples, size)
    for n, one in enumerate(samples):
        bound = resize_bound(max(one.image.shape)) + expected[n].abs() * torch.finfo(x.dtype).eps / 2
        assert ((x[n].float() - expected[n]).abs() <= bound).all(), f"sample {n}"
