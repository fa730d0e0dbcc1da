"""Decodes a part of a batch on the CPU, in one of several threads, to the same pixels as DALI.

JPEGs are decoded by libjpeg-turbo, which DALI uses too, without what DALI does around every small image. Where the
system has libturbojpeg, compiled code calls it for all images of the part, and meanwhile no thread waits for the
interpreter's lock. Otherwise simplejpeg, which brings its own libjpeg-turbo, is called for each image; threads then
meet at that lock twice an image, where one of them sleeps until the other wakes it.

Shapes: B images of the part.
"""

from __future__ import annotations

import ctypes
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

LIBRARY = "libturbojpeg.so.0"
RGB, ACCURATE = 0, 0  # TJPF_RGB; no flags: the accurate DCT, and smooth enlargement of the chroma

# Of turbojpeg.h, with pointers as numbers: tjInitDecompress(), tjDestroy(handle), and
# tjDecompress2(handle, jpeg, size, to, width, pitch, height, format, flags).
open_decoder: Any = types.ExternalFunction("tjInitDecompress", types.uintp())
close_decoder: Any = types.ExternalFunction("tjDestroy", types.int32(types.uintp))
decompress: Any = types.ExternalFunction(
    "tjDecompress2",
    types.int32(types.uintp, types.uintp, types.ulong, types.uintp, *(types.int32,) * 5),
)


@jit()
def decode_jpegs(
    mapped: NDArray[np.uint8],
    bounds: NDArray[np.int64],
    sizes: NDArray[np.int32],
    wanted: NDArray[np.bool_],
    starts: NDArray[np.int64],
    pixels: NDArray[np.uint8],
) -> None:
    """Decodes the `wanted` [B] of the JPEGs within `bounds` [B, 2] of `mapped` into `pixels`, from `starts` [B] on.

    Clears the mark in `wanted` of each that it has decoded. What the library refuses or warns of keeps it, and so do
    progressive JPEGs: where scans are missing, versions of the library smooth in different ways. Writes no more than
    `sizes` [B, 2], heights and widths, allow.
    """
    for n in range(len(bounds)):
        if not wanted[n]:
            continue
        begin, end = bounds[n]
        # By its marker, SOF2, 6, 10 or 14. Within a segment the same bytes may mean something else, which does no harm.
        progressive = False
        for i in range(begin, end - 1):
            progressive |= (mapped[i] == 0xFF) & ((mapped[i + 1] & 0xF3) == 0xC2)
        if progressive:
            continue
        handle = open_decoder()  # one for all would lend an image's tables to a later one that lacks its own
        if handle:
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
            wanted[n] = failed != 0
            close_decoder(handle)


@cache
def turbojpeg() -> bool:
    """Whether the system has a libturbojpeg with simplejpeg's pixels. If so, `decode_jpegs` is compiled for it."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    for name in ("tjInitDecompress", "tjDestroy", "tjDecompress2"):
        llvmlite.binding.add_symbol(name, ctypes.cast(library[name], ctypes.c_void_p).value)
    return _same_pixels()


def _same_pixels() -> bool:
    """Whether `decode_jpegs` and simplejpeg agree on a JPEG with 4:4:0 chroma.

    Its pixels changed in libjpeg-turbo 2.0.3 (ChangeLog.md there).
    """
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    encoded = np.frombuffer(simplejpeg.encode_jpeg(noise, colorsubsampling="440"), np.uint8)
    bounds, sizes = np.array([[0, len(encoded)]]), np.array([noise.shape[:2]], np.int32)
    wanted, starts, pixels = np.ones(1, np.bool_), np.zeros(1, np.int64), np.empty(noise.size, np.uint8)
    arguments = (encoded, bounds, sizes, wanted, starts, pixels)
    compile_for(decode_jpegs, *arguments, what="data: compiled the decoding of JPEGs")
    return not wanted[0] and np.array_equal(pixels.reshape(noise.shape), simplejpeg.decode_jpeg(encoded))


def jpeg_decoder() -> str:
    """Which library decodes here."""
    return "libturbojpeg" if turbojpeg() else "simplejpeg"


class ImageDecoder:
    """Decodes images of a split by libturbojpeg, if `compiled` (`turbojpeg`), or else by simplejpeg.

    It decodes into memory that it keeps, as fresh memory has to be cleared by the kernel, page by page.
    """

    def __init__(self, compiled: bool) -> None:
        self.memory = np.empty(0, np.uint8)
        self.dali = Decoder(threads=1)
        self.compiled = compiled

    def __call__(self, split: Split, index: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The pixels of the images `index` [B], one after the other (uint8), and where each begins [B]; valid until the
        next call.

        simplejpeg also decodes what libturbojpeg leaves. PNGs are left to DALI, and so are CMYK, which it converts with
        other roundings, and what libjpeg-turbo refuses or warns of. Raises RuntimeError if DALI cannot decode one
        either.
        """
        components = split.components(index)
        bounds, sizes = split.bounds[index], split.sizes[index]
        ends = np.cumsum(areas(sizes) * 3)
        starts = np.concatenate([[0], ends[:-1]])
        pixels = self._pixels(ends[-1])
        wanted = (components == 1) | (components == 3)
        left = ~wanted
        if self.compiled:
            decode_jpegs(split.mapped, bounds, sizes, wanted, starts, pixels)
        each = np.flatnonzero(wanted)
        # Slices of these and numbers of lists cost less than those of arrays.
        encoded, places = split.mapped.data, pixels.data
        parts = zip(
            each.tolist(), bounds[each].tolist(), starts[each].tolist(), ends[each].tolist(), strict=True
        )
        for n, (begin, end), start, stop in parts:
            try:
                simplejpeg.decode_jpeg(encoded[begin:end], buffer=places[start:stop])
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
