"""What happens to an image in training, and the crops of evaluation.

Everything random is drawn here, by numpy's counter-based Philox generator keyed by (seed, epoch): row i of an
epoch's draws belongs to image i, whatever batch it falls into and whichever rank computes it. DALI's own random
operators have no such key, so they are not used.

Shapes: N images of the split, B of the batch, K = DRAWS numbers per image. Boxes are (row, column) pairs in
pixels of the stored image, not rounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastnet.config import Augment

MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)  # ImageNet, in grey levels
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
# Columns of the draws. Each use has its own, so switching one on leaves the others as they were.
CROP, FLIP, JITTER, OPERATIONS, ERASE = slice(0, 4), 4, slice(5, 9), slice(9, 15), slice(15, 20)
DRAWS = 20
CROP_RATIO = (3 / 4, 4 / 3)
JITTER_FACTOR, JITTER_HUE = 0.4, 36.0  # factors in 1 +- 0.4, hue in +- 36 degrees
ERASE_AREA, ERASE_RATIO = (0.02, 0.33), (0.3, 1 / 0.3)  # Zhong et al. 2020
MAGNITUDES = 31
RAND_OPERATIONS, RAND_MAGNITUDE = 2, 9  # N and M of RandAugment (Cubuk et al. 2020)
SUITE_SIZE = 14  # operations in either suite of operators.py


def operations_per_image(policy: str) -> int:
    return RAND_OPERATIONS if policy == "rand" else 1


def epoch_order(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The shuffle [N] of `n` images in an epoch, the same on every rank."""
    return np.random.Generator(_philox(seed, epoch)).permutation(n)


def epoch_draws(n: int, seed: int, epoch: int) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1), float32 [N, K]; independent of the epoch's order."""
    return np.random.Generator(_philox(seed, epoch).jumped()).random((n, DRAWS), dtype=np.float32)


def _philox(seed: int, epoch: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))


def random_boxes(
    u: NDArray, sizes: NDArray, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[NDArray, NDArray]:
    """Random boxes inside images of `sizes` [B, 2] (height, width) from uniform numbers `u` [B, 4].

    The area is uniform in `area` (fractions of the image), width/height log-uniform among those in `ratio`
    with which that area fits, the position uniform. No rejection, so four numbers always do. An image too
    long for any allowed ratio gets the largest box of the nearest one. Returns first and last corner, float64
    [B, 2] each.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    fraction = area[0] + u[:, 0] * (area[1] - area[0])
    low = np.maximum(np.log(ratio[0]), np.log(fraction * width / height))
    high = np.minimum(np.log(ratio[1]), np.log(width / height / fraction))
    shape = np.exp(np.clip(low + u[:, 1] * (high - low), np.log(ratio[0]), np.log(ratio[1])) / 2)
    box = np.sqrt(fraction * height * width)[:, None] * np.stack([1 / shape, shape], axis=1)  # [B, 2]
    box *= np.minimum(1, (sizes / box).min(axis=1))[:, None]
    start = u[:, 2:4] * (sizes - box)
    return start, start + box


def train_inputs(augment: Augment, u: NDArray, sizes: NDArray, image_size: int) -> dict[str, NDArray]:
    """What is done to images with draws `u` [B, K] and `sizes` [B, 2], name -> [B] or [B, 2]: the inputs of DALI's
    graph and of the other ways to make batches."""
    u = u.astype(np.float64)
    start, end = random_boxes(u[:, CROP], sizes, (augment.min_crop, 1.0), CROP_RATIO)
    inputs = {"start": _f32(start), "end": _f32(end), "mirror": _i32(u[:, FLIP] < augment.flip)}
    if augment.policy == "jitter":
        brightness, contrast, saturation, hue = 2 * u[:, JITTER].T - 1
        inputs["brightness"] = _f32(1 + JITTER_FACTOR * brightness)
        inputs["contrast"] = _f32(1 + JITTER_FACTOR * contrast)
        inputs["saturation"] = _f32(1 + JITTER_FACTOR * saturation)
        inputs["hue"] = _f32(JITTER_HUE * hue)
    elif augment.policy in ("trivial", "rand"):
        for level in range(operations_per_image(augment.policy)):
            operation, magnitude, sign = u[:, OPERATIONS].T[3 * level : 3 * level + 3]
            inputs[f"operation{level}"] = _i32(operation * SUITE_SIZE)
            inputs[f"sign{level}"] = _i32(sign < 0.5)
            if augment.policy == "trivial":
                inputs[f"magnitude{level}"] = _i32(magnitude * MAGNITUDES)
            else:
                inputs[f"magnitude{level}"] = np.full(len(u), RAND_MAGNITUDE, np.int32)
    if augment.erase:
        chance, boxes = u[:, ERASE][:, 0], u[:, ERASE][:, 1:]
        start, end = random_boxes(boxes, np.full_like(sizes, image_size), ERASE_AREA, ERASE_RATIO)
        hit = (chance < augment.erase)[:, None]
        inputs["erase_start"] = _f32(np.rint(start))
        inputs["erase_shape"] = _f32((np.rint(end) - np.rint(start)) * hit)
    return inputs


def eval_inputs(sizes: NDArray, image_size: int, eval_crop: float) -> dict[str, NDArray]:
    """The box of each image of `sizes` [B, 2] that remains after resizing its shorter side to image_size /
    eval_crop and cropping the centre. Rounds as torchvision's Resize and CenterCrop do.
    """
    wide = sizes.astype(np.float64)  # the product of two sizes is beyond int32 for a long strip
    resized = np.floor(round(image_size / eval_crop) * wide / wide.min(axis=1, keepdims=True))  # [B, 2]
    offset = np.rint((resized - image_size) / 2)
    scale = sizes / resized
    return {"start": _f32(offset * scale), "end": _f32((offset + image_size) * scale)}


def _f32(values: NDArray) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, dtype=np.float32)


def _i32(values: NDArray) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, dtype=np.int32)
