"""The input pipeline's promises: who sees which sample when, with which pixels, and without copies."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from PIL import Image
from torchvision.transforms import v2

from fastnet import prepare
from fastnet.config import Augment
from fastnet.data.prepared import PreparedSet, Split, open_set
from fastnet.errors import InputError
from fastnet.input import draws as aug
from fastnet.input import graph, streams
from fastnet.input.decoded import DecodedImages
from fastnet.input.draws import epoch_order
from fastnet.input.graph import InputSpec, resolve_decode
from fastnet.input.streams import Batch, EvalStream, TrainStream, step_share
from tests.support.paths import REPOSITORY

CPU = torch.device("cpu")
TRAIN, VAL = 97, 41  # no batch size or number of ranks used here divides them
GREY = 5  # every fifth image
PLAIN = Augment()
POLICIES = ("none", "jitter", "trivial", "rand")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """A set of images of many sizes, from 40 to 95 pixels, every fifth one grey."""
    root = tmp_path_factory.mktemp("pipeline")
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            folder = root / "folder" / split / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            height, width = rng.integers(40, 96, 2).tolist()
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
            image = Image.fromarray((smooth * 0.7 + rng.integers(0, 77, smooth.shape)).astype(np.uint8))
            image.convert("L" if i % GREY == 0 else "RGB").save(folder / f"{i:03d}.jpg", quality=90)
    prepare.main([str(root / "folder"), "--out", str(root / "set")])
    return open_set(root / "set")


@pytest.fixture
def train(prepared: PreparedSet) -> Split:
    return prepared.splits["train"]


@pytest.fixture
def val(prepared: PreparedSet) -> Split:
    return prepared.splits["val"]


def spec(size: int = 32, decode: str = "cpu", threads: int = 1, eval_crop: float = 1.0) -> InputSpec:
    return InputSpec(size, CPU, torch.float32, decode, threads, eval_crop)


def stream(
    split: Split, augment: Augment = PLAIN, *, how: InputSpec | None = None, **options: int
) -> TrainStream:
    return TrainStream(split, how or spec(), augment, **{"batch_size": 20, "seed": 3, **options})


def take(source: TrainStream, batches: int) -> list[Batch]:
    """The next batches, copied out of DALI's buffers."""
    with_copies = [Batch(b.x.clone(), b.y.clone(), b.index) for b in islice(source, batches)]
    source.close()
    return with_copies


