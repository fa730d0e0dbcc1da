"""--average-last: the mean of the weights at the ends of the last epochs, with batch norms estimated anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastnet import evaluate
from fastnet.data.default import default_set
from fastnet.input.spec import InputSpec
from fastnet.input.streams import TrainStream
from fastnet.network.network import Network
from fastnet.network.weights import load_backbone
from fastnet.training.checkpoint import load
from tests.support.runs import assert_equal, assert_same_end, events
from tests.support.tiny import run_here, run_ranks

STEPS = 5  # of 8 images, of 42
BASELINE = ["--network", "baseline", "--head-epochs", "0"]
FLAGS = [*BASELINE, "--epochs", "3", "--average-last", "2"]
EPS = torch.finfo(torch.float32).eps


def average(run: Path) -> dict[str, Tensor]:
    saved = load(run / "last.pt")
    assert saved.average is not None and saved.result is saved.average
    return saved.average


def statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "running" in name}


@pytest.fixture(scope="module")
def whole(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    run_here(tiny_set, run, *FLAGS)
    return run


@pytest.mark.slow
def test_it_is_the_mean_and_a_stopped_run_has_the_same(whole: Path, tiny_set: Path, tmp_path: Path) -> None:
    """Stopped before the first average, between two, and within the last epoch."""
    run, ends = tmp_path / "run", []
    for stop in (STEPS, 2 * STEPS, 2 * STEPS + 2):
        run_here(tiny_set, run, *FLAGS, "--max-steps", str(stop))
        ends.append(load(run / "last.pt"))
    assert ends[0].average is None
    assert ends[2].average is not None
    assert_equal(ends[1].average, ends[2].average)
    run_here(tiny_set, run, *FLAGS)
    assert_same_end(run, whole)
    ends.append(load(run / "last.pt"))
    for name, tensor in average(run).items():
        if "running" not in name and tensor.is_floating_point():
            expected = (ends[1].model[name].double() + ends[3].model[name].double()) / 2
            # A difference, a product and a sum, each rounded once.
            assert (tensor - expected).norm() <= 3 * EPS * expected.norm(), name


def test_batch_norms_are_those_of_pytorch(whole: Path, tiny_set: Path) -> None:
    """update_bn, over the images of the last epoch as training drew them."""
    config = load(whole / "last.pt").config
    network = Network(config, 3)
    network.load_state_dict(average(whole))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    split = default_set(tiny_set).splits["train"]
    spec = InputSpec(32, torch.device("cpu"), torch.float32, "cpu", 1)
    stream = TrainStream(split, spec, config.augment, batch_size=8, seed=config.seed, epoch=2)
    update_bn([next(stream).x for _ in range(STEPS)], network)
    stream.close()
    found = network.state_dict()
    for name, tensor in average(whole).items():
        # Two products and a sum for each batch.
        torch.testing.assert_close(tensor, found[name], rtol=3 * STEPS * EPS, atol=0, msg=name)


def test_it_is_what_is_evaluated_and_leaves_training_alone(
    whole: Path, tiny_set: Path, tmp_path: Path
) -> None:
    run_here(tiny_set, tmp_path / "plain", *BASELINE, "--epochs", "3")
    assert_equal(load(whole / "last.pt").model, load(tmp_path / "plain" / "last.pt").model)
    mine, theirs = (events(run, "epoch") for run in (whole, tmp_path / "plain"))
    assert [event["train_loss"] for event in mine] == [event["train_loss"] for event in theirs]
    assert mine[0] == theirs[0] and mine[2]["val_loss"] != theirs[2]["val_loss"]
    shutil.copy(whole / "last.pt", tmp_path / "best.pt")
    scores = evaluate.main([str(tmp_path), "--data", str(tiny_set)])
    assert scores["loss"] == pytest.approx(mine[2]["val_loss"], rel=1e-6)


@pytest.mark.slow
def test_frozen_batch_norms_keep_theirs_and_others_see_kept_features(
    whole: Path, tiny_set: Path, tmp_path: Path
) -> None:
    """Kept features are rounded to float16, which conv5's statistics see."""
    own = shutil.copytree(tiny_set, tmp_path / "set")
    flags = [*BASELINE, "--epochs", "1", "--freeze", "conv4", "--average-last", "1", "--lr", "1e-4"]
    flags += ["--weights", str(whole / "last.pt")]
    found = []
    for name, draws in (("images", "0"), ("kept", "1")):
        run_here(own, tmp_path / name, *flags, "--cache-features", draws)
        found.append(statistics(average(tmp_path / name)))
    live = load(tmp_path / "kept" / "last.pt").model
    for name, tensor in found[1].items():
        frozen = ".layer4." not in name
        assert torch.equal(tensor, live[name]) == frozen, name
        assert (tensor - found[0][name]).norm() <= STEPS * 2**-11 * tensor.norm(), name


def test_another_run_starts_from_it(whole: Path) -> None:
    network = Network(load(whole / "last.pt").config, 3)
    load_backbone(network, 18, str(whole / "last.pt"), partial=False)
    expected, found = average(whole), network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in found if name.startswith("backbone."))


@pytest.mark.long
@pytest.mark.xdist_group("ranks")
def test_statistics_are_over_all_ranks_at_full_size(tiny_set: Path, tmp_path: Path) -> None:
    """Two ranks see the micro-batches that one rank sees with --accumulate 2, and sum in another order. The rate keeps
    the weights where they are, so that no rounding is amplified; a rank alone would be apart by a tenth and more."""
    flags = [*BASELINE, "--freeze", "conv4", "--lr", "1e-6", "--epochs", "2", "--average-last", "1"]
    flags += ["--start-size", "32", "--image-size", "64"]
    run_here(tiny_set, tmp_path / "one", *flags, "--accumulate", "2")
    done = run_ranks(2, tiny_set, tmp_path / "ranks", *flags)
    assert done.returncode == 0, done.stderr
    one, ranks = (statistics(average(tmp_path / run)) for run in ("one", "ranks"))
    for name, tensor in one.items():
        torch.testing.assert_close(ranks[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
