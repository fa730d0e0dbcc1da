"""The colour and shape changes of the augmentation policies, as DALI operators driven by our own draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from nvidia.dali import fn
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert
from nvidia.dali.types import DALIDataType

from fastnet.input.draws import MAGNITUDES, MEAN, SUITE_SIZE, operations_per_image


def apply_policy(images: DataNode, inputs: dict[str, DataNode], policy: str, image_size: int) -> DataNode:
    """Adds a policy's operators to the graph: uint8 HWC images of `image_size` in, the same out."""
    if policy == "jitter":
        images = fn.color_twist(
            images,
            brightness=inputs["brightness"],
            contrast=inputs["contrast"],
            saturation=inputs["saturation"],
            hue=inputs["hue"],
        )
    elif policy in ("trivial", "rand"):
        for level in range(operations_per_image(policy)):
            magnitude = signed_bin(inputs[f"magnitude{level}"], random_sign=inputs[f"sign{level}"])
            images = select(
                _suite(policy, image_size),
                inputs[f"operation{level}"],
                data=images,
                magnitude_bin=magnitude,
                num_magnitude_bins=MAGNITUDES,
                fill_value=128,
            )
    if "erase_start" in inputs:
        images = fn.erase(
            images,
            anchor=inputs["erase_start"],
            shape=inputs["erase_shape"],
            fill_value=[round(m) for m in MEAN],
        )
    return images


def input_type(name: str) -> tuple[DALIDataType, int]:
    """Element type and number of dimensions (without the batch) of a graph input."""
    if name in ("start", "end", "erase_start", "erase_shape"):
        return DALIDataType.FLOAT, 1
    if name in ("brightness", "contrast", "saturation", "hue"):
        return DALIDataType.FLOAT, 0
    return DALIDataType.INT32, 0


def _suite(policy: str, image_size: int) -> list[Any]:
    if policy == "rand":
        suite = get_rand_augment_suite(max_translate_abs=round(image_size * 100 / 224))
    else:
        suite = get_trivial_augment_wide_suite()
    assert len(suite) == SUITE_SIZE, "another DALI has other operations: draws.py counts on these"
    return [_as_it_is(operation) for operation in suite]


def _as_it_is(operation: Callable[..., DataNode]) -> Callable[..., DataNode]:
    """Keeps DALI's AutoGraph from translating an operation: it branches on no data, and its tables of
    magnitudes would take seconds. Keeps quiet that two operations call others by deprecated names.
    """

    @do_not_convert
    def call(*args: Any, **options: Any) -> DataNode:
        with warnings.catch_warnings(record=True):
            return operation(*args, **options)

    return call
