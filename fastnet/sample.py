"""The embedded sample: a small set in the shape of Tiny ImageNet, drawn by the project itself.

A class is a shape with a texture; colours, places, angles, sizes, background and noise are random, so that
neither the mean colour nor single pixels tell the class. Every random number comes from the image's own seed
and all geometry is integer arithmetic, so that any machine draws the same pixels.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image

SIZE = 64
SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "striped", "checked", "dotted")
COUNTS = {"train": 120, "val": 30, "test": 30}  # images per class
SCALE = 1024  # fixed point: 1024 units are one pixel, or the number one


def class_names() -> dict[str, str]:
    """Fake wnids and what they stand for, in label order."""
    kinds = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
    return {f"n{90000000 + 1009 * i:08d}": kind for i, kind in enumerate(kinds)}


def draw(split: str, index: int, label: int) -> bytes:
    """The JPEG of image `index` of `split`, of class `label`. About 2 % are grey, as in Tiny ImageNet."""
    rng = np.random.default_rng([label, index, list(COUNTS).index(split)])
    row, column = np.mgrid[0:SIZE, 0:SIZE] * SCALE  # [H, W]

    image = backdrop(rng, row, column)  # [H, W, 3]
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    for _ in range(int(rng.integers(1, 4))):
        radius = int(rng.integers(11, 22)) * SCALE
        center = rng.integers(12, SIZE - 12, 2) * SCALE
        y, x = rotated(rng, row - center[0], column - center[1])
        inside = mask(shape, y, x, radius)
        y, x = rotated(rng, y, x)
        ink = pattern(texture, y, x, int(rng.integers(5, 9)) * SCALE)
        first, second = contrasting(rng)
        image[inside & ink] = first
        image[inside & ~ink] = second

    image = image + rng.integers(-24, 25, (SIZE, SIZE, 1)) + rng.integers(-12, 13, (SIZE, SIZE, 3))
    picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    if rng.integers(50) == 0:
        picture = picture.convert("L")
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def backdrop(rng: np.random.Generator, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """[H, W, 3] int64: a colour gradient with soft blobs."""
    corners = rng.integers(30, 226, (3, 3))
    down, right = corners[1] - corners[0], corners[2] - corners[0]
    image = corners[0] + (down * row[..., None] + right * column[..., None]) // (SIZE * SCALE)
    for _ in range(6):
        center = rng.integers(0, SIZE, 2) * SCALE
        reach = int(rng.integers(4, 14)) * SCALE
        near = (row - center[0]) ** 2 + (column - center[1]) ** 2 < reach**2
        image[near] = (image[near] + rng.integers(0, 256, 3)) // 2
    return image


def rotated(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The plane turned by a random angle."""
    angle = int(rng.integers(360)) * math.pi / 180
    c, s = round(math.cos(angle) * SCALE), round(math.sin(angle) * SCALE)
    return (c * y - s * x) // SCALE, (s * y + c * x) // SCALE


def mask(shape: str, y: np.ndarray, x: np.ndarray, radius: int) -> np.ndarray:
    """[H, W] bool: the pixels of a shape of about `radius`."""
    square = y * y + x * x
    if shape == "disc":
        return square < (radius * 9 // 10) ** 2
    if shape == "ring":
        return (square < radius**2) & (square > (radius * 5 // 9) ** 2)
    if shape == "square":
        return np.maximum(abs(y), abs(x)) < radius * 4 // 5
    if shape == "cross":
        return (np.maximum(abs(y), abs(x)) < radius) & (np.minimum(abs(y), abs(x)) < radius // 3)
    # An equilateral triangle is where three half planes meet; 887/1024 is the cosine of 30 degrees.
    return np.maximum(y, (abs(x) * 887 - y * 512) // SCALE) < radius * 3 // 5


def pattern(texture: str, y: np.ndarray, x: np.ndarray, period: int) -> np.ndarray:
    """[H, W] bool: where the texture has its first colour."""
    if texture == "plain":
        return np.ones_like(y, dtype=bool)
    if texture == "striped":
        return y % period < period // 2
    if texture == "checked":
        return (y % period < period // 2) ^ (x % period < period // 2)
    return (y % period - period // 2) ** 2 + (x % period - period // 2) ** 2 < (period // 3) ** 2


def contrasting(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours that differ by at least 150 levels over the channels."""
    while True:
        first, second = rng.integers(0, 256, (2, 3))
        if abs(first - second).sum() >= 150:
            return first, second
