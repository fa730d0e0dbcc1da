"""The generated sample set: a small set in the layout of Tiny ImageNet, drawn by the project itself.

A class is a shape with a texture. Colours, place, size, tilt, background and noise are random, so that neither
the mean colour nor single pixels tell the class, and mirroring does not change it. Every random number comes
from the image's own seed and all geometry is integer arithmetic, so that any machine draws the same pixels.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

SIZE = 64
SHAPES = ("disc", "triangle", "ring", "cross")
TEXTURES = ("plain", "banded", "striped", "checked", "dotted")
COUNTS = {"train": 120, "val": 30, "test": 30}  # images per class
UNIT = 256  # fixed point: a pixel is 256 units wide


def class_names() -> dict[str, str]:
    """Fake wnids and what they stand for, in label order."""
    kinds = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
    return {f"n{90000000 + 1009 * i:08d}": kind for i, kind in enumerate(kinds)}


def draw(split: str, index: int, label: int) -> bytes:
    """The JPEG of image `index` of `split`, of class `label`. About 2 % are grey, as in Tiny ImageNet."""
    rng = np.random.default_rng([label, index, list(COUNTS).index(split)])
    row = np.arange(SIZE, dtype=np.int32)[:, None] * UNIT  # [H, 1]
    column = row.T  # [1, W]
    image = backdrop(rng, row, column)  # [H, W, 3]

    radius = int(rng.integers(15, 28)) * UNIT
    top, left = (rng.integers(20, SIZE - 20, 2) * UNIT).tolist()
    y, x = tilted(row - top, column - left, int(rng.integers(-15, 16)))
    inside = mask(SHAPES[label // len(TEXTURES)], y, x, radius)
    ink = pattern(TEXTURES[label % len(TEXTURES)], y, x, int(rng.integers(9, 14)) * UNIT)
    first, second = two_colours(rng)
    image[inside & ink] = first
    image[inside & ~ink] = second

    image += rng.integers(-12, 13, (SIZE, SIZE, 1), np.int16)
    image += rng.integers(-6, 7, (SIZE, SIZE, 3), np.int16)
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    if rng.integers(50) == 0:
        picture = picture.convert("L")
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def backdrop(rng: np.random.Generator, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """[H, W, 3] int32: a gradient of dull colours under some translucent discs."""
    corners = rng.integers(60, 196, (3, 1), np.int32) + rng.integers(-40, 41, (3, 3), np.int32)
    down, right = corners[1] - corners[0], corners[2] - corners[0]
    image = corners[0] + (down * row[..., None] + right * column[..., None]) // (SIZE * UNIT)
    for _ in range(6):
        top, left = (rng.integers(0, SIZE, 2) * UNIT).tolist()
        reach = int(rng.integers(4, 14)) * UNIT
        near = (row - top) ** 2 + (column - left) ** 2 < reach**2
        image[near] = (2 * image[near] + rng.integers(0, 256, 3, np.int32)) // 3
    return image


def tilted(y: np.ndarray, x: np.ndarray, degrees: int) -> tuple[np.ndarray, np.ndarray]:
    """The plane turned by an angle."""
    c, s = round(math.cos(math.radians(degrees)) * UNIT), round(math.sin(math.radians(degrees)) * UNIT)
    return (c * y - s * x) // UNIT, (s * y + c * x) // UNIT


def mask(shape: str, y: np.ndarray, x: np.ndarray, radius: int) -> np.ndarray:
    """[H, W] bool: the pixels of a shape of about `radius` around the origin."""
    if shape == "disc":
        return y * y + x * x < (radius * 9 // 10) ** 2
    if shape == "ring":
        square = y * y + x * x
        return (square < radius**2) & (square > (radius * 5 // 9) ** 2)
    if shape == "cross":
        return (np.maximum(abs(y), abs(x)) < radius) & (np.minimum(abs(y), abs(x)) < radius // 3)
    # An equilateral triangle is where three half planes meet: 222/256 is the cosine of 30 degrees.
    return np.maximum(y, (abs(x) * 222 - y * 128) // 256) < radius * 3 // 5


def pattern(texture: str, y: np.ndarray, x: np.ndarray, period: int) -> np.ndarray:
    """[H, W] bool: where the texture has its first colour."""
    half = period // 2
    if texture == "plain":
        return np.ones_like(y, dtype=bool)
    if texture == "banded":
        return y % period < half
    if texture == "striped":
        return x % period < half
    if texture == "checked":
        return (y % period < half) ^ (x % period < half)
    return (y % period - half) ** 2 + (x % period - half) ** 2 < (period // 3) ** 2


def two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours that differ by at least 200 levels over the channels."""
    while True:
        first, second = rng.integers(0, 256, (2, 3), np.int32)
        if abs(first - second).sum() >= 200:
            return first, second
