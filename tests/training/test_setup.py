"""What is settled before the first step: runs that could not make it are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastnet.config import Config
from fastnet.data.default import default_set
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input import jpegs
from fastnet.training.inputs import Inputs
from fastnet.training.placement import place
from fastnet.training.setup import check_sizes, fewest_images


def test_lstms_that_no_memory_holds() -> None:
    """At 2048 px conv4 has 16,384 hidden units: 4 groups of 2 * 4 * H * (H + 1) parameters."""
    config = Config(network="lstm", image_size=2048)
    with pytest.raises(
        InputError, match=r"--image-size 2048: the LSTMs of conv4, conv5 have 9,\d\d\d million"
    ):
        check_sizes(config, Runtime(torch.device("cpu")))
    for network in ("baseline", "linear"):
        check_sizes(replace(config, network=network), Runtime(torch.device("cpu")))
    check_sizes(replace(config, image_size=224), Runtime(torch.device("cpu")))


def test_an_image_alone_is_not_mixed() -> None:
    config = Config(image_size=64, batch_size=8, cutmix=1.0)
    check_sizes(config, Runtime(torch.device("cpu"), world_size=4))
    for refused in (replace(config, accumulate=8), replace(config, accumulate=8, cutmix=0.0, mixup=0.2)):
        with pytest.raises(
            InputError, match="--batch-size 8: some rank trains on 1 image at a time, which has no"
        ):
            check_sizes(refused, Runtime(torch.device("cpu")))
    assert (fewest_images(config), fewest_images(replace(config, cutmix=0.0))) == (2, 1)


def test_one_value_is_too_few_for_batch_norm() -> None:
    config = Config(image_size=32, batch_size=8)
    check_sizes(config, Runtime(torch.device("cpu"), world_size=4))
    for refused in (Runtime(torch.device("cpu"), world_size=8), Runtime(torch.device("cpu"), world_size=5)):
        with pytest.raises(
            InputError, match="--batch-size 8: some rank trains on 1 image at a time, in which conv5"
        ):
            check_sizes(config, refused)
    with pytest.raises(InputError, match="--batch-size 8"):
        check_sizes(replace(config, accumulate=8), Runtime(torch.device("cpu")))
    check_sizes(replace(config, image_size=64), Runtime(torch.device("cpu"), world_size=8))
    with pytest.raises(InputError, match=r"conv5 has a single value \(32 px\)"):
        check_sizes(replace(config, image_size=64, start_size=32), Runtime(torch.device("cpu"), world_size=8))
    frozen = replace(config, head_epochs=1, epochs=0)
    check_sizes(frozen, Runtime(torch.device("cpu"), world_size=8))
    only_head = replace(config, freeze="conv5")
    check_sizes(only_head, Runtime(torch.device("cpu"), world_size=8))
    with pytest.raises(InputError, match=r"conv5 has a single value \(32 px\)"):
        check_sizes(replace(frozen, head_freeze="conv4"), Runtime(torch.device("cpu"), world_size=8))
    for network in ("linear", "lstm"):
        of_conv4 = replace(config, network=network, stages=("conv4",))
        check_sizes(of_conv4, Runtime(torch.device("cpu"), world_size=8))


@pytest.mark.parametrize(
    ("batch", "parts", "rank", "world", "holdout", "expected"),
    [
        (8, 1, 0, 1, 0.0, {8, 2}),
        (9, 2, 0, 1, 0.0, {5, 4}),
        (9, 1, 0, 2, 0.0, {4, 5}),
        (20, 1, 0, 1, 0.0, {20, 10}),
        (8, 1, 0, 1, 0.5, {8, 5, 2}),
    ],
)
def test_the_sizes_for_which_kernels_are_compiled(
    batch: int, parts: int, rank: int, world: int, holdout: float, expected: set[int], tiny_set: Path
) -> None:
    """Of training, of the 21 images of a holdout, and of the ten of val."""
    config = Config(image_size=32, batch_size=batch, accumulate=parts, weights="none", holdout=holdout)
    runtime = Runtime(torch.device("cpu"), rank=rank, world_size=world)
    inputs = Inputs(config, default_set(tiny_set), runtime, {"threads": 1, "decode": "cpu"}, lambda _: None)
    assert inputs.batch_sizes == expected
    inputs.close()


def test_what_decodes_is_recorded(tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, config, splits = Runtime(torch.device("cpu")), Config(), [default_set(tiny_set).splits["train"]]
    here = "libturbojpeg" if jpegs.turbojpeg() else "simplejpeg"
    assert place(config, splits, runtime) == {"decode": "cpu", "jpeg_decoder": here}
    monkeypatch.setattr(jpegs, "turbojpeg", lambda: False)
    assert place(config, splits, runtime) == {"decode": "cpu", "jpeg_decoder": "simplejpeg"}
    assert place(replace(config, decode="raw"), splits, runtime) == {"decode": "raw"}
