"""Whether what a file computes is what the checkpoint's network computes, up to rounding.

Shapes: N images, K classes, S image size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastnet.network.network import Network

# How far the logits of two float32 computations may lie apart, in units of the larger error that float32 makes in one
# of them. Both make it, which is 2; the maximum of the other may be larger, as it sums in another order and folds the
# batch norms into the convolutions; 8 leaves a factor of 4 for that.
FACTOR = 8


class Difference(NamedTuple):
    """The largest distance between logits, and the largest that rounding explains."""

    found: float
    tolerance: float

    @property
    def is_rounding(self) -> bool:
        return self.found <= self.tolerance  # False if any logit is not a number


@torch.inference_mode()
def difference(network: Network, exported: Callable[[Tensor], Tensor], images: Tensor) -> Difference:
    """Compares logits [N, K] of `network`, in float32 on the CPU, with those of `exported`.

    images: [N, 3, S, S] float32, channels_last. `exported` gets them as one batch, and the first of them alone.

    The tolerance follows from the network itself: FACTOR times its largest error on these images, which is the
    distance between its logits in float32 and in float64. That error is no less than half a unit in the last place of
    the largest logit.
    """
    own = network(images)  # [N, K]
    exact = copy.deepcopy(network).double()(images.double()).double()  # [N, K]
    least = exact.abs().max() * torch.finfo(torch.float32).eps / 2
    rounding = torch.maximum((own - exact).abs().max(), least)
    theirs = torch.cat([exported(images), exported(images[:1])])  # [N+1, K]
    found = (theirs - torch.cat([own, own[:1]])).abs().max()
    return Difference(float(found), FACTOR * float(rounding))
