"""The gradient of a 3x3 convolution's weight on a CPU, by Winograd's algorithm F(4x4, 3x3) (Lavin & Gray 2016).

With stride 1 and padding 1, a tile of 4x4 outputs is a sum over the input channels,

    y = A' [(G w G') * (B' x B)] A,   * elementwise, ' transposed,

where x is the 6x6 inputs that the tile depends on. So the gradient of w is a sum over the tiles of all images,

    dw = G' [(A dy A') * (B' x B)] G,

whose inner part has 36 products where the sum without it has 144: for each of the 36 places one product of matrices,
of all tiles' gradients and inputs. `python -m benchmarks.convolution` times it beside oneDNN.

Shapes: B images, C and D channels in and out, H and W height and width of input and output, N tiles.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnet.jit import compile_for, jit

G = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
)
# Tiles of so many images are in memory at a time as take this many bytes, or as many as the sums if those take more.
PART = 2**21

# Unsigned, as numba would ask of every other index whether it counts from the end.
U = np.uintp
TWO, THREE, FOUR, FIVE = (U(n) for n in (2, 3, 4, 5))
F2, F4, F5, F8 = (np.float32(n) for n in (2, 4, 5, 8))
OPTIONS = {"fastmath": {"contract", "reassoc", "nsz"}}


def tiles_of(height: int, width: int) -> int:
    """How many tiles a map has."""
    return -(-height // 4) * -(-width // 4)


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """x: [B, C, H, W] and dy: [B, D, H, W], both float32 and channels_last -> [D, C, 3, 3], channels_last."""
    x, dy = (t.detach().permute(0, 2, 3, 1).contiguous() for t in (x, dy))  # [B, H, W, C or D]
    count, (c, d) = tiles_of(x.shape[1], x.shape[2]), (x.shape[3], dy.shape[3])
    sums = x.new_zeros(36, d, c)
    images = images_at_once(count, c, d)
    inputs = x.new_empty(min(images, len(x)) * count, 36, c)
    gradients = x.new_empty(min(images, len(x)) * count, 36, d)
    for some_x, some_dy in zip(x.split(images), dy.split(images), strict=True):
        n = len(some_x) * count
        transform(transforms(c)[0], some_x, inputs[:n], count)
        transform(transforms(d)[1], some_dy, gradients[:n], count)
        sums.baddbmm_(gradients[:n].permute(1, 2, 0), inputs[:n].transpose(0, 1))  # [36, D, C]
    both = torch.einsum("ir,js->rsij", G, G).reshape(9, 36).float()
    dw = (both @ sums.flatten(1)).view(3, 3, d, c)
    return dw.permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)


def images_at_once(count: int, c: int, d: int) -> int:
    """Of how many images, of `count` tiles each, the tiles are in memory at a time. At least one a thread."""
    space = max(PART, 4 * 36 * c * d)  # bytes, at least those of the sums
    return max(torch.get_num_threads(), space // (4 * 36 * count * (c + d)))


def transform(function: Any, images: Tensor, tiles: Tensor, count: int) -> None:
    """Fills tiles [B * count, 36, C] of images [B, H, W, C], in as many threads as torch computes with."""
    threads = min(torch.get_num_threads(), len(images))
    ends = [len(images) * thread // threads for thread in range(threads + 1)]
    parts = [
        (images[first:last].numpy(), tiles[first * count : last * count].numpy())
        for first, last in pairwise(ends)
    ]
    others = [pool().submit(function, *part) for part in parts[1:]]
    function(*parts[0])
    for other in others:
        other.result()


@cache
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "winograd")


@cache
def transforms(channels: int) -> tuple[Any, Any]:
    """What fills tiles [B * count, 36, C] of images [B, H, W, C] with B' x B, and what fills them with A dy A'."""
    functions = make_transform(channels, 6), make_transform(channels, 4)
    images, tiles = np.zeros((1, 4, 4, channels), np.float32), np.zeros((1, 36, channels), np.float32)
    for function in functions:
        compile_for(function, images, tiles, what=f"network: compiled a transform of {channels} channels")
    return functions


def make_transform(channels: int, size: int) -> Any:
    """A function that fills tiles [B * count, 36, C] of images [B, H, W, C], float32.

    Patches of `size` are 6x6 inputs (B' x B) or 4x4 gradients (A dy A'), four apart and centred on the tiles. It is
    made for a number of channels: with constant strides the compiler uses vectors.
    """
    step, row, margin, six = U(channels), U(size * channels), (size - 4) // 2, size == 6
    to_row, to_tile = U(6 * channels), U(36 * channels)

    def fill(images: NDArray[np.float32], tiles: NDArray[np.float32]) -> None:
        if images.shape[3] != channels:
            raise ValueError("a transform for another number of channels")
        count, height, width = images.shape[:3]
        pixels, to = images.reshape(images.size), tiles.reshape(tiles.size)
        patch = np.empty(size * size * channels, np.float32)
        half = np.empty(6 * size * channels, np.float32)
        tile = U(0)
        for b in range(count):
            for top in range(-margin, height - margin, 4):
                for left in range(-margin, width - margin, 4):
                    first, last = max(left, 0), min(left + size, width)
                    begin, end = U((first - left) * channels), U((last - left) * channels)
                    for i in range(size):
                        at, inside = U(i) * row, 0 <= top + i < height
                        start = U(((b * height + top + i) * width + first) * channels) if inside else U(0)
                        for c in range(begin):
                            patch[at + c] = 0
                        for c in range(end - begin):
                            patch[at + begin + c] = pixels[start + c] if inside else np.float32(0)
                        for c in range(end, row):
                            patch[at + c] = 0
                    if six:
                        times_b(patch, U(0), row, half, U(0), row, row)
                        for i in range(U(6)):
                            times_b(half, i * row, step, to, tile + i * to_row, step, step)
                    else:
                        times_a(patch, U(0), row, half, U(0), row, row)
                        for i in range(U(6)):
                            times_a(half, i * row, step, to, tile + i * to_row, step, step)
                    tile += to_tile

    # numba's cache has one index for each name, which ranks that start together would write at the same time.
    fill.__qualname__ = f"fill_{size}_{channels}"
    return jit(**OPTIONS)(fill)


@jit(inline="always", **OPTIONS)
def times_b(
    source: NDArray[np.float32],
    at: int,
    apart: int,
    to: NDArray[np.float32],
    place: int,
    to_apart: int,
    count: int,
) -> None:
    """B' times the six lines of `count` values that begin in `source` at `at` and are `apart`."""
    for c in range(count):
        i, o = at + c, place + c
        x0, x1, x2 = source[i], source[i + apart], source[i + TWO * apart]
        x3, x4, x5 = source[i + THREE * apart], source[i + FOUR * apart], source[i + FIVE * apart]
        even, odd, difference, other = x4 - F4 * x2, x3 - F4 * x1, x4 - x2, F2 * (x3 - x1)
        to[o] = F4 * x0 - F5 * x2 + x4
        to[o + to_apart] = even + odd
        to[o + TWO * to_apart] = even - odd
        to[o + THREE * to_apart] = difference + other
        to[o + FOUR * to_apart] = difference - other
        to[o + FIVE * to_apart] = F4 * x1 - F5 * x3 + x5


@jit(inline="always", **OPTIONS)
def times_a(
    source: NDArray[np.float32],
    at: int,
    apart: int,
    to: NDArray[np.float32],
    place: int,
    to_apart: int,
    count: int,
) -> None:
    """A times the four lines of `count` values that begin in `source` at `at` and are `apart`."""
    for c in range(count):
        i, o = at + c, place + c
        y0, y1, y2, y3 = source[i], source[i + apart], source[i + TWO * apart], source[i + THREE * apart]
        even, odd, fours, eights = y0 + y2, y1 + y3, y0 + F4 * y2, F2 * y1 + F8 * y3
        to[o] = y0
        to[o + to_apart] = even + odd
        to[o + TWO * to_apart] = even - odd
        to[o + THREE * to_apart] = fours + eights
        to[o + FOUR * to_apart] = fours - eights
        to[o + FIVE * to_apart] = y3
