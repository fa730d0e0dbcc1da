"""Decodes images on the CPU, many at once, by DALI. Loader threads use input/jpegs.py."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorCPU

# DALI's error names no cause; its codec prints one to stderr, in its own words, unless told not to.
os.environ.setdefault("DALI_NVIMGCODEC_LOG_LEVEL", "0")

CHUNK_IMAGES = 256
CHUNK_PIXELS = 1 << 24  # 50 MB decoded


def areas(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Pixels of images [N] of `sizes` [N, 2], heights and widths: int64, as their sums exceed an int32."""
    return sizes.astype(np.int64).prod(axis=1)


def chunks(sizes: NDArray[np.int32]) -> Iterator[range]:
    """Parts of a split that can be decoded at once in little memory. `sizes`: [N, 2] int32, heights and widths."""
    first, pixels = 0, 0
    for i, area in enumerate(areas(sizes).tolist()):
        if i > first and (i - first == CHUNK_IMAGES or pixels + area > CHUNK_PIXELS):
            yield range(first, i)
            first, pixels = i, 0
        pixels += area
    if first < len(sizes):
        yield range(first, len(sizes))


class Decoder:
    """DALI's CPU decoder, for lists of at most `CHUNK_IMAGES` encoded images."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pipe: Pipeline | None = None

    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """uint8 [h, w, 3] of each; valid until the next call. Raises RuntimeError if one of them is bad."""
        if self.pipe is None:
            self.pipe = _graph(batch_size=CHUNK_IMAGES, num_threads=self.threads, device_id=None)
            self.pipe.build()
        try:
            self.pipe.feed_input("images", [TensorCPU(image, "") for image in images])
            (decoded,) = self.pipe.run()
        except RuntimeError:
            self.pipe = None  # DALI cannot go on after a bad image
            raise
        return [np.asarray(decoded[i]) for i in range(len(images))]


@pipeline_def(prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
def _graph() -> DataNode:
    encoded = fn.external_source(name="images", no_copy=True)
    return fn.decoders.image(encoded, adjust_orientation=False)
