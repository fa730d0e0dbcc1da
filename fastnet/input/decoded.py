"""A split decoded once, for `--decode raw` and `device`: all images as uint8 in `<split>.raw` beside the prepared set.

The file is memory mapped. It begins with one line that holds the sha256 of the split it was decoded from, padded to
`HEADER` bytes; the images [h, w, 3] follow one after the other. Their sizes are those of the split.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastnet.data.decoding import Decoder, areas, chunks
from fastnet.data.lock import exclusive
from fastnet.data.prepared import Split, read_meta
from fastnet.errors import InputError
from fastnet.files import atomic_write, remove_leftovers
from fastnet.progress import track

HEADER = 128


class DecodedImages:
    """The decoded images of a split. Makes the file if there is none; if many processes ask at once, one makes it.

    Raises InputError if the file cannot be written or was decoded from another version of the split, and if the set was
    replaced since it was opened.
    """

    def __init__(self, split: Split, threads: int) -> None:
        path = split.path.with_suffix(".raw")
        self.sizes = split.sizes
        self.starts = HEADER + np.concatenate([[0], np.cumsum(_image_bytes(split))])  # [N + 1]
        now = read_meta(split.path.parent).splits.get(split.name)
        if now is None or now.sha256 != split.digest:
            raise InputError(
                f"{split.path.parent}: was replaced by another set since it was opened; start again"
            )
        header = f"fastnet raw 1 {split.digest}\n".encode().ljust(HEADER)
        if not path.exists():
            try:
                with exclusive(path):
                    if not path.exists():
                        _make(path, header, split, int(self.starts[-1]), threads)
            except OSError as error:
                raise InputError(
                    f"{error.filename or path}: cannot be written ({error.strerror}); make the set writable, or use "
                    "--decode cpu"
                ) from error
        if not path.is_file():
            raise InputError(f"{path}: is not a file; remove it")
        with path.open("rb") as file:
            same = file.read(HEADER) == header and file.seek(0, os.SEEK_END) == self.starts[-1]
        if not same:
            raise InputError(f"{path}: was decoded from another version of {path.stem}.arrow; remove it")
        # Slices of a plain array are quicker to make than np.memmap's.
        self.mapped = np.asarray(np.memmap(path, np.uint8, "r"))

    def __call__(self, i: int) -> np.ndarray:
        """Image `i`: uint8 [h, w, 3], a view of the mapped file."""
        height, width = self.sizes[i]
        return self.mapped[self.starts[i] : self.starts[i + 1]].reshape(height, width, 3)


def decoded_bytes(split: Split) -> int:
    """What the split's images take decoded."""
    return int(_image_bytes(split).sum())


def why_not_decoded(splits: Sequence[Split]) -> str | None:
    """Why some of a set's splits have no file of decoded images and cannot get one; None where all have or can."""
    missing = {path: split for split in splits if not (path := split.path.with_suffix(".raw")).exists()}
    for path in missing:
        if not os.access(path.parent, os.W_OK):
            return f"{path} is missing and cannot be written"
    needed = sum(map(decoded_bytes, missing.values()))
    if missing:
        free = shutil.disk_usage(splits[0].path.parent).free
        if needed > free:
            files = " and ".join(map(str, missing))
            return f"{files} would take {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
    return None


def _image_bytes(split: Split) -> NDArray[np.int64]:
    return areas(split.sizes) * 3


def _make(path: Path, header: bytes, split: Split, size: int, threads: int) -> None:
    remove_leftovers(path.parent, path.name)
    print(f"data: decoding {split.name} once: {path} ({size / 1e6:.0f} MB)", file=sys.stderr, flush=True)
    full = f"it takes {size / 1e6:.0f} MB; free some space, or use --decode cpu"
    with atomic_write(path, full=full) as beside, beside.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        file.write(header)
        for image in track(f"decoding {split.name}", _decoded(split, threads), len(split), "images"):
            file.write(image.data)
        # Else a crash of the machine could leave a file of the right size with zeros for images.
        file.flush()
        os.fsync(file.fileno())


def _decoded(split: Split, threads: int) -> Iterator[np.ndarray]:
    decoder = Decoder(threads)
    for chunk in chunks(split.sizes):
        images = [split.jpeg(i) for i in chunk]
        try:
            decoded = decoder(images)
        except RuntimeError:
            split.refuse_undecodable(chunk)
            raise
        yield from decoded
