"""The decoded set in GPU memory: the batches of the CPU's streams, from a table and a counter.

The kernel runs from its PTX, on the CPU.

Shapes: L images of a rank's share of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fastnet.config import Augment
from fastnet.data.prepared import Split
from fastnet.errors import InputError
from fastnet.input import device
from fastnet.input import draws as aug
from fastnet.input.decoded import DecodedImages, decoded_bytes
from fastnet.input.device import DeviceEvalStream, DeviceTrainStream, unsupported, upload
from fastnet.input.draws import epoch_draws, epoch_order
from fastnet.input.spec import InputSpec
from fastnet.input.streams import Batch, EvalStream
from fastnet_kernels import images
from ptxrun import execute_ptx
from tests.support.resize import resize_bound
from tests.support.streams import CPU, PLAIN, TRAIN, VAL, spec, stream, take

SIZE = 32
NEAR = resize_bound(95)


@pytest.fixture
def on_device() -> Iterator[None]:
    with execute_ptx(images):
        yield


def device_stream(split: Split, augment: Augment = PLAIN, **options: Any) -> DeviceTrainStream:
    return DeviceTrainStream(
        split, spec(SIZE, decode="device"), augment, **{"batch_size": 8, "seed": 3, **options}
    )


def assert_same(mine: Batch, theirs: Batch) -> None:
    np.testing.assert_array_equal(mine.index, theirs.index)
    assert torch.equal(mine.y, theirs.y)
    assert mine.x.shape == theirs.x.shape and mine.x.is_contiguous(memory_format=torch.channels_last)
    assert (mine.x - theirs.x).abs().max() <= NEAR


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("rank", "world", "accumulate", "step"), [(0, 1, 1, 5), (1, 2, 3, 5), (0, 1, 1, 6)])
def test_batches_are_those_of_the_cpu(
    train: Split, rank: int, world: int, accumulate: int, step: int
) -> None:
    """From the last step of an epoch, or from its end, into the next one; of every second image."""
    where: dict[str, Any] = {
        "rank": rank,
        "world_size": world,
        "accumulate": accumulate,
        "epoch": 1,
        "step": step,
        "only": np.arange(1, TRAIN, 2),
    }
    assert TRAIN // 2 // 8 == 6
    mine = device_stream(train, PLAIN, **where)
    for theirs in take(stream(train, PLAIN, how=spec(SIZE), batch_size=8, **where), 2 * accumulate):
        assert_same(next(mine), theirs)
    assert mine.counter.tolist() == [step - 4] and len(mine) == 6 * accumulate
    mine.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(mine)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epochs_table(train: Split, world: int, accumulate: int) -> None:
    """All ranks' rows together are the epoch's order, each with its image's own draws; none is copied twice."""
    steps, augment = TRAIN // 20, Augment(min_crop=0.4, flip=0.3)
    ranks = [
        device_stream(train, augment, batch_size=20, accumulate=accumulate, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for epoch in range(2):
        inputs = aug.train_inputs(augment, epoch_draws(TRAIN, 3, epoch), train.sizes, SIZE)
        for step in range(steps):
            together = []
            for one in ranks:
                one.advance()
                together += [one.index(micro) for micro in range(accumulate)]
                rows = one.table[step].numpy()  # [L, 8]
                index = np.concatenate(together[-accumulate:])
                np.testing.assert_array_equal(rows[:, 0], index)
                np.testing.assert_array_equal(rows[:, 1:3].view(np.float32), inputs["start"][index])
                np.testing.assert_array_equal(rows[:, 3:5].view(np.float32), inputs["end"][index])
                np.testing.assert_array_equal(rows[:, 5], inputs["mirror"][index])
                np.testing.assert_array_equal(rows[:, 6:], train.sizes[index])
                assert one.counter.tolist() == [step]
                one.count()
            order = epoch_order(TRAIN, 3, epoch)[step * 20 : (step + 1) * 20]
            np.testing.assert_array_equal(np.concatenate(together), order)
    for one in ranks:
        one.close()


@pytest.mark.usefixtures("on_device")
def test_evaluation_is_that_of_the_graph(val: Split) -> None:
    """The last of three ranks, whose last batch is smaller; an iteration that was broken off begins anew."""
    place: dict[str, Any] = {"batch_size": 9, "rank": 2, "world_size": 3, "only": np.arange(4, VAL)}
    mine = DeviceEvalStream(val, spec(SIZE, decode="device", eval_crop=0.875), **place)
    theirs = EvalStream(val, spec(SIZE, eval_crop=0.875), **place)
    assert len(mine) == len(theirs) == 2
    next(iter(mine))
    for a, b in zip(mine, theirs, strict=True):
        assert_same(a, b)
    theirs.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu")
def test_an_epoch_on_a_gpu(train: Split) -> None:
    how = InputSpec(SIZE, torch.device("cuda", torch.cuda.current_device()), torch.float32, "device", 1)
    mine = DeviceTrainStream(train, how, PLAIN, batch_size=8, seed=3)
    for theirs in take(stream(train, PLAIN, how=spec(SIZE), batch_size=8), len(mine) + 1):
        got = next(mine)
        assert_same(Batch(got.x.cpu(), got.y.cpu(), got.index), theirs)
    mine.close()


def test_what_the_kernel_lacks_is_named(train: Split) -> None:
    assert unsupported(PLAIN) is None
    for augment, flag in (
        (Augment(policy="jitter"), "--augment jitter"),
        (Augment(erase=0.25), "--erase 0.25"),
    ):
        with pytest.raises(InputError, match=f"--decode device: the kernel has no {flag}; use"):
            device_stream(train, augment)
    with pytest.raises(InputError, match="--batch-size 98"):
        device_stream(train, batch_size=98)
    with pytest.raises(InputError, match="98 ranks"):
        DeviceEvalStream(train, spec(SIZE), batch_size=1, world_size=TRAIN + 1)


def test_uploads_in_pieces(train: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "UPLOAD", 1000)
    decoded = DecodedImages(train, 1)
    pixels = decoded.mapped[decoded.starts[0] :]
    assert len(pixels) == decoded_bytes(train) and len(pixels) % 1000
    np.testing.assert_array_equal(upload(pixels, CPU).numpy(), pixels)
    given = torch.zeros(2, 300, dtype=torch.int64)
    values = np.arange(600).reshape(2, 300)
    assert upload(values, CPU, given) is given and given.tolist() == values.tolist()
