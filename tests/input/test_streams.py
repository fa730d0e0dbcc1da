"""The streams: which rank sees which sample when, with the same pixels everywhere, and without copies."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from fastnet.config import Augment
from fastnet.data.prepared import PreparedSet, Split
from fastnet.errors import InputError
from fastnet.input import streams
from fastnet.input.dali import Feed
from fastnet.input.draws import epoch_order
from fastnet.input.spec import resolve_decode
from fastnet.input.streams import DrawnStream, EvalStream, check_memory, step_share
from tests.support.paths import REPOSITORY
from tests.support.streams import CPU, PLAIN, POLICIES, TRAIN, VAL, by_sample, spec, stream, take


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_covers_each_sample_once_in_global_order(train: Split, world: int, accumulate: int) -> None:
    steps = TRAIN // 20
    ranks = []
    for rank in range(world):
        source = stream(train, accumulate=accumulate, rank=rank, world_size=world)
        assert source.steps_per_epoch == steps
        ranks.append(take(source, steps * accumulate))
    order = epoch_order(TRAIN, 3, 0)
    for step in range(steps):
        micro = [batches[step * accumulate : (step + 1) * accumulate] for batches in ranks]
        parts = [len(batch.index) for batches in micro for batch in batches]
        shares = [sum(len(batch.index) for batch in batches) for batches in micro]
        assert max(shares) - min(shares) <= 1
        assert min(parts) >= max(shares) // accumulate - 1
        together = np.concatenate([batch.index for batches in micro for batch in batches])
        np.testing.assert_array_equal(together, order[step * 20 : (step + 1) * 20])
    seen = np.concatenate([batch.index for batches in ranks for batch in batches])
    assert len(set(seen.tolist())) == len(seen) == steps * 20
    for batch in ranks[-1]:
        np.testing.assert_array_equal(batch.y.numpy(), train.labels[batch.index])
        assert batch.y.dtype == torch.int64


def test_shares_of_a_step_are_disjoint_and_complete() -> None:
    for world in (1, 2, 3, 7):
        shares = [step_share(TRAIN, 20, 2, rank, world) for rank in range(world)]
        assert np.concatenate([np.arange(TRAIN)[s] for s in shares]).tolist() == list(range(40, 60))
    with pytest.raises(IndexError):
        step_share(TRAIN, 20, 4, 0, 1)


def test_a_stream_goes_on_into_the_next_epoch(train: Split) -> None:
    steps = TRAIN // 20
    batches = take(stream(train), 2 * steps + 1)
    for number, batch in enumerate(batches):
        epoch, step = divmod(number, steps)
        np.testing.assert_array_equal(batch.index, epoch_order(TRAIN, 3, epoch)[step * 20 : (step + 1) * 20])


@pytest.mark.parametrize("world", [1, 3])
def test_resume_in_mid_epoch_is_exact_also_with_other_ranks(train: Split, world: int) -> None:
    policy = Augment(policy="trivial", erase=0.5)
    whole = take(stream(train, policy), 10)[6:]  # 4 steps an epoch: from epoch 1, step 2 on
    ranks = [
        take(stream(train, policy, epoch=1, step=2, rank=rank, world_size=world), 4) for rank in range(world)
    ]
    for number, expected in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([r[number].index for r in ranks]), expected.index)
        assert torch.equal(torch.cat([r[number].x for r in ranks]), expected.x)
        assert torch.equal(torch.cat([r[number].y for r in ranks]), expected.y)


@pytest.mark.parametrize(
    "policy", [*POLICIES[:-1], pytest.param(POLICIES[-1], marks=[pytest.mark.long, pytest.mark.slow])]
)
def test_pixels_depend_on_seed_epoch_and_sample_alone(train: Split, policy: str) -> None:
    augment = Augment(policy=policy, erase=0.5)
    reference = by_sample(take(stream(train, augment, batch_size=TRAIN), 1))
    variants = [
        take(stream(train, augment, batch_size=20), 4),
        take(stream(train, augment, batch_size=24, accumulate=5, how=spec(threads=3)), 20),
        take(stream(train, augment, batch_size=96, rank=1, world_size=2, how=spec(threads=2)), 1),
    ]
    for batches in variants:
        for sample, pixels in by_sample(batches).items():
            assert torch.equal(pixels, reference[sample]), f"sample {sample}"
    for other in (
        stream(train, augment, batch_size=TRAIN, epoch=1),
        stream(train, augment, batch_size=TRAIN, seed=4),
    ):
        changed = by_sample(take(other, 1))
        assert all(not torch.equal(pixels, reference[sample]) for sample, pixels in changed.items())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_evaluation_counts_every_sample_once(val: Split, world: int, batch_size: int) -> None:
    for _ in range(2):
        seen: list[int] = []
        for rank in range(world):
            source = EvalStream(val, spec(), batch_size=batch_size, rank=rank, world_size=world)
            batches = [(batch.index, batch.x.shape, batch.y.numpy().copy()) for batch in source]
            assert len(batches) == len(source)
            for index, shape, labels in batches:
                assert shape == (len(index), 3, 32, 32)
                np.testing.assert_array_equal(labels, val.labels[index])
                seen += index.tolist()
            source.close()
        assert seen == list(range(VAL))


def test_an_evaluation_can_be_broken_off_and_repeated_beside_training(train: Split, val: Split) -> None:
    alone = take(stream(train), 6)
    beside = stream(train)
    source = EvalStream(val, spec(), batch_size=10)
    first = [next(beside).x.clone() for _ in range(3)]
    pixels = [by_sample(list(source))]
    for number, _ in enumerate(source):
        if number == 1:
            break
    again = [next(beside).x.clone() for _ in range(3)]
    pixels.append(by_sample(list(source)))
    assert all(torch.equal(x, batch.x) for x, batch in zip(first + again, alone, strict=True))
    assert list(pixels[0]) == list(pixels[1]) == list(range(VAL))
    assert all(torch.equal(pixels[0][i], pixels[1][i]) for i in pixels[0])


@pytest.mark.parametrize("augment", [PLAIN, Augment(policy="jitter")], ids=["fused", "graph"])
def test_drawn_images_can_be_broken_off_and_repeated(train: Split, augment: Augment) -> None:
    expected = by_sample(take(stream(train, augment, epoch=1), 4))
    source = DrawnStream(train, spec(), augment, seed=3, batch_size=10)
    for _ in source.of(np.arange(40), 0):
        break
    again = by_sample(list(source.of(np.array(list(expected)), 1)))
    assert list(again) == list(expected)
    assert all(torch.equal(again[i], expected[i]) for i in expected)
    source.close()


@pytest.mark.parametrize("augment", [PLAIN, Augment(policy="jitter")], ids=["fused", "graph"])
def test_batches_are_channels_last_in_the_memory_they_are_made_in(
    train: Split, monkeypatch: pytest.MonkeyPatch, augment: Augment
) -> None:
    source = stream(train, augment)
    assert source._source is not None
    made, addresses = source._source.take, []

    def spy() -> tuple:
        images, index = made()
        addresses.append(images.data_ptr())
        return images, index

    monkeypatch.setattr(source._source, "take", spy)
    for _ in range(5):
        batch = next(source)
        assert batch.x.data_ptr() == addresses[-1]
        assert batch.x.stride() == (32 * 32 * 3, 1, 32 * 3, 3)
        assert batch.x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augment", [PLAIN, Augment(policy="jitter")], ids=["fused", "graph"])
def test_a_batch_outlives_the_next_ones_and_the_stream(train: Split, augment: Augment) -> None:
    source = stream(train, augment)
    kept = next(source)
    copy = kept.x.clone()
    for _ in range(6):
        next(source)
    assert torch.equal(kept.x, copy)
    source.close()
    assert torch.equal(kept.x, copy)
    with pytest.raises(RuntimeError, match="closed"):
        next(source)


def test_encoded_images_are_not_copied(train: Split) -> None:
    given = Feed(train.jpeg, "")
    given.todo = iter([(np.arange(3), {})])
    (images,) = given()
    assert [image.data_ptr() for image in images] == [train.jpeg(i).ctypes.data for i in range(3)]


@pytest.mark.slow
def test_a_process_ends_with_streams_open(prepared: PreparedSet) -> None:
    script = f"""
