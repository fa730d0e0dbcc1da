"""Decodes a part of a batch on the CPU, as one of several threads does, to DALI's pixels.

JPEGs are decoded by libjpeg-turbo, which DALI uses too, without what DALI does around every small image. Where the
system has libturbojpeg, compiled code calls it for all images of the part, and meanwhile no thread waits for the
interpreter's lock. Else simplejpeg, which brings its own libjpeg-turbo, is called for each image; it takes the lock
back twice in each.

Shapes: B images of the part.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
import simplejpeg
from numba import types
from numpy.typing import NDArray

from fastnet.data.decoding import Decoder, areas
from fastnet.data.prepared import Split
from fastnet.jit import compile_for, jit

NAME = (
    "libturbojpeg.so.0"  # its versions from 1.5.1 (2016) on give these pixels (libjpeg-turbo's ChangeLog.md)
)
RGB, ACCURATE = 0, 0  # TJPF_RGB; no flags: the accurate DCT, and smooth enlargement of the chroma

# int tjDecompress2(handle, jpeg, size, to, width, pitch, height, format, flags), of turbojpeg.h
decompress: Any = types.ExternalFunction(
    "tjDecompress2",
    types.int32(types.uintp, types.uintp, types.ulong, types.uintp, *(types.int32,) * 5),
)


@jit()
def decode_jpegs(
    handle: int,
    mapped: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    sizes: NDArray[np.int32],
    starts: NDArray[np.int64],
    left: NDArray[np.bool_],
    pixels: NDArray[np.uint8],
) -> None:
    """Decodes images that lie within `bounds` [B, 2] of `mapped` into `pixels`, from `starts` [B] on.

    Passes over those marked in `left` [B], and marks those that the library refuses or warns of. Writes no more than
    their `sizes` [B, 2], heights and widths, allow.
    """
    for n in range(len(bounds)):
        if not left[n]:
            failed = decompress(
                handle,
                mapped.ctypes.data + bounds[n, 0],
                bounds[n, 1] - bounds[n, 0],
                pixels.ctypes.data + starts[n],
                sizes[n, 1],
                0,
                sizes[n, 0],
                RGB,
                ACCURATE,
            )
            left[n] = failed != 0


@cache
def turbojpeg() -> ctypes.CDLL | None:
    """The system's libturbojpeg, with what calls it compiled; None where there is none."""
    try:
        library = ctypes.CDLL(NAME)
    except OSError:
        return None
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    address = ctypes.cast(library.tjDecompress2, ctypes.c_void_p).value
    llvmlite.binding.add_symbol("tjDecompress2", address)
    mapped = np.zeros(1, np.uint8)
    mapped.flags.writeable = False
    bounds, sizes = np.empty((0, 2), np.int64), np.empty((0, 2), np.int32)
    starts, left, pixels = np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.uint8)
    compile_for(
        decode_jpegs,
        0,
        mapped,
        bounds,
        sizes,
        starts,
        left,
        pixels,
        what="data: compiled the decoding of JPEGs",
    )
    return library


def jpeg_decoder() -> str:
    """Which library decodes here."""
    return "simplejpeg" if turbojpeg() is None else "libturbojpeg"


class ImageDecoder:
    """Decodes images of a split by this libturbojpeg, or by simplejpeg where that is None.

    It decodes into memory that it keeps, as fresh memory has to be cleared by the kernel, page by page.
    """

    def __init__(self, library: ctypes.CDLL | None) -> None:
        self.memory = np.empty(0, np.uint8)
        self.dali = Decoder(threads=1)
        self.handle: int | None = None
        if library is not None:
            self.handle = library.tjInitDecompress()
            if self.handle is None:
                raise MemoryError("libturbojpeg cannot start")
            weakref.finalize(self, library.tjDestroy, self.handle).atexit = False

    def __call__(self, split: Split, index: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The pixels of the images `index` [B], one after the other (uint8), and where each begins [B]; valid until the
        next call.

        PNGs are left to DALI, and so are CMYK, which it converts with other roundings, and what libjpeg-turbo refuses
        or warns of. Raises RuntimeError if DALI cannot decode one either.
        """
        components = split.components(index)
        bounds, sizes = split.bounds[index], split.sizes[index]
        ends = np.cumsum(areas(sizes) * 3)
        starts = np.concatenate([[0], ends[:-1]])
        pixels = self._pixels(ends[-1])
        left = (components != 1) & (components != 3)
        if self.handle is not None:
            decode_jpegs(self.handle, split.mapped, bounds, sizes, starts, left, pixels)
        else:
            # Slices of these and numbers of lists cost less than those of arrays.
            encoded, places = split.mapped.data, pixels.data
            parts = list(zip(bounds.tolist(), starts.tolist(), ends.tolist(), strict=True))
            for n in np.flatnonzero(~left).tolist():
                (begin, end), to, to_end = parts[n]
                try:
                    simplejpeg.decode_jpeg(encoded[begin:end], buffer=places[to:to_end])
                except ValueError:
                    left[n] = True
        others = np.flatnonzero(left)
        if len(others):
            for n, decoded in zip(others, self.dali([split.jpeg(i) for i in index[others]]), strict=True):
                pixels[starts[n] : ends[n]] = decoded.reshape(-1)
        pixels.flags.writeable = False
        return pixels, starts

    def _pixels(self, count: int) -> NDArray[np.uint8]:
        if len(self.memory) < count:
            self.memory = np.empty(0, np.uint8)  # not both at once
            self.memory = np.empty(count, np.uint8)
        return self.memory[:count]
