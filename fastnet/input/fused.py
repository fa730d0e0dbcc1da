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
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
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


@intrinsic
def blend_pixels(
    context: Any, line: Any, at: Any, beside: Any, weight: Any, other: Any, to_line: Any, to: Any
) -> Any:
    """to_line[to:to + 4] = weight * line[at:at + 4] + other * line[beside:beside + 4].

    A pixel has three; the next pixel's overwrite the fourth. LLVM does not vectorise three by itself.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lines = {
            n: context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 5)
        }
        four = ir.VectorType(ir.FloatType(), 4)

        def place(line: int, index: int) -> Any:
            return builder.bitcast(builder.gep(lines[line], [arguments[index]]), four.as_pointer())

        def product(weight: int, index: int) -> Any:
            one = builder.insert_element(
                ir.Constant(four, ir.Undefined), arguments[weight], ir.IntType(32)(0)
            )
            each = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4))
            return builder.fmul(each, builder.load(place(0, index), align=4), flags=["contract"])

        total = builder.fadd(product(3, 1), product(4, 2), flags=["contract"])
        builder.store(total, place(5, 6), align=4)
        return context.get_dummy_value()

    return types.void(
        line, types.uint64, types.uint64, types.float32, types.float32, to_line, types.uint64
    ), generate


@jit(inline="always")
def resize_line(
    line: NDArray[np.float32],
    weights: NDArray[np.float32],
    places: NDArray[np.uint32],
    taps: int,
    to_line: NDArray[np.float32],
) -> None:
    """Fills `to_line` [3 * S + 1 at least] with a row of the image [3 * W + 1 at least], resized across."""
    # Unsigned, as numba would ask of every other index whether it counts from the end.
    one, two, three = np.uint64(1), np.uint64(2), np.uint64(3)
    for i in range(len(places)):
        blend_pixels(  # type: ignore[call-arg]  # numba gives the context
            line,
            three * places[i, 0],
            three * places[i, 1],
            weights[i, 0],
            weights[i, 1],
            to_line,
            three * np.uint64(i),
        )
    for k in range(2, taps):
        for i in range(len(places)):
            to = three * np.uint64(i)
            weight, at = weights[i, k], three * places[i, k]
            to_line[to] += weight * line[at]
            to_line[to + one] += weight * line[at + one]
            to_line[to + two] += weight * line[at + two]


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
    tallest, widest, taps_down, taps_across = 1, 1, 2, 2
    for n in range(count):
        tallest, widest = max(tallest, sizes[n, 0]), max(widest, sizes[n, 1])
        taps_down = max(taps_down, math.ceil(2 * (end[n, 0] - start[n, 0]) / size))
        taps_across = max(taps_across, math.ceil(2 * (end[n, 1] - start[n, 1]) / size))
    weights_down = np.empty((size, taps_down), np.float32)
    weights_across = np.empty((size, taps_across), np.float32)
    rows, columns = np.empty((size, taps_down), np.uint32), np.empty((size, taps_across), np.uint32)
    source = np.zeros(3 * widest + 1, np.float32)  # a row of the image, normalised
    # The same rows, resized across; 16 more numbers take the last pixel's fourth and keep the rows aligned.
    lines = np.empty((tallest, 3 * size + 16), np.float32)
    factors, shifts = np.empty(3 * widest, np.float32), np.empty(3 * widest, np.float32)
    for j in range(3 * widest):
        factors[j], shifts[j] = factor[j % 3], shift[j % 3]
    for n in range(count):
        height, width = sizes[n]
        image = pixels[starts[n] : starts[n] + 3 * height * width].reshape(height, 3 * width)
        down = filter_taps(start[n, 0], end[n, 0], height, weights_down, rows)
        across = filter_taps(start[n, 1], end[n, 1], width, weights_across, columns)
        left, right = 3 * columns[0, 0], 3 * (columns[size - 1, across - 1] + 1)
        if mirror[n]:
            weights_across[:] = weights_across[::-1].copy()
            columns[:] = columns[::-1].copy()
        for row in range(rows[0, 0], rows[size - 1, down - 1] + 1):
            line = image[row]
            for j in range(left, right):
                source[j] = np.float32(line[j]) * factors[j] - shifts[j]
            resize_line(source, weights_across, columns, across, lines[row])
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
