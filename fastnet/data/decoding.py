"""Decodes images on the CPU: many at once by DALI, or one after another by libjpeg-turbo, to the same pixels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import simplejpeg
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


class ImageDecoder:
    """Decodes a few images one after another, as one of several threads does, to DALI's pixels.

    It decodes into memory that it keeps, as fresh memory has to be cleared by the kernel, page by page.
    """

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self.dali = Decoder(threads=1)

    def __call__(
        self, images: Sequence[NDArray[np.uint8]], sizes: NDArray[np.int32], components: Sequence[int]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The pixels of images of `sizes` [B, 2], one after the other (uint8), and where each begins [B]; valid until
        the next call.

        JPEGs of 1 or 3 colour components (`Split.jpegs`) are decoded by libjpeg-turbo, which DALI uses too,
        without what DALI does around every small image. Others (PNGs; CMYK, which DALI converts with other roundings)
        and what libjpeg-turbo refuses or warns of are left to DALI. Raises RuntimeError if that cannot decode one
        either.
        """
        ends = np.cumsum(areas(sizes) * 3)
        starts = np.concatenate([[0], ends[:-1]])
        pixels = self._pixels(ends[-1])
        places = pixels.data  # a slice of it costs less than one of the array, and so does a list's number
        bounds = list(zip(starts.tolist(), ends.tolist(), strict=True))
        others = []
        for n, image in enumerate(images):
            if components[n] not in (1, 3):
                others.append(n)
                continue
            start, end = bounds[n]
            try:
                simplejpeg.decode_jpeg(image, buffer=places[start:end])
            except ValueError:
                others.append(n)
        if others:
            for n, decoded in zip(others, self.dali([images[n] for n in others]), strict=True):
                pixels[starts[n] : ends[n]] = decoded.reshape(-1)
        pixels.flags.writeable = False
        return pixels, starts

    def _pixels(self, count: int) -> NDArray[np.uint8]:
        if len(self.memory) < count:
            self.memory = np.empty(0, np.uint8)  # not both at once
            self.memory = np.empty(count, np.uint8)
        return self.memory[:count]
