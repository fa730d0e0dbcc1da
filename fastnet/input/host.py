"""Batches of plainly augmented images on the CPU: decoded by threads, and the rest by the fused pass (fused.py).

The DALI graph does the same work in several passes over every batch, and looks at each image in Python.

Shapes: B images of a batch, S image size.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from threading import local
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastnet.data import headers
from fastnet.data.prepared import Split
from fastnet.input.decoded import DecodedImages
from fastnet.input.draws import MEAN, STD
from fastnet.input.fused import compiled
from fastnet.input.jpegs import ImageDecoder, turbojpeg
from fastnet.input.spec import PREFETCH, InputSpec, decoder_threads

# Images at most of a thread's piece of work. Between pieces threads take turns with the interpreter, so pieces are
# large; a thread that is done goes on with the next batch, so they need not be small.
TASK = 128
FACTOR = (1 / np.array(STD)).astype(np.float32)
SHIFT = (np.array(MEAN) / np.array(STD)).astype(np.float32)


class _UnderWay(NamedTuple):
    x: NDArray[np.float32]  # [B, S, S, 3]
    images: NDArray[np.int64]  # [B] their positions in the split
    tasks: list[Future]


class _PerThread(local):
    """What each thread has of its own, made where it is first asked for."""

    def __init__(self, compiled: bool) -> None:
        self.decode = ImageDecoder(compiled)


class HostBatches:
    """Batches of up to `largest` images of a split, in float32."""

    def __init__(self, split: Split, spec: InputSpec, largest: int) -> None:
        self.split, self.spec, self.largest = split, spec, largest
        self.decoded = DecodedImages(split, spec.threads) if spec.decode == "raw" else None
        self.make_images = compiled()
        if self.decoded is None:
            headers.compiled()  # once, and not by each thread
        self.todo: Iterator[tuple[NDArray, dict[str, NDArray]]] = iter(())
        self.under_way: deque[_UnderWay] = deque()
        # Fresh memory would cost more than what is written to it: the kernel clears it page by page.
        self.buffers: list[NDArray[np.float32]] = []
        self.workers = ThreadPoolExecutor(spec.threads, "images")
        self.this_thread = _PerThread(self.decoded is None and turbojpeg())

    def begin(self, todo: Iterator[tuple[NDArray, dict[str, NDArray]]]) -> None:
        """Makes the batches of `todo` (images and their inputs), instead of those that are still under way."""
        tasks = [task for batch in self.under_way for task in batch.tasks]
        wait([task for task in tasks if not task.cancel()])  # they still write into memory that is used again
        self.under_way.clear()
        self.todo = todo
        for _ in range(PREFETCH):
            self._start()

    def take(self) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The next batch: x [B, S, S, 3], and its images."""
        x, images, tasks = self.under_way.popleft()
        try:
            for task in tasks:
                task.result()
        except RuntimeError:
            self.split.refuse_undecodable(images)
            raise
        self._start()
        return torch.from_numpy(x), images

    def _start(self) -> None:
        """Hands the next batch of `todo`, if there is one, to the threads."""
        upcoming = next(self.todo, None)
        if upcoming is None:
            return
        images, inputs = upcoming
        count = len(images)
        x = self._buffer(count)
        parts = max(decoder_threads(self.spec.threads, count), -(-count // TASK))
        bounds = [count * n // parts for n in range(parts + 1)]
        tasks = [
            self.workers.submit(self._make, images[a:b], {k: v[a:b] for k, v in inputs.items()}, x[a:b])
            for a, b in pairwise(bounds)
        ]
        self.under_way.append(_UnderWay(x, images, tasks))

    def _make(self, index: NDArray[np.int64], inputs: dict[str, NDArray], x: NDArray[np.float32]) -> None:
        """Fills `x` [B, S, S, 3]. Runs in a thread, and holds the interpreter for a small part of it."""
        sizes = self.split.sizes[index]
        if self.decoded is not None:
            pixels, starts = self.decoded.mapped, self.decoded.starts[index]
        else:
            pixels, starts = self.this_thread.decode(self.split, index)
        mirror = inputs.get("mirror", np.zeros(len(index), np.int32))
        self.make_images(pixels, starts, sizes, inputs["start"], inputs["end"], mirror, FACTOR, SHIFT, x)

    def _buffer(self, count: int) -> NDArray[np.float32]:
        """[count, S, S, 3] of memory that comes back when nobody refers to it any more, tensors included."""
        size = self.spec.image_size
        try:
            whole = self.buffers.pop()
        except IndexError:
            whole = np.empty((self.largest, size, size, 3), np.float32)
        part = whole[:count]
        weakref.finalize(part, self.buffers.append, whole).atexit = False
        return part

    def close(self) -> None:
        """Ends the threads."""
        self.workers.shutdown(cancel_futures=True)
