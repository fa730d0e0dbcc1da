"""Decodes a part of a batch on the CPU, as one of several threads does, to DALI's pixels.

JPEGs are decoded by libjpeg-turbo, which DALI uses too, without what DALI does around every small image. Where the
system has libturbojpeg, compiled code calls it for all images of the part, and meanwhile no thread waits for the
interpreter's lock. Otherwise simplejpeg, which brings its own libjpeg-turbo, is called for each image; threads then
meet at that lock twice an image, where one of them sleeps until the other wakes it.

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

from fastnet.data import headers
from fastnet.data.decoding import Decoder, areas
from fastnet.data.prepared import Split
from fastnet.jit import compile_for, jit

LIBRARY = "libturbojpeg.so.0"
RGB, ACCURATE = 0, 0  # TJPF_RGB; no flags: the accurate DCT, and smooth enlargement of the chroma

# int tjDecompress2(handle, jpeg, size, to, width, pitch, height, format, flags), of turbojpeg.h
decompress: Any = types.ExternalFunction(
    "tjDecompress2",
    types.int32(types.uintp, types.uintp, types.ulong, types.uintp, *(types.int32,) * 5),
)


jpeg_header = jit()(headers.jpeg_header)


@jit()
def decode_jpegs(
    handle: int,
    mapped: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    sizes: NDArray[np.int32],
    components: NDArray[np.uint8],
    starts: NDArray[np.int64],
    left: NDArray[np.bool_],
    pixels: NDArray[np.uint8],
) -> None:
    """Decodes images that lie within `bounds` [B, 2] of `mapped` into `pixels`, from `starts` [B] on.

    It takes those of 1 or 3 colour components (`components` [B]), and clears their marks in `left` [B] unless the
    library refuses them or warns of them. It writes no more than their `sizes` [B, 2], heights and widths, allow.
    Progressive JPEGs stay: where scans are missing, versions of the library smooth in different ways.
    """
    for n in range(len(bounds)):
        begin, end = bounds[n]
        if components[n] not in (1, 3) or jpeg_header(mapped[begin:end])[3]:
            continue
        failed = decompress(
            handle,
            mapped.ctypes.data + begin,
            end - begin,
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
    """The system's libturbojpeg, with `decode_jpegs` compiled for it. None if there is none, or none with simplejpeg's
    pixels.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    address = ctypes.cast(library.tjDecompress2, ctypes.c_void_p).value
    llvmlite.binding.add_symbol("tjDecompress2", address)
    return library if _as_simplejpeg(library) else None


def _as_simplejpeg(library: ctypes.CDLL) -> bool:
    """Whether it has the pixels of a JPEG with 4:4:0 chroma, which changed in 2.0.3 (libjpeg-turbo's ChangeLog.md)."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    encoded = np.frombuffer(simplejpeg.encode_jpeg(noise, colorsubsampling="440"), np.uint8)
    bounds, sizes = np.array([[0, len(encoded)]]), np.array([noise.shape[:2]], np.int32)
    components, starts, left = np.array([3], np.uint8), np.zeros(1, np.int64), np.ones(1, np.bool_)
    pixels = np.empty(noise.size, np.uint8)
    handle = library.tjInitDecompress()
    compile_for(
        decode_jpegs,
        handle,
        encoded,
        bounds,
        sizes,
        components,
        starts,
        left,
        pixels,
        what="data: compiled the decoding of JPEGs",
    )
    library.tjDestroy(handle)
    return not left[0] and np.array_equal(pixels.reshape(noise.shape), simplejpeg.decode_jpeg(encoded))


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

        What libturbojpeg leaves is decoded by simplejpeg. PNGs are left to DALI, and so are CMYK, which it converts
        with other roundings, and what libjpeg-turbo refuses or warns of. Raises RuntimeError if DALI cannot decode one
        either.
        """
        components = split.components(index)
        bounds, sizes = split.bounds[index], split.sizes[index]
        ends = np.cumsum(areas(sizes) * 3)
        starts = np.concatenate([[0], ends[:-1]])
        pixels = self._pixels(ends[-1])
        left = np.ones(len(index), np.bool_)
        if self.handle is not None:
            decode_jpegs(self.handle, split.mapped, bounds, sizes, components, starts, left, pixels)
        each = np.flatnonzero(left & ((components == 1) | (components == 3)))
        # Slices of these and numbers of lists cost less than those of arrays.
        encoded, places = split.mapped.data, pixels.data
        parts = zip(
            each.tolist(), bounds[each].tolist(), starts[each].tolist(), ends[each].tolist(), strict=True
        )
        for n, (begin, end), start, stop in parts:
            try:
                simplejpeg.decode_jpeg(encoded[begin:end], buffer=places[start:stop])
                left[n] = False
            except ValueError:
                pass  # DALI has the last word
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
