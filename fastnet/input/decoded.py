"""A split decoded once: the images as uint8 in `<split>.raw` beside the prepared set, memory mapped.

The file is one header line with the sha256 of the split it was decoded from, padded to `HEADER` bytes, then
the images [h, w, 3] one after the other; their sizes are the split's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from nvidia.dali import fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorCPU
from tqdm import tqdm

from fastnet.data.prepared import Split, read_meta
from fastnet.data.preparing import exclusive
from fastnet.errors import InputError
from fastnet.files import atomic_write

HEADER = 128
CHUNK = 256


class DecodedImages:
    """The decoded images of a split. Makes the file if there is none, in one process if many ask at once.

    Raises InputError if the file cannot be written or was decoded from another version of the split.
    """

    def __init__(self, split: Split, threads: int) -> None:
        path = split.path.with_suffix(".raw")
        self.sizes = split.sizes
        areas = split.sizes.astype(np.int64).prod(axis=1) * 3
        self.starts = HEADER + np.concatenate([[0], np.cumsum(areas)])  # [N + 1]
        digest = read_meta(split.path.parent)["splits"][split.name]["sha256"]
        header = f"fastnet raw 1 {digest}\n".encode().ljust(HEADER)
        if not path.exists():
            _make(path, header, split, int(self.starts[-1]), threads)
        with path.open("rb") as file:
            same = file.read(HEADER) == header and file.seek(0, os.SEEK_END) == self.starts[-1]
        if not same:
            raise InputError(f"{path}: decoded from another version of {split.path.name}; remove it")
        # Slices of a plain array are quicker to make than np.memmap's.
        self.mapped = np.asarray(np.memmap(path, np.uint8, "r"))

    def __call__(self, i: int) -> np.ndarray:
        """Image `i`: uint8 [h, w, 3], a view of the mapped file."""
        height, width = self.sizes[i]
        return self.mapped[self.starts[i] : self.starts[i + 1]].reshape(height, width, 3)


def _make(path: Path, header: bytes, split: Split, size: int, threads: int) -> None:
    try:
        with exclusive(path):
            if path.exists():
                return
            for left in path.parent.glob(f".{path.name}.[0-9]*"):
                left.unlink()  # of a process that was killed: nobody else is at work here now
            print(
                f"data: decoding {split.name} once: {path} ({size / 1e6:.0f} MB)", file=sys.stderr, flush=True
            )
            with atomic_write(path) as beside, beside.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                file.write(header)
                for image in tqdm(_decoded(split, threads), total=len(split), unit="img", disable=None):
                    file.write(image.data)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; it takes {size / 1e6:.0f} MB: make room, or the set writable, "
            "or use --decode cpu"
        ) from None


def _decoded(split: Split, threads: int) -> Iterator[np.ndarray]:
    chunks = (range(at, min(at + CHUNK, len(split))) for at in range(0, len(split), CHUNK))
    source = ([TensorCPU(split.jpeg(i), "") for i in chunk] for chunk in chunks)
    pipe = _decoder(source, batch_size=CHUNK, num_threads=threads, device_id=None)
    for _ in range(0, len(split), CHUNK):
        (images,) = pipe.run()
        for i in range(len(images)):
            yield np.asarray(images[i])


@pipeline_def
def _decoder(source: Iterator[list[TensorCPU]]) -> DataNode:
    encoded = fn.external_source(source=source, no_copy=True)
    return fn.decoders.image(encoded, adjust_orientation=False)
