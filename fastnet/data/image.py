"""One encoded image: its size by its header, and whether it can be decoded in training."""

from __future__ import annotations

import io
import re
import struct
import threading
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastnet.data.decoding import CHUNK_PIXELS, Decoder
from fastnet.data.headers import CUT_OFF, DAMAGED, MAX_SCANS, jpeg_header

MAX_BYTES = 1 << 26
MAX_PIXELS = 1 << 26  # 8192 x 8192, 200 MB decoded

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
# Of a segment or the end; what else is in a scan is no marker.
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"

_one_large_image = threading.Lock()


class BadImage(Exception):
    """An image that cannot be used. The message says why, and reads on from the image's name."""


def read_header(image: bytes) -> tuple[int, int, int]:
    """(height, width, colour components) by the header of a JPEG or PNG, without decoding it. A PNG counts as 0.

    Strict, so that no decoder can read another size from the same bytes. Raises BadImage if it is neither format,
    has no whole header, or is larger than `MAX_PIXELS`.
    """
    try:
        if image.startswith(PNG):
            components = 0
            length, kind, width, height = struct.unpack_from(">I4sII", image, len(PNG))
            if length != 13 or kind != b"IHDR":
                raise BadImage("is a bad image (its PNG header is damaged); get it again or remove it")
        elif image.startswith(JPEG):
            height, width, components = jpeg_header(image)
        else:
            raise BadImage("is neither JPEG nor PNG; remove or convert it")
    except struct.error:
        height = CUT_OFF
    if height == CUT_OFF:
        raise BadImage("is a truncated image (its header is cut off); get it again or remove it")
    if height == DAMAGED:
        raise BadImage("is a bad image (its JPEG header is damaged); get it again or remove it")
    if not height or not width:
        raise BadImage("is a bad image (it has no pixels); get it again or remove it")
    if height * width > MAX_PIXELS:
        raise BadImage(
            f"is {width} x {height} pixels, more than {MAX_PIXELS >> 20} million pixels; make it smaller"
        )
    return height, width, components


def check_header(image: bytes, height: int, width: int) -> int:
    """Raises BadImage unless the image's header gives this size; a decoder that trusted a wrong one could crash.

    Returns the number of its colour components (`read_header`).
    """
    *found, components = read_header(image)
    if found != [height, width]:
        raise BadImage(f"is {found[1]} x {found[0]} pixels, but recorded as {width} x {height}")
    # The bytes may stand for something else, or behind the image's end.
    if image.count(JPEG_SCAN) > MAX_SCANS and _jpeg_scans(image)[0] > MAX_SCANS:
        raise BadImage(f"is a bad image (it has more than {MAX_SCANS} scans); get it again or remove it")
    return components


def _jpeg_scans(image: bytes) -> tuple[int, bool]:
    """How many scans a JPEG has, and whether its end comes behind them. Phones put other data behind the end."""
    scans, at = 0, 2
    while found := MARKER.search(image, at):
        if found[0] == JPEG_END:
            return scans, scans > 0
        scans += found[0] == JPEG_SCAN
        at = found.end()
        if len(image) < at + 2:
            break
        at += struct.unpack_from(">H", image, at)[0]
    return scans, False


class Examiner:
    """Decodes images as training will (DALI) and by a second decoder (PIL), which finds damage that DALI overlooks."""

    def __init__(self, max_bytes: int | None = MAX_BYTES) -> None:
        self.decoder, self.max_bytes = Decoder(threads=1), max_bytes

    def __call__(self, images: Sequence[bytes]) -> list[tuple[int, int] | BadImage]:
        """(height, width) of each image, as encoded, or what is wrong with it."""
        results: list[tuple[int, int] | BadImage] = []
        for image in images:
            try:
                if self.max_bytes is not None:
                    check_bytes(image, self.max_bytes)
                results.append(_examine_by_pil(image))
            except BadImage as error:
                results.append(error)
        part: list[int] = []
        pixels = 0
        for i, result in enumerate(results):
            if isinstance(result, BadImage):
                continue
            if part and pixels + result[0] * result[1] > CHUNK_PIXELS:
                self._examine_by_dali(images, results, part)
                part, pixels = [], 0
            part.append(i)
            pixels += result[0] * result[1]
        self._examine_by_dali(images, results, part)
        return results

    def _examine_by_dali(
        self, images: Sequence[bytes], results: list[tuple[int, int] | BadImage], part: list[int]
    ) -> None:
        """Decodes the images `part`; halves it until the bad ones are found, since DALI does not name them."""
        if not part:
            return
        try:
            with _one_large_image if _large(results[part[0]]) else nullcontext():
                decoded = self.decoder([np.frombuffer(images[i], np.uint8) for i in part])
                shapes = [image.shape[:2] for image in decoded]
        except RuntimeError:
            if len(part) == 1:
                results[part[0]] = BadImage(
                    "is a bad image (DALI cannot decode it); get it again or remove it"
                )
                return
            for half in (part[: len(part) // 2], part[len(part) // 2 :]):
                self._examine_by_dali(images, results, half)
            return
        for i, shape in zip(part, shapes, strict=True):
            if results[i] != shape:
                results[i] = BadImage("is a bad image (its decoders disagree on its size); remove it")


def _large(size: tuple[int, int] | BadImage) -> bool:
    return not isinstance(size, BadImage) and size[0] * size[1] > CHUNK_PIXELS // 4


def check_bytes(image: bytes, most: int = MAX_BYTES) -> None:
    """Raises BadImage for an encoded image of more bytes."""
    if len(image) > most:
        raise BadImage(f"has {len(image):,} bytes, more than {most >> 20} MB; make it smaller")


def _examine_by_pil(image: bytes) -> tuple[int, int]:
    size = read_header(image)[:2]
    try:
        with Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) as picture:
            check_header(image, picture.height, picture.width)
            with _one_large_image if _large(size) else nullcontext():
                picture.load()
            png = picture.format == "PNG"
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("is a bad image (its header is damaged); get it again or remove it") from None
    except Exception as error:  # PIL's decoders raise all kinds of errors on bad data
        raise BadImage(f"is a bad image ({error}); get it again or remove it") from None
    # PIL takes a file whose end is missing or zeroed, which DALI may not.
    whole = image.rfind(b"IEND") > image.rfind(b"IDAT") if png else _jpeg_scans(image)[1]
    if not whole:
        raise BadImage("is a truncated image (its end is missing); get it again or remove it")
    return size
