"""A batch of training images from decoded ones in GPU memory: gather, crop, resize, flip, normalise, in one launch.

The resize is DALI's `fn.resize` with a region of interest: pixel centres at half integers, a triangular filter whose
radius is the scale where the image shrinks and one pixel where it grows, weights that add up to 1, and pixels beyond
the image's edge (not the box's) repeating the edge. Nothing is rounded to grey levels.

Shapes: N images of the set, B of the batch, T steps of L rows in the table, S image size, H and W of one image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A row of the table, 32 bits each: position of the image in the set; the box's top, left, bottom and right in pixels
# (float32 bits); 1 to mirror it; the image's height and width.
ROW = 8
WORDS = tl.constexpr(ROW)
ROWS, COLUMNS = 8, 128  # of the output, in one program; a column is a channel of a pixel


class Images(NamedTuple):
    """A decoded set on one device."""

    pixels: Tensor  # uint8, images [H, W, 3] one after the other
    starts: Tensor  # [N] int64, where each begins in `pixels`
    labels: Tensor  # [N] int64


class Normalisation(NamedTuple):
    """Mean and standard deviation of red, green and blue, in grey levels from 0 to 255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def make_batch(
    images: Images,
    table: Tensor,
    counter: Tensor,
    *,
    first: int,
    count: int,
    image_size: int,
    dtype: torch.dtype,
    normalisation: Normalisation,
) -> tuple[Tensor, Tensor]:
    """The images of `count` rows of the table from row `first` of the counter's step on, and their labels.

    Args:
        table: [T, L, 8] int32, T steps of L rows that are laid out as ROW says.
        counter: [1] int64, which step; beyond the last it begins again. As it lies on the device, a captured launch
            makes another batch at each replay.
        image_size: a multiple of 32.
        dtype: float32, float16 or bfloat16.

    Returns:
        x [B, 3, S, S] channels_last in `dtype`, y [B] int64.
    """
    x = torch.empty(
        count, 3, image_size, image_size, dtype=dtype, device=table.device, memory_format=torch.channels_last
    )
    y = torch.empty(count, dtype=torch.int64, device=table.device)
    across = triton.cdiv(3 * image_size, COLUMNS)
    with torch.cuda.device_of(table):
        images_kernel[(count * (image_size // ROWS) * across,)](
            images.pixels,
            images.starts,
            images.labels,
            table,
            counter,
            x.permute(0, 2, 3, 1),  # [B, S, S, 3], as it lies in memory
            y,
            steps=table.shape[0],
            rows_per_step=table.shape[1],
            first=first,
            SIZE=image_size,
            NORMALISATION=normalisation,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=1,
        )
    return x, y


@triton.jit
def channel_constants(values: tl.constexpr, channel):
    """values[channel] for each element of `channel`."""
    return tl.where(channel == 0, values[0], tl.where(channel == 1, values[1], values[2]))


@triton.jit
def tap(at, centre, narrow, channel, width):
    """Weights of the pixels `at` in a triangle of radius 1/narrow around `centre`, and where in a row of the image
    their channels lie.
    """
    inside = tl.minimum(tl.maximum(at.to(tl.int32), 0), width - 1)
    return tl.maximum(1 - tl.abs(at - centre) * narrow, 0), inside * 3 + channel


@triton.jit(do_not_specialize=["steps", "rows_per_step", "first"])
def images_kernel(
    pixels,
    starts,
    labels,
    table,
    counter,
    x,
    y,
    steps,
    rows_per_step,
    first,
    SIZE: tl.constexpr,
    NORMALISATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: ROWS rows of the output x COLUMNS of its 3*SIZE columns.

    Each row of the image that the tile needs is resized across once, and added with its weight to all rows of the
    tile. Grid: B x row tiles x column tiles, the last fastest.
    """
    ACROSS: tl.constexpr = (3 * SIZE + COLUMNS - 1) // COLUMNS
    DOWN: tl.constexpr = SIZE // ROWS
    tile = tl.program_id(0) % (DOWN * ACROSS)
    sample = (tl.program_id(0) // (DOWN * ACROSS)).to(tl.int64)
    step = tl.load(counter).to(tl.int32) % steps
    row = table + (step.to(tl.int64) * rows_per_step + first + sample) * WORDS
    index = tl.load(row)
    top = tl.load(row + 1).to(tl.float32, bitcast=True)
    left = tl.load(row + 2).to(tl.float32, bitcast=True)
    bottom = tl.load(row + 3).to(tl.float32, bitcast=True)
    right = tl.load(row + 4).to(tl.float32, bitcast=True)
    mirror = tl.load(row + 5)
    height = tl.load(row + 6)
    width = tl.load(row + 7)
    image = pixels + tl.load(starts + index)

    # Down: the centre [ROWS] of each output row in the image, and the rows that any of them needs.
    scale_y = (bottom - top) / SIZE
    radius_y = tl.maximum(scale_y, 1.0)
    narrow_y = 1 / radius_y
    first_row = tile // ACROSS * ROWS
    rows = first_row + tl.arange(0, ROWS)
    centre_y = top + (rows.to(tl.float32) + 0.5) * scale_y - 0.5
    begin = tl.ceil(top + (first_row + 0.5) * scale_y - 0.5 - radius_y).to(tl.int32)
    end = tl.floor(top + (first_row + (ROWS - 0.5)) * scale_y - 0.5 + radius_y).to(tl.int32)

    # Across: the centre [COLUMNS] of each output column in the image, and the first pixel that it needs.
    columns = tile % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    channel = columns % 3
    place = tl.minimum(columns // 3, SIZE - 1)
    place = tl.where(mirror != 0, SIZE - 1 - place, place)
    scale_x = (right - left) / SIZE
    radius_x = tl.maximum(scale_x, 1.0)
    narrow_x = 1 / radius_x
    centre_x = left + (place.to(tl.float32) + 0.5) * scale_x - 0.5
    near = tl.ceil(centre_x - radius_x)
    pairs = tl.ceil(radius_x).to(tl.int32)  # of pixels across; some of the last may have no weight

    sums = tl.full((ROWS, COLUMNS), 0, tl.float32)
    total_y = tl.full((ROWS,), 0, tl.float32)
    total_x = tl.full((COLUMNS,), 0, tl.float32)
    for pair in range(pairs):
        weight_0, at_0 = tap(near + 2 * pair, centre_x, narrow_x, channel, width)
        weight_1, at_1 = tap(near + (2 * pair + 1), centre_x, narrow_x, channel, width)
        total_x += weight_0 + weight_1
        for at_y in range(begin, end + 1):
            line = image + tl.minimum(tl.maximum(at_y, 0), height - 1).to(tl.int64) * (3 * width)
            across = weight_0 * tl.load(line + at_0).to(tl.float32)
            across += weight_1 * tl.load(line + at_1).to(tl.float32)
            weight_y = tl.maximum(1 - tl.abs(at_y - centre_y) * narrow_y, 0)
            total_y += weight_y
            sums += weight_y[:, None] * across[None, :]

    std = channel_constants(NORMALISATION.std, channel)
    shift = channel_constants(NORMALISATION.mean, channel) / std
    by_row, by_column = pairs / total_y, 1 / (total_x * std)
    values = sums * by_row[:, None] * by_column[None, :] - shift[None, :]
    to = (sample * SIZE + rows)[:, None] * (3 * SIZE) + columns[None, :]
    tl.store(x + to, values.to(x.dtype.element_ty), mask=columns[None, :] < 3 * SIZE)
    if tile == 0:
        tl.store(y + sample, tl.load(labels + index))
