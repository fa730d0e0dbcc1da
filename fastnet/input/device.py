"""Prepared set in GPU memory -> batches, for `--decode device`: one launch makes a batch, and nothing is copied.

The decoded split is uploaded once. What an epoch does to its images is drawn on the host, by the same functions as for
DALI's graph, and uploaded once an epoch as a table with a row for each image in the order of this rank's batches. A
counter on the device says which step it is, so a captured launch makes the next batch at each replay.

Shapes: N images of the split, B of a micro-batch, L of this rank's share of a step, S image size.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnet.config import Augment, check_image_size
from fastnet.data.prepared import Split
from fastnet.errors import InputError
from fastnet.input.decoded import DecodedImages
from fastnet.input.draws import MEAN, STD, epoch_draws, epoch_order, eval_inputs, train_inputs
from fastnet.input.spec import InputSpec
from fastnet.input.streams import (
    Batch,
    EvalStream,
    TrainStream,
    check_batch_size,
    check_ranks,
    part,
    step_share,
    used,
)

UPLOAD = 16 << 20  # bytes copied at a time


class _DeviceStream:
    """A split in the memory of `spec.device`, and a table and a counter that say which batch is made of it."""

    def __init__(self, split: Split, spec: InputSpec, steps: int, rows: int) -> None:
        from fastnet_kernels import images as kernels  # needs Triton, which only GPUs do

        check_image_size(spec.image_size)
        self._split, self._spec, self._kernels = split, spec, kernels
        decoded = DecodedImages(split, spec.threads)
        first = int(decoded.starts[0])
        self._images: kernels.Images | None = kernels.Images(
            upload(decoded.mapped[first:], spec.device),
            upload(decoded.starts[:-1] - first, spec.device),
            upload(split.labels, spec.device),
        )
        self._normalisation = kernels.Normalisation(MEAN, STD)
        self.table = torch.zeros(steps, rows, kernels.ROW, dtype=torch.int32, device=spec.device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=spec.device)

    def _make(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        if self._images is None:
            raise RuntimeError("the stream is closed")
        return self._kernels.make_batch(
            self._images,
            self.table,
            self.counter,
            first=first,
            count=count,
            image_size=self._spec.image_size,
            dtype=self._spec.dtype,
            normalisation=self._normalisation,
        )

    def _rows(self, index: NDArray[np.int64], inputs: dict[str, NDArray]) -> NDArray[np.int32]:
        """The table's rows for the images `index`: see fastnet_kernels.images.ROW."""
        rows = np.empty((len(index), self._kernels.ROW), np.int32)
        rows[:, 0] = index
        rows[:, 1:3], rows[:, 3:5] = inputs["start"].view(np.int32), inputs["end"].view(np.int32)
        rows[:, 5] = inputs.get("mirror", 0)
        rows[:, 6:8] = self._split.sizes[index]
        return rows

    def close(self) -> None:
        """Frees the split's memory on the device."""
        self._images = None


class DeviceTrainStream(_DeviceStream):
    """Endless micro-batches of a rank, the same ones as TrainStream's, from (epoch, step) on.

    A step is `advance()`, `make(micro)` for each of its `accumulate` micro-batches, `count()`; `next` does these in
    turn. `make` and `count` only launch kernels, which may be captured into a CUDA graph.
    """

    def __init__(
        self,
        split: Split,
        spec: InputSpec,
        augment: Augment,
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        step: int = 0,
        only: NDArray[np.int64] | None = None,
    ) -> None:
        self._used = used(split, only)
        n = len(self._used)
        check_batch_size(split.name, n, batch_size, accumulate, world_size)
        lacking = unsupported(augment)
        if lacking:
            raise InputError(f"--decode device: the kernel has no {lacking}; use gpu, cpu, raw or auto")
        self.steps_per_epoch, self.accumulate = n // batch_size, accumulate
        self._augment, self._seed, self._batch_size = augment, seed, batch_size
        self._rank, self._world_size = rank, world_size
        share = step_share(n, batch_size, 0, rank, world_size)
        self._share = share.stop - share.start  # L
        self._parts = [part(self._share, micro, accumulate) for micro in range(accumulate)]
        super().__init__(split, spec, self.steps_per_epoch, self._share)
        if step == self.steps_per_epoch:  # stopped after an epoch's last step
            epoch, step = epoch + 1, 0
        self._epoch, self._step, self._micro = epoch, step - 1, 0
        self._worker = ThreadPoolExecutor(1, "draws")
        self._index = np.empty(0, np.int64)  # the epoch's images in the order of this rank's batches
        self._next = self._worker.submit(self._draw, epoch)
        self._uploaded: int | None = None

    def _draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """An epoch's images, and the table's rows for them. It takes longer than a step, so a thread draws ahead."""
        n = len(self._used)
        order = self._used[epoch_order(n, self._seed, epoch)]
        draws = epoch_draws(len(self._split), self._seed, epoch)
        shares = (
            step_share(n, self._batch_size, step, self._rank, self._world_size)
            for step in range(self.steps_per_epoch)
        )
        index = np.concatenate([order[share] for share in shares])
        sizes, size = self._split.sizes[index], self._spec.image_size
        return index, self._rows(index, train_inputs(self._augment, draws[index], sizes, size))

    def advance(self) -> None:
        """To be called before each step. Copies the table at the first step of an epoch; else it asks nothing of the
        device.
        """
        self._step += 1
        if self._step >= self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
        if self._uploaded != self._epoch:
            self._index, rows = self._next.result()
            upload(rows, self._spec.device, self.table)
            self.counter.fill_(self._step)
            self._uploaded = self._epoch
            self._next = self._worker.submit(self._draw, self._epoch + 1)

    def make(self, micro: int) -> tuple[Tensor, Tensor]:
        """Launches what makes a micro-batch of the step that the counter says.

        Returns x [B, 3, S, S] channels_last in `spec.dtype` and y [B] int64, both new.
        """
        rows = self._parts[micro]
        return self._make(rows.start, rows.stop - rows.start)

    def count(self) -> None:
        """Launches what moves the counter to the next step."""
        self.counter.add_(1)

    def index(self, micro: int) -> NDArray[np.int64]:
        """[B] positions in the split of the images that `make(micro)` gives in this step, on the host."""
        rows = self._parts[micro]
        return self._index[self._step * self._share :][rows]

    def __len__(self) -> int:
        """Micro-batches in an epoch, although the stream itself is endless."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> DeviceTrainStream:
        return self

    def __next__(self) -> Batch:
        if self._micro == 0:
            self.advance()
        batch = Batch(*self.make(self._micro), self.index(self._micro))
        self._micro = (self._micro + 1) % self.accumulate
        if self._micro == 0:
            self.count()
        return batch

    def close(self) -> None:
        """Ends the thread that draws and frees the split's memory on the device."""
        super().close()
        self._worker.shutdown(cancel_futures=True)