def by_sample(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {int(i): x for batch in batches for i, x in zip(batch.index, batch.x, strict=True)}


def levels(x: torch.Tensor) -> np.ndarray:
    """[3, H, W] normalised -> [H, W, 3] grey levels 0..255, not rounded."""
    return x.permute(1, 2, 0).numpy() * np.array(aug.STD) + np.array(aug.MEAN)


def pil(split: Split, i: int) -> Image.Image:
    return Image.open(io.BytesIO(split.jpeg(i).tobytes())).convert("RGB")


# --- which samples, when -------------------------------------------------------------------------------------


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


def test_orders_are_fresh_shuffles_of_everything() -> None:
    orders = [epoch_order(TRAIN, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(TRAIN))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    np.testing.assert_array_equal(orders[1], epoch_order(TRAIN, 0, 1))


def test_draws_are_fresh_each_epoch_and_uniform() -> None:
    n = 20_000
    draws = aug.epoch_draws(n, 0, 0)
    assert draws.shape == (n, aug.DRAWS) and draws.min() >= 0 and draws.max() < 1
    # Mean of n uniform numbers: standard deviation 1/sqrt(12 n); 5 of them over 20 columns.
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 5 / np.sqrt(12 * n)
    correlation = np.corrcoef(draws.T) - np.eye(aug.DRAWS)
    assert np.abs(correlation).max() < 5 / np.sqrt(n)
    for other in (aug.epoch_draws(n, 0, 1), aug.epoch_draws(n, 1, 0)):
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(draws.size)


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


# --- which pixels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
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


def test_crop_and_flip_are_those_of_an_independent_resize(train: Split) -> None:
    size = 96  # larger than any stored image, so no filter has to be agreed on
    inputs = aug.train_inputs(Augment(), aug.epoch_draws(TRAIN, 3, 0), train.sizes, size)
    assert 0 < inputs["mirror"].sum() < TRAIN
    for sample, x in by_sample(take(stream(train, how=spec(size)), 4)).items():
        (top, left), (bottom, right) = inputs["start"][sample], inputs["end"][sample]
        channels = [  # in mode F, PIL resizes without rounding
            Image.fromarray(channel).resize(
                (size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
            )
            for channel in np.asarray(pil(train, sample), np.float32).transpose(2, 0, 1).copy()
        ]
        expected = np.stack([np.asarray(channel) for channel in channels], axis=2)
        expected = expected[:, ::-1] if inputs["mirror"][sample] else expected
        # Both in float32: about 10 operations on numbers below 256, and positions of up to 100 pixels.
        assert np.abs(levels(x) - expected).max() < 10 * 256 * 100 * 2**-24


def test_where_stored_images_are_larger_resizing_comes_first(train: Split) -> None:
    """Then grey levels are rounded once, and the same images come out but for that."""
    inputs = aug.train_inputs(Augment(), aug.epoch_draws(TRAIN, 3, 0), train.sizes, 32)
    assert train.sizes.prod(axis=1).mean() > 32**2
    for sample, x in by_sample(take(stream(train, how=spec(32)), 4)).items():
        (top, left), (bottom, right) = inputs["start"][sample], inputs["end"][sample]
        image = pil(train, sample).resize((32, 32), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        expected = np.asarray(image)[:, ::-1] if inputs["mirror"][sample] else np.asarray(image)
        got = levels(x)
        assert np.abs(got - got.round()).max() < 1e-3
        # Filter supports are cut off differently, so single pixels differ by more than roundings do.
        assert np.abs(got - expected).mean() < 1


@pytest.mark.parametrize("size, eval_crop", [(96, 1.0), (96, 0.875), (128, 0.7)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(val: Split, size: int, eval_crop: float) -> None:
    reference = v2.Compose([v2.Resize(round(size / eval_crop), antialias=True), v2.CenterCrop(size)])
    for batch in EvalStream(val, spec(size, eval_crop=eval_crop), batch_size=9):
        for x, sample in zip(batch.x, batch.index, strict=True):
            # One level, by the roundings of two passes as above.
            assert np.abs(levels(x) - np.asarray(reference(pil(val, sample)))).max() < 1.01


def test_scaling_down_is_antialiased(val: Split) -> None:
    reference = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])
    for batch in EvalStream(val, spec(32), batch_size=9):
        for x, sample in zip(batch.x, batch.index, strict=True):
            # Filter supports are cut off differently, so single pixels differ by more than roundings do.
            assert np.abs(levels(x) - np.asarray(reference(pil(val, sample)))).mean() < 1


def test_normalisation_is_imagenets(val: Split) -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for size in (32, 96):  # normalised after resizing, and before it
        (batch,) = EvalStream(val, spec(size), batch_size=VAL)
        grey = (batch.x * std[:, None, None] + mean[:, None, None]) * 255
        assert grey.min() > -1e-3 and grey.max() < 255.001
        for x, own in zip(batch.x, grey, strict=True):
            np.testing.assert_allclose(levels(x), own.permute(1, 2, 0), atol=1e-3)


def test_grey_images_become_rgb(train: Split) -> None:
    batches = take(stream(train, batch_size=TRAIN), 1)
    kinds = [Image.open(io.BytesIO(train.jpeg(i).tobytes())).mode for i in range(TRAIN)]
    assert kinds.count("L") > 5
    for sample, x in by_sample(batches).items():
        spread = np.ptp(levels(x), axis=2).max()
        assert (spread < 1e-3) == (kinds[sample] == "L")


def test_boxes_have_the_areas_and_ratios_asked_for() -> None:
    n, low = 20_000, 0.25
    rng = np.random.default_rng(1)
    sizes = np.stack([rng.integers(60, 70, n), rng.integers(60, 70, n)], axis=1)
    start, end = aug.random_boxes(rng.random((n, 4)), sizes, (low, 1.0), (3 / 4, 4 / 3))
    assert (start >= 0).all() and (end <= sizes + 1e-9).all()
    height, width = (end - start).T
    area = height * width / sizes.prod(axis=1)
    assert area.min() >= low - 1e-9 and area.max() <= 1 + 1e-9
    # Uniform: mean and variance within 5 standard errors.
    assert abs(area.mean() - (1 + low) / 2) < 5 * (1 - low) / np.sqrt(12 * n)
    assert abs(area.var() - (1 - low) ** 2 / 12) < 5 * (1 - low) ** 2 / np.sqrt(180 * n)
    ratio = width / height
    assert ratio.min() >= 3 / 4 - 1e-9 and ratio.max() <= 4 / 3 + 1e-9
    small = np.log(ratio[area < 0.5])  # any ratio fits there: log-uniform
    assert abs(small.mean()) < 5 * 2 * np.log(4 / 3) / np.sqrt(12 * len(small))
    assert small.min() < np.log(0.76) and small.max() > np.log(1.32)
    slack = (sizes - (end - start))[:, 0] > 5
    place = start[slack, 0] / (sizes - (end - start))[slack, 0]
    assert abs(place.mean() - 0.5) < 5 / np.sqrt(12 * slack.sum())


def test_boxes_of_long_images_keep_the_nearest_ratio() -> None:
    sizes = np.array([[10, 400], [400, 10]])
    start, end = aug.random_boxes(np.full((2, 4), 0.5), sizes, (0.25, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_allclose(end - start, [[10, 10 * 4 / 3], [10 * 4 / 3, 10]])


def test_flips_and_erasures_happen_as_often_as_asked() -> None:
    n = 20_000
    draws, sizes = aug.epoch_draws(n, 0, 0), np.full((n, 2), 64)
    for chance in (0.0, 0.3, 1.0):
        inputs = aug.train_inputs(Augment(flip=chance, erase=max(chance, 0.1)), draws, sizes, 64)
        assert abs(inputs["mirror"].mean() - chance) <= 5 * np.sqrt(chance * (1 - chance) / n)
        hit = (inputs["erase_shape"] > 0).all(axis=1)
        assert abs(hit.mean() - max(chance, 0.1)) <= 5 * np.sqrt(0.25 / n)
        assert (inputs["erase_shape"][~hit] == 0).all()
        assert (inputs["erase_start"] + inputs["erase_shape"]).max() <= 64
    assert "erase_start" not in aug.train_inputs(Augment(), draws, sizes, 64)


def test_erasing_fills_a_box_and_changes_nothing_else(train: Split) -> None:
    plain = by_sample(take(stream(train, batch_size=TRAIN), 1))
    erased = by_sample(take(stream(train, Augment(erase=0.5), batch_size=TRAIN), 1))
    inputs = aug.train_inputs(Augment(erase=0.5), aug.epoch_draws(TRAIN, 3, 0), train.sizes, 32)
    for sample in plain:
        (top, left), (height, width) = inputs["erase_start"][sample], inputs["erase_shape"][sample]
        expected = levels(plain[sample])
        expected = expected[:, ::-1].copy() if inputs["mirror"][sample] else expected  # the flip comes last
        expected[int(top) : int(top + height), int(left) : int(left + width)] = np.round(aug.MEAN)
        expected = expected[:, ::-1] if inputs["mirror"][sample] else expected
        np.testing.assert_allclose(levels(erased[sample]), expected, atol=1e-3)


def test_trivial_augment_obeys_the_operation_and_magnitude_given(train: Split) -> None:
    names = [operation.name for operation in get_trivial_augment_wide_suite()]
    draws = aug.epoch_draws(TRAIN, 3, 0)
    inputs = aug.train_inputs(Augment(policy="trivial"), draws, train.sizes, 32)
    plain = by_sample(take(stream(train, batch_size=TRAIN), 1))
    changed = by_sample(take(stream(train, Augment(policy="trivial"), batch_size=TRAIN), 1))
    checked = set()
    for sample in plain:
        before, after = np.rint(levels(plain[sample])), np.rint(levels(changed[sample]))
        strength = inputs["magnitude0"][sample] / (aug.MAGNITUDES - 1)
        name = names[inputs["operation0"][sample]]
        if name == "identity":
            expected = before
        elif name == "posterize":
            kept = round(8 - 6 * strength)
            expected = before.astype(int) & (0xFF << (8 - kept) & 0xFF)
        elif name == "solarize":
            expected = np.where(before < 256 * (1 - strength), before, 255 - before)
        elif name == "brightness":
            factor = 1 + (0.01 + 0.98 * strength) * (-1 if inputs["sign0"][sample] else 1)
            expected = np.clip(before * factor, 0, 255)
        else:
            continue
        checked.add(name)
        assert np.abs(after - expected).max() <= (1 if name == "brightness" else 0), name
    assert checked == {"identity", "posterize", "solarize", "brightness"}


def test_each_operation_is_drawn_about_equally_often() -> None:
    n = 20_000
    draws, sizes = aug.epoch_draws(n, 0, 0), np.full((n, 2), 64)
    for policy, names in (("trivial", ["operation0"]), ("rand", ["operation0", "operation1"])):
        inputs = aug.train_inputs(Augment(policy=policy), draws, sizes, 64)
        for name in names:
            counts = np.bincount(inputs[name], minlength=14)
            assert len(counts) == 14
            assert np.abs(counts - n / 14).max() < 5 * np.sqrt(n / 14)
        assert abs(inputs["sign0"].mean() - 0.5) < 5 * 0.5 / np.sqrt(n)
    assert set(inputs["magnitude0"]) == {aug.RAND_MAGNITUDE}


def test_jitter_scales_brightness_and_leaves_grey_images_grey(train: Split) -> None:
    inputs = aug.train_inputs(Augment(policy="jitter"), aug.epoch_draws(TRAIN, 3, 0), train.sizes, 32)
    for name in ("brightness", "contrast", "saturation"):
        assert 0.6 <= inputs[name].min() < 0.7 and 1.3 < inputs[name].max() <= 1.4
    plain = by_sample(take(stream(train, batch_size=TRAIN), 1))
    changed = by_sample(take(stream(train, Augment(policy="jitter"), batch_size=TRAIN), 1))
    for sample in range(TRAIN):
        before, after = levels(plain[sample]), levels(changed[sample])
        assert np.abs(after - before).max() > 0.5
        if (
            np.ptp(before, axis=2).max() < 1e-3
        ):  # a hue or saturation that is not applied per pixel shows here
            expected = inputs["brightness"][sample] * (128 + inputs["contrast"][sample] * (before - 128))
            # DALI's own weights of the three channels sum to one within a few per mille.
            assert np.abs(after - expected.clip(0, 255)).max() < 2


# --- evaluation ----------------------------------------------------------------------------------------------


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


# --- memory --------------------------------------------------------------------------------------------------


def test_batches_are_channels_last_in_dalis_own_memory(train: Split) -> None:
    source = stream(train)
    assert source._pipe is not None
    outputs, addresses = source._pipe.outputs, []

    def spy(**options: object) -> tuple:
        given = outputs(**options)
        addresses.append(given[0].as_tensor().data_ptr())
        return given

    source._pipe.outputs = spy  # type: ignore[method-assign]
    for _ in range(5):
        batch = next(source)
        assert batch.x.data_ptr() == addresses[-1]
        assert batch.x.stride() == (32 * 32 * 3, 1, 32 * 3, 3)
        assert batch.x.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_outlives_the_next_ones_and_the_stream(train: Split) -> None:
    source = stream(train)
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
    given = streams._Feed(train.jpeg, "")
    given.todo = iter([(np.arange(3), {})])
    (images,) = given()
    assert [image.data_ptr() for image in images] == [train.jpeg(i).ctypes.data for i in range(3)]


def test_a_process_ends_with_streams_open(prepared: PreparedSet) -> None:
    script = f"""
import torch
from pathlib import Path
from fastnet.config import Augment
from fastnet.data.prepared import open_set
from fastnet.input.graph import InputSpec
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


# --- raw -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(prepared: PreparedSet, tmp_path: Path) -> Split:
    """The training split of a set that nobody has decoded yet."""
    for file in ("set.json", "train.arrow", "val.arrow"):
        (tmp_path / file).write_bytes((prepared.path / file).read_bytes())
    return open_set(tmp_path).splits["train"]


def test_raw_has_the_pixels_of_cpu(fresh: Split) -> None:
    augment = Augment(policy="trivial", erase=0.3)
    decoded = by_sample(take(stream(fresh, augment, how=spec(decode="raw")), 8))
    for sample, x in by_sample(take(stream(fresh, augment), 8)).items():
        assert torch.equal(decoded[sample], x)
    images = DecodedImages(fresh, 1)
    for i in range(TRAIN):
        assert images(i).shape == (*fresh.sizes[i], 3)
        np.testing.assert_array_equal(images(i), np.asarray(pil(fresh, i)))


def test_many_ranks_make_one_raw_file(fresh: Split, capfd: pytest.CaptureFixture) -> None:
    (fresh.path.parent / ".train.raw.99999").write_bytes(b"left by a killed process")
    threads = [threading.Thread(target=DecodedImages, args=(fresh, 1)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err.count("decoding train once") == 1
    assert sorted(p.name for p in fresh.path.parent.iterdir()) == [
        "set.json",
        "train.arrow",
        "train.raw",
        "val.arrow",
    ]


def test_a_stale_or_short_raw_file_is_refused(fresh: Split) -> None:
    DecodedImages(fresh, 1)
    path = fresh.path.with_suffix(".raw")
    whole = path.read_bytes()
    for content in (whole[:14] + b"0000" + whole[18:], whole[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train\.raw.*remove it"):
            stream(fresh, how=spec(decode="raw"))


def test_a_raw_file_that_does_not_fit_leaves_nothing(fresh: Split) -> None:
    before = sorted(fresh.path.parent.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"train\.raw"):
            DecodedImages(fresh, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(fresh.path.parent.iterdir()) == before


# --- the graph on a GPU --------------------------------------------------------------------------------------


def no_batch() -> list:
    return []


def gpu_graph(decode: str, policy: str) -> str:
    """The serialized graph for a GPU, which DALI checks for arguments, types and devices without having one."""
    augment = Augment(policy=policy, erase=0.5)
    names = tuple(aug.train_inputs(augment, aug.epoch_draws(1, 0, 0), np.array([[64, 64]]), 64))
    how = InputSpec(64, torch.device("cuda", 0), torch.float16, decode, 2)
    made = graph.graph(no_batch, names, how, policy, batch_size=8, num_threads=2, device_id=None)
    return made.serialize().decode("latin1")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("decode", ["gpu", "cpu", "raw"])
def test_the_gpu_graph_is_valid(decode: str, policy: str) -> None:
    text = gpu_graph(decode, policy)
    assert ("mixed" in text) == (decode == "gpu")
    assert "Resize" in text and "gpu" in text


@pytest.mark.parametrize(
    "wrong",
    [
        lambda images, *_: fn.color_twist(images, brightnes=1.0),
        lambda images, *_: fn.color_twist(images, brightness="bright"),
        lambda images, *_: fn.color_twist(images, brightness=images),  # an argument on the GPU
        lambda images, *_: fn.decoders.image(images, device="cpu"),  # GPU data for a CPU operator
    ],
)
def test_the_check_of_the_gpu_graph_can_fail(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    monkeypatch.setattr(graph, "apply_policy", wrong)
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        gpu_graph("gpu", "none")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("decode", ["gpu", "cpu", "raw"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gpu_pixels_are_those_of_the_cpu(train: Split, decode: str, policy: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    augment = Augment(policy=policy, erase=0.3)
    how = InputSpec(96, device, torch.float16, decode, 2)
    on_cpu = take(stream(train, augment, how=spec(96)), 4)
    for got, expected in zip(take(stream(train, augment, how=how), 4), on_cpu, strict=True):
        assert got.x.device == got.y.device == device and got.x.dtype == torch.float16
        assert got.x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got.y.cpu(), expected.y)
        difference = (got.x.float().cpu() - expected.x).abs() * 255 * min(0.229, 0.224, 0.225)
        # Roundings of the inverse DCT (1 level), chroma (1), resize (1), and of float16 (0.2); operations with
        # thresholds (posterize, solarize, equalize) turn a level into many, but only for a few pixels.
        assert (difference > 3.2).float().mean() < (0 if policy in ("none", "jitter") else 0.02) + 1e-3


# --- bad input -----------------------------------------------------------------------------------------------


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


def test_auto_decodes_where_the_device_is() -> None:
    assert resolve_decode("auto", CPU) == "cpu"
    assert resolve_decode("auto", torch.device("cuda", 0)) == "gpu"
    assert resolve_decode("raw", CPU) == "raw"
