"""Images mixed with others of their batch: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019).

Shapes: L this rank's share of a step, B images of a micro-batch, S image size.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.input.streams import part

NUMBERS = 5  # of an image: its share of the mixture, and the box that another image fills


def mixtures(n: int, config: Config, step: int) -> NDArray[np.float32]:
    """What is done to the `n` images of a global batch in a step: [n, NUMBERS].

    An image's share is drawn from Beta(a, a), a being --mixup or --cutmix; with both, a fair coin decides which. Under
    mixup the box is empty; under CutMix the share is 1 outside the box, whose centre is uniform and whose area is what
    the share leaves, as far as the image reaches.
    """
    key = np.array([config.seed, step], dtype=np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key).jumped(2))
    shares = {a: draw.beta(a, a, n) for a in {config.mixup, config.cutmix} if a}
    cut = draw.random(n) < (0.5 if config.mixup and config.cutmix else float(config.cutmix > 0))
    centre = draw.random((n, 2)) * config.image_size
    share = np.where(cut, shares.get(config.cutmix, 0.0), shares.get(config.mixup, 0.0))
    side = np.where(cut, np.sqrt(1 - share), 0.0)[:, None] * config.image_size / 2
    low, high = np.clip(np.rint([centre - side, centre + side]), 0, config.image_size)
    return np.concatenate([np.where(cut, 1.0, share)[:, None], low, high], axis=1).astype(np.float32)


class Mixer:
    """Mixes the micro-batches of this rank. Each image is mixed with the one before it in its micro-batch."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.device = config, runtime.device
        self.mine = part(config.batch_size, runtime.rank, runtime.world_size)
        length = self.mine.stop - self.mine.start
        self.parts = [part(length, micro, config.parts) for micro in range(config.parts)]
        self.table = torch.zeros(length, NUMBERS, device=self.device)  # [L, NUMBERS]

    def set_step(self, step: int) -> None:
        """The host's part, before a step: one copy to where the device reads it."""
        rows = torch.from_numpy(mixtures(self.config.batch_size, self.config, step)[self.mine])
        on_gpu = self.device.type == "cuda"
        self.table.copy_(rows.pin_memory() if on_gpu else rows, non_blocking=on_gpu)

    def __call__(self, micro: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, S, S] -> the mixed images, and the share [B] that is the image's own. The rest is that of the image
        before it, whose label is `y.roll(1)`."""
        share, top, left, bottom, right = self.table[self.parts[micro]].unbind(dim=1)  # [B] each
        at = torch.arange(x.shape[2], device=x.device)
        rows = (at >= top[:, None]) & (at < bottom[:, None])  # [B, S]
        columns = (at >= left[:, None]) & (at < right[:, None])  # [B, S]
        inside = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, S, S]
        own = torch.where(inside, 0.0, share[:, None, None, None]).to(x.dtype)  # [B, 1, S, S]
        before = torch.cat((x[-1:], x[:-1]))  # x.roll(1, dims=0) is not channels_last on a GPU
        mixed = torch.lerp(before, x, own)
        return mixed, share * (1 - inside.float().mean(dim=(1, 2, 3)))
