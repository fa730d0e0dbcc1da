"""Prepared set -> batches on the training device: by DALI's graph, or on the CPU by one fused pass where that suffices.

Order and augmentation follow from (seed, epoch, image) alone, so a step's global batch is a slice of the
epoch's order whatever the number of ranks, and two integers (epoch, step) say where to continue.

Both write HWC; the NCHW view of that is channels_last, so no layout is converted. DALI has no bfloat16: under bf16
autocast the float16 batch is cast once.

Shapes: B images of a micro-batch, H = W = image_size.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastnet.config import Augment, check_image_size
from fastnet.data.decoding import areas
from fastnet.data.prepared import Split
from fastnet.errors import InputError
from fastnet.input.dali import DaliBatches
from fastnet.input.draws import epoch_draws, epoch_order, eval_inputs, train_inputs
from fastnet.input.host import HostBatches
from fastnet.input.spec import PREFETCH, InputSpec, resolve_decode
from fastnet.provenance import machine_memory


class Batch(NamedTuple):
    """A micro-batch. `x` stays valid for as long as it is referenced, at least until the next one.

    In a phase on kept features (training/features.py) `x` has those in place of the images.
    """

    x: Any  # [B, 3, H, W] channels_last, normalised with ImageNet mean and std, on the device
    y: torch.Tensor  # [B] int64 labels, on the device
    index: NDArray[np.int64]  # type: ignore[assignment]  # [B] positions in the split, on the host


def part(n: int, index: int, parts: int) -> slice:
    """The `index`-th of `parts` contiguous parts of `n` things; their sizes differ by one at most."""
    return slice(n * index // parts, n * (index + 1) // parts)


def step_share(n: int, batch_size: int, step: int, rank: int, world_size: int) -> slice:
    """A rank's share of a step: a slice of the epoch's order of `n` images. `batch_size` is global."""
    if not 0 <= step < n // batch_size:
        raise IndexError(f"step {step} of an epoch of {n // batch_size}")
    share = part(batch_size, rank, world_size)
    return slice(step * batch_size + share.start, step * batch_size + share.stop)


def used(split: Split, only: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """[n] positions of the images of a split that are used; None stands for all."""
    return np.arange(len(split)) if only is None else only


def input_names(augment: Augment | None, split: Split, spec: InputSpec) -> tuple[str, ...]:
    """What each image is given beside its pixels in training, or in validation (None)."""
    if augment is None:
        return tuple(eval_inputs(split.sizes[:1], spec.image_size, spec.eval_crop))
    return tuple(train_inputs(augment, epoch_draws(1, 0, 0), split.sizes[:1], spec.image_size))


def micro_batches(
    images: NDArray[np.int64],
    batch_size: int,
    accumulate: int,
    seed: int,
    rank: int,
    world_size: int,
    epoch: int,
    step: int,
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """A rank's micro-batches of `images` [n] without end, from (epoch, step) on: the epoch and the images of each."""
    n = len(images)
    for now in itertools.count(epoch):
        order = images[epoch_order(n, seed, now)]
        for at in range(step if now == epoch else 0, n // batch_size):
            share = order[step_share(n, batch_size, at, rank, world_size)]
            for micro in range(accumulate):
                yield now, share[part(len(share), micro, accumulate)]


def check_memory(sizes: NDArray[np.int32], batch_size: int) -> None:
    """Raises InputError if batches of the largest images, decoded, would take more than half of this machine's memory
    in all of its ranks.

    sizes: [N, 2] int32, heights and widths.
    """
    pixels = np.sort(areas(sizes))[-batch_size:].sum()
    needed = int(pixels) * 3 * (PREFETCH + 1) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = machine_memory()
    if needed > there / 2:
        raise InputError(
            f"--batch-size: batches of the {batch_size} largest images take {needed / 2**30:.1f} GiB decoded, of "
            f"{there / 2**30:.1f} GiB here; use a smaller batch, in training a larger --accumulate, or prepare smaller "
            "images"
        )


def check_batch_size(split: str, n: int, batch_size: int, accumulate: int, world_size: int) -> None:
    """Raises InputError unless the split has a whole batch, and a batch an image for each of its parts."""
    if batch_size > n:
        raise InputError(f"--batch-size {batch_size}: the {split} split has {n} images; use at most that")
    if batch_size < world_size * accumulate:
        raise InputError(
            f"--batch-size {batch_size}: {world_size} ranks with --accumulate {accumulate} need at least "
            f"{world_size * accumulate}"
        )


def check_ranks(split: str, n: int, world_size: int) -> None:
    """Raises InputError for more ranks than the split has images."""
    if world_size > n:
        raise InputError(f"{world_size} ranks: the {split} split has {n} images; start fewer processes")


class _Stream:
    def __init__(
        self, split: Split, spec: InputSpec, names: tuple[str, ...], policy: str, largest: int
    ) -> None:
        check_image_size(spec.image_size)
        if resolve_decode(spec.decode, spec.device) != "raw":
            check_memory(split.sizes, largest)
        self._split, self._spec = split, spec
        self._source: HostBatches | DaliBatches | None
        if spec.device.type == "cpu" and policy == "none" and "erase_start" not in names:
            self._source = HostBatches(split, spec, largest)
        else:
            self._source = DaliBatches(split, spec, names, policy, largest)

    def _begin(self, todo: Iterator[tuple[NDArray, dict[str, NDArray]]]) -> None:
        if self._source is None:
            raise RuntimeError("the stream is closed")
        self._source.begin(todo)

    def _take(self) -> Batch:
        if self._source is None:
            raise RuntimeError("the stream is closed")
        images, index = self._source.take()
        y = torch.from_numpy(self._split.labels[index])
        if self._spec.device.type == "cuda":
            y = y.pin_memory().to(self._spec.device, non_blocking=True)
        return Batch(images.permute(0, 3, 1, 2), y, index)  # [B, H, W, 3] -> [B, 3, H, W], a view

    def close(self) -> None:
        """Ends the threads that make batches, and frees their buffers."""
        if self._source is not None:
            self._source.close()
        self._source = None


class TrainStream(_Stream):
    """Endless micro-batches of a rank, from (epoch, step) on: `accumulate` of them make its share of a step.

    `batch_size` is that of all ranks together. The last incomplete batch of an epoch is left out. `only`: positions in
    the split of the images to train on, if not all.
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
        images = used(split, only)
        check_batch_size(split.name, len(images), batch_size, accumulate, world_size)
        self.steps_per_epoch, self.accumulate = len(images) // batch_size, accumulate
        names = input_names(augment, split, spec)
        largest = -(-batch_size // (world_size * accumulate))
        super().__init__(split, spec, names, augment.policy, largest)

        def batches() -> Iterator[tuple[NDArray, dict[str, NDArray]]]:
            drawn, draws = -1, np.empty((0, 0), np.float32)
            for now, index in micro_batches(
                images, batch_size, accumulate, seed, rank, world_size, epoch, step
            ):
                if now != drawn:
                    drawn, draws = now, epoch_draws(len(split), seed, now)
                yield index, train_inputs(augment, draws[index], split.sizes[index], spec.image_size)

        self._begin(batches())

    def __len__(self) -> int:
        """Micro-batches in an epoch, although the stream itself is endless."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> Batch:
        return self._take()


class DrawnStream(_Stream):
    """Any images of a split, as training with `seed` draws them in an epoch, or as validation takes them (None)."""

    def __init__(
        self, split: Split, spec: InputSpec, augment: Augment | None, *, seed: int, batch_size: int
    ) -> None:
        self._augment, self._seed, self._batch_size = augment, seed, batch_size
        names = input_names(augment, split, spec)
        super().__init__(split, spec, names, augment.policy if augment else "none", batch_size)

    def of(self, index: NDArray[np.int64], epoch: int) -> Iterator[Batch]:
        """The images `index` in that order, in batches of `batch_size`; the last one may be smaller."""
        self._begin(self._inputs(index, epoch))
        for _ in range(0, len(index), self._batch_size):
            yield self._take()

    def _inputs(self, index: NDArray[np.int64], epoch: int) -> Iterator[tuple[NDArray, dict[str, NDArray]]]:
        split, size = self._split, self._spec.image_size
        draws = epoch_draws(len(split), self._seed, epoch) if self._augment else None
        for first in range(0, len(index), self._batch_size):
            images = index[first : first + self._batch_size]
            if self._augment is None or draws is None:
                yield images, eval_inputs(split.sizes[images], size, self._spec.eval_crop)
            else:
                yield images, train_inputs(self._augment, draws[images], split.sizes[images], size)


class EvalStream(DrawnStream):
    """A rank's share of a split, in order, each image once. Can be iterated again, one iteration at a time.

    `batch_size` is per rank; the last batch may be smaller. `only`: positions in the split, if not all are taken.
    """

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
        super().__init__(split, spec, None, seed=0, batch_size=min(batch_size, len(self._share)))

    def __len__(self) -> int:
        return -(-len(self._share) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.of(self._share, 0)
