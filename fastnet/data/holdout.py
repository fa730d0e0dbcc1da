"""A share of the training images that validates in place of the val split, so that val is looked at only at the end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastnet.data.prepared import PreparedSet, Split
from fastnet.errors import InputError

KEY = 2011  # the same images for every seed, so that runs compare and average


@dataclass(frozen=True)
class Division:
    """What trains and what validates: splits, and the positions of their images that are used, in order."""

    train: Split
    train_images: NDArray[np.int64]
    val: Split
    val_images: NDArray[np.int64]


def divide(data: PreparedSet, fraction: float) -> Division:
    """The train and val splits of a set, or with a `fraction` two parts of its train split (see `hold_out`)."""
    train, val = data.splits["train"], data.splits["val"]
    if not fraction:
        return Division(train, np.arange(len(train)), val, np.arange(len(val)))
    rest, held = hold_out(train, fraction)
    return Division(train, rest, train, held)


def hold_out(split: Split, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the images that train and of those held out, each in order: `fraction` of every class, rounded.

    Raises InputError if some class would have no image to train on, or none held out.
    """
    held = []
    order = np.random.Generator(np.random.Philox(key=KEY)).permutation(len(split))
    for label in np.unique(split.labels):
        members = order[split.labels[order] == label]
        count = round(fraction * len(members))
        if not 0 < count < len(members):
            raise InputError(
                f"--holdout {fraction:g}: holds out {count} of the {len(members)} images of class {label}; choose a "
                "share that leaves some on both sides"
            )
        held.append(members[:count])
    mask = np.zeros(len(split), bool)
    mask[np.concatenate(held)] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)
