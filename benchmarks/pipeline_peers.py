"""Loaders of other projects, for benchmarks.pipeline: FFCV and SPDL. See peers.sh for what they need.

Each draws its own crops, from the same scales and ratios.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

from fastnet.config import Augment
from fastnet.data.prepared import Split
from fastnet.input.decoded import DecodedImages
from fastnet.input.draws import CROP_RATIO, MEAN, STD, epoch_draws, epoch_order, train_inputs

SCALE, RATIO = (Augment.min_crop, 1.0), CROP_RATIO
AHEAD = 2  # batches under way
Opened = Iterator[Callable[[], Any]]


class _Images:
    """(image, label) of a split, as FFCV's writer reads them."""

    def __init__(self, split: Split, image: Callable[[int], Any]) -> None:
        self.split, self.image = split, image

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.image(i), int(self.split.labels[i])


def write_beton(split: Split, path: Path, kind: str) -> None:
    """FFCV's file of a split. kind: jpg, the same JPEGs (its own field would encode them again), or raw, decoded."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.writer import DatasetWriter

    def as_stored(destination: Any, image: Any, malloc: Callable) -> None:
        jpeg, (height, width) = image
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["height"], destination["width"] = height, width
        destination["data_ptr"], storage = malloc(jpeg.nbytes)
        storage[:] = jpeg

    field = RGBImageField(write_mode=kind)
    if kind == "jpg":
        field.encode = as_stored
        images = _Images(split, lambda i: (split.jpeg(i), split.sizes[i]))
    else:
        images = _Images(split, DecodedImages(split, 1))
    DatasetWriter(str(path), {"image": field, "label": IntField()}, num_workers=1).from_indexed_dataset(
        images
    )


@contextlib.contextmanager
def ffcv(split: Split, path: Path, size: int, batch: int, threads: int, device: torch.device) -> Opened:
    """FFCV over the file `path`, with its own operators, in float32.

    On a GPU torchvision normalises there, in float16, as in FFCV's CIFAR example; FFCV's own operator would need CuPy.
    """
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        Convert,
        NormalizeImage,
        RandomHorizontalFlip,
        ToDevice,
        ToTensor,
        ToTorchImage,
    )

    image = [
        RandomResizedCropRGBImageDecoder((size, size), scale=SCALE, ratio=RATIO),
        RandomHorizontalFlip(),
    ]
    if device.type == "cuda":
        image += [
            ToTensor(),
            ToDevice(device),
            ToTorchImage(),
            Convert(torch.float16),
            v2.Normalize(MEAN, STD),
        ]
    else:
        image += [NormalizeImage(np.array(MEAN), np.array(STD), np.float32), ToTensor(), ToTorchImage()]
    batches = Loader(
        str(path),
        batch_size=batch,
        num_workers=threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        drop_last=True,
        batches_ahead=AHEAD,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )

    def endless() -> Generator[torch.Tensor, None, None]:
        while True:
            epoch = iter(batches)
            try:
                for x, _ in epoch:
                    yield x
            finally:
                epoch.close()  # its thread would stay, with the batches that it holds

    images = endless()
    yield images.__next__
    images.close()


def _filters(start: NDArray, end: NDArray, mirror: int, size: int) -> str:
    """FFmpeg's filters for a crop, to whole pixels, and the rest."""
    (top, left), (bottom, right) = np.floor(start).astype(int), np.ceil(end).astype(int)
    flip = "hflip," if mirror else ""
    crop = f"crop={right - left}:{bottom - top}:{left}:{top}:exact=1"
    return f"{crop},scale={size}:{size}:flags=bilinear,{flip}format=rgb24"


@contextlib.contextmanager
def spdl(split: Split, size: int, batch: int, threads: int, device: torch.device) -> Opened:
    """SPDL decodes, crops (fastnet's boxes, in whole pixels), resizes and flips by FFmpeg in threads.

    It has no normalisation: that is torch's, on a GPU in float16 after the transfer. Batches are put together in
    threads of their own.
    """
    import spdl.io

    cuda = device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    # A row of an image: three numbers at a time would leave most of a vector empty.
    mean, std = (torch.tensor(values, dtype=dtype, device=device).repeat(size) for values in (MEAN, STD))
    augment = Augment()

    def one(given: tuple[NDArray, NDArray, NDArray, int]) -> Any:
        jpeg, start, end, mirror = given
        packets = spdl.io.demux_image(jpeg.tobytes())
        return spdl.io.decode_packets(packets, filter_desc=_filters(start, end, mirror, size))

    def batches() -> Iterator[list[Any]]:
        for epoch in range(2**31):
            order, draws = epoch_order(len(split), 0, epoch), epoch_draws(len(split), 0, epoch)
            for first in range(0, len(split) - batch + 1, batch):
                index = order[first : first + batch]
                inputs = train_inputs(augment, draws[index], split.sizes[index], size)
                yield [
                    workers.submit(one, (split.jpeg(i), *given))
                    for i, *given in zip(index, inputs["start"], inputs["end"], inputs["mirror"], strict=True)
                ]

    def assemble(tasks: list[Any]) -> torch.Tensor:
        images = spdl.io.to_torch(spdl.io.convert_frames([task.result() for task in tasks]))  # [B, S, S, 3]
        if cuda:
            images = spdl.io.transfer_tensor_h2d(images)
        rows = images.to(dtype).view(batch, size, 3 * size).sub_(mean).div_(std)
        return rows.view(batch, size, size, 3).permute(0, 3, 1, 2)

    with (
        ThreadPoolExecutor(threads) as workers,
        ThreadPoolExecutor(AHEAD, "assembler", torch.set_num_threads, (1,)) as assemblers,
    ):
        todo = batches()
        under_way = [assemblers.submit(assemble, next(todo)) for _ in range(AHEAD)]

        def take() -> torch.Tensor:
            under_way.append(assemblers.submit(assemble, next(todo)))
            return under_way.pop(0).result()

        yield take
        workers.shutdown(wait=False, cancel_futures=True)
