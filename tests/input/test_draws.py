"""The random draws: orders, crops, flips and operations are distributed as asked."""

from __future__ import annotations

import numpy as np

from fastnet.config import Augment
from fastnet.input import draws as aug
from fastnet.input.draws import epoch_order, eval_inputs
from tests.support.streams import TRAIN


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


def test_a_strip_of_millions_of_pixels() -> None:
    """The product of its length and of the image's size is beyond 32 bits."""
    sizes = np.array([[3, 19_173_962]], np.int32)  # [1, 2]
    box = eval_inputs(sizes, 224, 1.0)
    assert np.allclose(box["end"] - box["start"], 3, atol=2)  # float32 is that coarse there
    assert np.allclose((box["start"] + box["end"]) / 2, sizes / 2, atol=2)