class DeviceEvalStream(_DeviceStream):
    """A rank's share of a split, in order, each image once, as EvalStream gives it. `batch_size` is per rank."""

    def __init__(
        self,
        split: Split,
        spec: InputSpec,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        only: NDArray[np.int64] | None = None,
    ) -> None:
        images = used(split, only)
        check_ranks(split.name, len(images), world_size)
        self._share = images[part(len(images), rank, world_size)]
        self._batch_size = min(batch_size, len(self._share))
        super().__init__(split, spec, 1, len(self._share))
        inputs = eval_inputs(split.sizes[self._share], spec.image_size, spec.eval_crop)
        upload(self._rows(self._share, inputs), spec.device, self.table)

    def __len__(self) -> int:
        return -(-len(self._share) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._share), self._batch_size):
            index = self._share[first : first + self._batch_size]
            yield Batch(*self._make(first, len(index)), index)


def unsupported(augment: Augment) -> str | None:
    """The flag, with its value, that asks for what the kernel does not do to images."""
    if augment.policy != "none":
        return f"--augment {augment.policy}"
    return f"--erase {augment.erase}" if augment.erase else None


def why_not_compiled(image_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compiles the kernel ahead of its first launch; in one line why that is not possible."""
    from fastnet_kernels import warmup

    try:
        with warmup.compiling():
            launch_kernel(image_size, dtype, device)
    except warmup.CannotCompile as error:
        return str(error)
    return None


def launch_kernel(image_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Launches what makes batches of this size, on no images: for use inside `fastnet_kernels.warmup.compiling`."""
    from fastnet_kernels import images

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    images.make_batch(
        images.Images(zeros(3, dtype=torch.uint8), zeros(1), zeros(1)),
        zeros(1, 1, images.ROW, dtype=torch.int32),
        zeros(1),
        first=0,
        count=1,
        image_size=image_size,
        dtype=dtype,
        normalisation=images.Normalisation(MEAN, STD),
    )


def train_stream(
    split: Split, spec: InputSpec, augment: Augment, **options: Any
) -> TrainStream | DeviceTrainStream:
    """The training stream of `spec.decode`. Raises InputError where the images do not fit it."""
    kind = DeviceTrainStream if spec.decode == "device" else TrainStream
    return kind(split, spec, augment, **options)


def eval_stream(split: Split, spec: InputSpec, **options: Any) -> EvalStream | DeviceEvalStream:
    """The same for each image once."""
    kind = DeviceEvalStream if spec.decode == "device" else EvalStream
    return kind(split, spec, **options)


def upload(values: NDArray, device: torch.device, to: Tensor | None = None) -> Tensor:
    """`values` on the device, in `to` where it is given, copied through pinned memory without waiting.

    torch's allocator of pinned memory gives a buffer out again only after the copy from it has been made.
    """
    values = np.ascontiguousarray(values)
    if to is None:
        to = torch.empty(values.shape, dtype=torch.from_numpy(np.empty(0, values.dtype)).dtype, device=device)
    source, target = values.reshape(-1).view(np.uint8), to.view(-1).view(torch.uint8)
    for first in range(0, len(source), UPLOAD):
        piece = source[first : first + UPLOAD]
        host = torch.empty(len(piece), dtype=torch.uint8, pin_memory=device.type == "cuda")
        np.copyto(host.numpy(), piece)
        target[first : first + len(piece)].copy_(host, non_blocking=True)
    return to
