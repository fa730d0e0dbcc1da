"""mixup and CutMix: what an image is made of, and what its loss is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastnet.config import Config
from fastnet.data.default import default_set
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.training.mixing import Mixer, mixtures
from fastnet.training.trainer import Trainer

SIZE = 32
BOTH = Config(image_size=SIZE, batch_size=8, mixup=0.4, cutmix=1.0)


def images(n: int) -> torch.Tensor:
    """Image i is i + 1 everywhere."""
    x = torch.arange(1.0, n + 1)[:, None, None, None].expand(n, 3, SIZE, SIZE)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings", [{"mixup": 0.4, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {}])
def test_an_image_is_mixed_in_the_share_that_its_loss_gets(settings: dict[str, Any]) -> None:
    """The mean of a mixed image says how much of it is its own."""
    mixer = Mixer(replace(BOTH, **settings), Runtime(torch.device("cpu")))
    x, seen = images(8), []
    for step in range(20):
        mixer.set_step(step)
        mixed, share = mixer(0, x)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        own, other = x[:, 0, 0, 0], x.roll(1, 0)[:, 0, 0, 0]
        expected = share * own + (1 - share) * other
        assert mixed.mean(dim=(1, 2, 3)).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
        seen += share.tolist()
    assert 0 <= min(seen) < 0.2 and 0.8 < max(seen) <= 1


def test_the_loss_is_of_both_labels_in_their_shares(tiny_set: Path, tmp_path: Path) -> None:
    """In float64, where nothing but a mistake makes a difference above 1e-12."""
    config = replace(BOTH, weights="none", epochs=1, label_smoothing=0.1)
    made = Trainer(config, default_set(tiny_set), tmp_path / "run", Runtime(torch.device("cpu")))
    made.resume()
    logits, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    share = torch.tensor([0.25, 1.0, 0.0, 0.75], dtype=torch.float64)
    with made.resources():
        made.begin_phase()
        assert made.running
        found = made.running.plain.loss(logits, y, share)
    labels = share[:, None] * F.one_hot(y, 3) + (1 - share)[:, None] * F.one_hot(y[[3, 0, 1, 2]], 3)  # [B, K]
    expected = -((0.9 * labels + 0.1 / 3) * logits.log_softmax(dim=1)).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_ranks_and_parts_mix_in_the_same_shares() -> None:
    """What is drawn for an image depends on its place in the global batch only."""
    config = replace(BOTH, batch_size=10, accumulate=2)
    whole = mixtures(10, config, step=3)
    rows = []
    for rank in range(2):
        mixer = Mixer(config, Runtime(torch.device("cpu"), rank=rank, world_size=2))
        mixer.set_step(3)
        rows += [mixer.table[part] for part in mixer.parts]
    assert np.array_equal(torch.cat(rows).numpy(), whole)
    assert not np.array_equal(mixtures(10, config, step=4), whole)


def test_mixed_images_have_no_kept_features() -> None:
    with pytest.raises(InputError, match="--cache-features: mixed images have no kept features"):
        Config(cache_features=1, mixup=0.2)
