"""Image files that are in no prepared set, as a split without labels."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastnet.data.entries import readable
from fastnet.data.image import BadImage, Examiner, check_bytes, read_header
from fastnet.data.prepared import Split
from fastnet.data.sources import folder_files
from fastnet.errors import InputError

NAMED = 10  # bad files that an error line names
CHUNK = 32  # images examined at a time
# PIL reads more; some of those readers start other programs (EPS), which no stranger's file should.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` name: a folder stands for the images below it in natural order, `-` for the list of
    files on standard input, one per line.

    In a folder, files whose suffix no image format has are passed over, and so is what is hidden. Raises InputError for
    a path that is not there, or a folder without images.
    """
    files: list[Path] = []
    for path in paths:
        if str(path) == "-":
            lines = [line for line in sys.stdin.buffer.read().splitlines() if line]  # names need not be text
            if not lines:
                raise InputError("--images -: standard input names no file; give a path on each line")
            files += [Path(os.fsdecode(line)) for line in lines]
        elif path.is_dir():
            below = _images_below(path)
            if not below:
                raise InputError(f"--images {path}: no image file in it; name another folder, or files")
            files += below
        else:
            files.append(path)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(f"--images {missing[0]}: no such file or folder; name one that is there")
    return files


def _images_below(folder: Path) -> list[Path]:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    return [folder / name for name in folder_files(folder) if Path(name).suffix.lower() in suffixes]


def images_as_split(files: Sequence[Path], folder: Path | None = None) -> Split:
    """The images as a split without labels, encoded and held in memory. Names are relative to `folder`, if given.

    JPEG and PNG files are taken as they are; files of the other `FORMATS` are turned into an RGB PNG, of 16 bits a
    pixel the upper 8. Raises InputError naming the images that cannot be decoded, such as those of 32 bits a pixel.
    """
    images: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    problems: list[str] = []
    examine = Examiner(max_bytes=None)  # a photo as PNG may have more than the limit of its file
    for start in range(0, len(files), CHUNK):
        chunk: list[tuple[Path, bytes]] = []
        for file in files[start : start + CHUNK]:
            try:
                chunk.append((file, _encoded(file)))
            except BadImage as error:
                problems.append(f"{file} {error}")
        for (file, image), found in zip(chunk, examine([image for _, image in chunk]), strict=True):
            if isinstance(found, BadImage):
                problems.append(f"{file} {found}")
            else:
                images.append(image)
                sizes.append(found)
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise InputError(f"--images: {'; '.join(problems[:NAMED])}{more}")
    names = [readable(str(file.relative_to(folder) if folder else file)) for file in files]
    return Split.in_memory("images", images, np.array(sizes, np.int32), names, folder or Path())


def _encoded(file: Path) -> bytes:
    """The file's bytes, or those of a PNG with its pixels if it is of another of the `FORMATS`. Raises BadImage if a
    PNG cannot have them, or the file is too large."""
    data = file.read_bytes()
    check_bytes(data)
    try:
        read_header(data)
        return data
    except BadImage:
        pass
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.format in ("JPEG", "PNG"):
                return data
            # PIL would cut off at 255. A PGM of 16 bits it opens as one of 32.
            if picture.mode.startswith("I;16") or (picture.format, picture.mode) == ("PPM", "I"):
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            elif picture.mode in ("I", "F"):
                raise BadImage("has grey values of 32 bits, whose range nobody knows; convert it to 8 bits")
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "PNG", compress_level=1)
            return buffer.getvalue()
    except BadImage:
        raise
    except Exception:  # PIL's decoders raise all kinds of errors; the examiner then says what is wrong
        return data