import torch
from pathlib import Path
from fastnet.config import Augment
from fastnet.data.prepared import open_set
from fastnet.input.spec import InputSpec
from fastnet.input.streams import EvalStream, TrainStream
splits = open_set(Path({str(prepared.path)!r})).splits
spec = InputSpec(32, torch.device("cpu"), torch.float32, "cpu", 2)
train = TrainStream(splits["train"], spec, Augment(), batch_size=8, seed=0)
x = next(train).x
for batch in EvalStream(splits["val"], spec, batch_size=8):
    break
print("end", flush=True)
"""
    root = REPOSITORY
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_bad_input_is_named(train: Split, val: Split) -> None:
    for options, text in (
        ({"batch_size": TRAIN + 1}, "--batch-size 98.*97 images"),
        ({"batch_size": 4, "world_size": 5}, "--batch-size 4.*5 ranks"),
        ({"batch_size": 4, "accumulate": 5}, "--batch-size 4.*--accumulate 5"),
        ({"how": spec(48)}, "--image-size 48.*32"),
    ):
        with pytest.raises(InputError, match=text):
            stream(train, **options)
    with pytest.raises(InputError, match="42 ranks"):
        EvalStream(val, spec(), batch_size=8, world_size=VAL + 1)
    with pytest.raises(InputError, match="--decode gpu"):
        stream(train, how=spec(decode="gpu"))
    with pytest.raises(InputError, match="--decode gpu"):
        resolve_decode("gpu", CPU)


def test_batches_that_no_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    photos = np.full((66, 2), [3000, 4000], np.int32)
    check_memory(photos, 32)
    monkeypatch.setattr(streams, "machine_memory", lambda: 1 << 33)
    check_memory(photos, 32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of whose ranks each has such batches
    with pytest.raises(InputError, match="of the 32 largest images take"):
        check_memory(photos, 32)
    monkeypatch.undo()
    with pytest.raises(
        InputError, match=r"--batch-size: batches of the 66 largest images take .* GiB decoded"
    ):
        check_memory(photos * 16, 66)
    check_memory(np.full((100_000, 2), 64, np.int32), 100_000)
