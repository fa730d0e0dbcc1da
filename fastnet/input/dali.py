"""Batches by the DALI graph: on a GPU, and on the CPU wherever an image is more than cropped, resized and flipped.

DALI reads the encoded images in place (views of the mapped file).

Shapes: B images of a batch, S image size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU

from fastnet.data.decoding import areas
from fastnet.data.prepared import Split
from fastnet.input.decoded import DecodedImages
from fastnet.input.graph import graph
from fastnet.input.spec import InputSpec, decoder_threads


class Feed:
    """The graph's source. DALI does not copy what it is handed, so it is kept here until its batch is out."""

    def __init__(self, image: Callable[[int], NDArray], layout: str) -> None:
        self.image, self.layout = image, layout
        self.todo: Iterator[tuple[NDArray, dict[str, NDArray]]] = iter(())
        self.under_way: deque[tuple[NDArray, dict[str, NDArray]]] = deque()

    def __call__(self) -> list:
        index, inputs = next(self.todo)
        self.under_way.append((index, inputs))
        return [[TensorCPU(self.image(i), self.layout) for i in index], *inputs.values()]


class DaliBatches:
    """Batches of up to `largest` images of a split. `names` are those of the inputs, as draws.py makes them."""

    def __init__(
        self, split: Split, spec: InputSpec, names: tuple[str, ...], policy: str, largest: int
    ) -> None:
        self.split, self.device = split, spec.device
        if spec.decode == "raw":
            self.feed = Feed(DecodedImages(split, spec.threads), "HWC")
        else:
            self.feed = Feed(split.jpeg, "")
        self.pipe = graph(
            self.feed,
            names,
            spec,
            policy,
            int(areas(split.sizes).max()),
            batch_size=largest,
            num_threads=decoder_threads(spec.threads, largest),
            device_id=_device_id(spec.device),
        )
        self.started = False

    def begin(self, todo: Iterator[tuple[NDArray, dict[str, NDArray]]]) -> None:
        """Makes the batches of `todo` (images and their inputs), instead of those that are still under way."""
        if self.started:
            self._drain()
        self.started = True
        self.feed.todo = todo
        self.pipe.schedule_run()

    def take(self) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """The next batch: x [B, S, S, 3] on the device, and its images."""
        # Bound to torch's stream, which waits for DALI's work. When `x` is dropped, DALI's DLPack deleter hands its
        # buffer to a thread that synchronises the device before it frees it (include/dali/pipeline/data/dltensor.h).
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            (images,) = self.pipe.outputs(cuda_stream=stream)
        except RuntimeError:
            self.split.refuse_undecodable(self.feed.under_way[0][0])
            raise
        index, _ = self.feed.under_way.popleft()
        self.pipe.schedule_run()
        return torch.from_dlpack(images.as_tensor()), index

    def _drain(self) -> None:
        """Takes out what a broken-off iteration left under way, and readies the pipeline to start."""
        self.feed.todo = iter(())
        self.pipe.schedule_run()  # finds nothing more to do, which `reset` waits for
        while self.feed.under_way:
            self.pipe.outputs()
            self.feed.under_way.popleft()
        self.pipe.reset()

    def close(self) -> None:
        """DALI ends its threads and frees its buffers with its pipeline."""
        del self.pipe


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
