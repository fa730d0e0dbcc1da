"""Decoded images -> a batch of training images on the CPU, in one pass: crop, resize, flip, normalise.

The twin of fastnet_kernels/images.py, with its resize: DALI's `fn.resize` with a region of interest, that is pixel
centres at half integers, a triangular filter whose radius is the scale where the image shrinks and one pixel where it
grows, weights that add up to 1, and pixels beyond the image's edge (not the box's) repeating the edge. Nothing is
rounded to grey levels.

Shapes: B images, S image size, H and W of one image, K taps of a filter.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnet.jit import compile_for, jit


@jit()
def filter_taps(
    start: float, end: float, extent: int, weights: NDArray[np.float32], places: NDArray[np.uint32]
) -> int:
    """Fills `weights` and `places` [S, K at most]: of which pixels of an `extent` each of S new ones is the sum.

    They are those of the box from `start` to `end`. Returns K.
    """
    size = len(places)
    scale = (end - start) / size
    radius = max(scale, 1.0)
    count = math.ceil(2 * radius)
    for i in range(size):
        centre = start + (i + 0.5) * scale - 0.5
        near = math.ceil(centre - radius)
        total = 0.0
        for k in range(count):
            total += max(1 - abs(near + k - centre) / radius, 0.0)
        for k in range(count):
            weights[i, k] = max(1 - abs(near + k - centre) / radius, 0.0) / total
            places[i, k] = min(max(near + k, 0), extent - 1)
    return count


@jit(inline="always")
def resize_line(
    line: NDArray[np.uint8],
    weights: NDArray[np.float32],
    places: NDArray[np.uint32],
    taps: int,
    mirror: int,
    factor: NDArray[np.float32],
    shift: NDArray[np.float32],
    to_line: NDArray[np.float32],
) -> None:
    """Fills `to_line` [3 * S] with a row of the image [3 * W], resized across, mirrored and normalised."""
    size = len(places)
    by_red, by_green, by_blue = factor
    less_red, less_green, less_blue = shift
    # Unsigned, as numba would ask of every other index whether it counts from the end.
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    first, step = (3 * (size - 1), -3) if mirror else (0, 3)
    for i in range(size):
        to = np.uint64(first + step * i)
        weight, at = weights[i, 0], three * places[i, 0]
        other, beside = weights[i, 1], three * places[i, 1]
        red = weight * np.float32(line[at]) + other * np.float32(line[beside])
        green = weight * np.float32(line[at + one]) + other * np.float32(line[beside + one])
        blue = weight * np.float32(line[at + two]) + other * np.float32(line[beside + two])
        to_line[to] = red * by_red - less_red
        to_line[to + one] = green * by_green - less_green
        to_line[to + two] = blue * by_blue - less_blue
    for k in range(2, taps):
        for i in range(size):
            to = np.uint64(first + step * i)
            weight, at = weights[i, k], three * places[i, k]
            to_line[to] += weight * np.float32(line[at]) * by_red
            to_line[to + one] += weight * np.float32(line[at + one]) * by_green
            to_line[to + two] += weight * np.float32(line[at + two]) * by_blue


@jit(fastmath={"contract"})
def make_images(
    pixels: NDArray[np.uint8],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int32],
    start: NDArray[np.float32],
    end: NDArray[np.float32],
    mirror: NDArray[np.int32],
    factor: NDArray[np.float32],
    shift: NDArray[np.float32],
    x: NDArray[np.float32],
) -> None:
    """Fills `x` [B, S, S, 3] with B images: their boxes, resized, mirrored, times `factor` [3] and minus `shift` [3].

    Args:
        pixels: images [H, W, 3], each from its place in `starts` [B] on.
        sizes: [B, 2] heights and widths.
        start, end: [B, 2] the first and last corner (row, column) of the boxes.
        mirror: [B], 0 or 1.
    """
    count, size = x.shape[0], x.shape[1]
    tallest, taps_down, taps_across = 1, 2, 2
    for n in range(count):
        tallest = max(tallest, sizes[n, 0])
        taps_down = max(taps_down, math.ceil(2 * (end[n, 0] - start[n, 0]) / size))
        taps_across = max(taps_across, math.ceil(2 * (end[n, 1] - start[n, 1]) / size))
    weights_down = np.empty((size, taps_down), np.float32)
    weights_across = np.empty((size, taps_across), np.float32)
    rows, columns = np.empty((size, taps_down), np.uint32), np.empty((size, taps_across), np.uint32)
    lines = np.empty((tallest, 3 * size), np.float32)  # rows of the image, resized across and normalised
    for n in range(count):
        height, width = sizes[n]
        image = pixels[starts[n] : starts[n] + 3 * height * width].reshape(height, 3 * width)
        down = filter_taps(start[n, 0], end[n, 0], height, weights_down, rows)
        across = filter_taps(start[n, 1], end[n, 1], width, weights_across, columns)
        for row in range(rows[0, 0], rows[size - 1, down - 1] + 1):
            resize_line(image[row], weights_across, columns, across, mirror[n], factor, shift, lines[row])
        for i in range(size):
            out = x[n, i].reshape(3 * size)
            first, second = lines[rows[i, 0]], lines[rows[i, 1]]
            weight, other = weights_down[i, 0], weights_down[i, 1]
            for j in range(3 * size):
                out[j] = weight * first[j] + other * second[j]
            for k in range(2, down):
                line, weight = lines[rows[i, k]], weights_down[i, k]
                for j in range(3 * size):
                    out[j] += weight * line[j]


@cache
def compiled() -> Any:
    """`make_images`, compiled."""
    pixels, ends = np.zeros(3, np.uint8), np.ones((1, 2), np.float32)
    pixels.flags.writeable = False
    three, mirror = np.ones(3, np.float32), np.zeros(1, np.int32)
    starts, sizes = np.zeros(1, np.int64), np.ones((1, 2), np.int32)
    x = np.empty((1, 1, 1, 3), np.float32)
    arguments = (pixels, starts, sizes, ends - 1, ends, mirror, three, three, x)
    compile_for(make_images, *arguments, what="data: compiled the pass over images")
    return make_images
