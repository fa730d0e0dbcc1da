"""--cache-features: training on the kept outputs of frozen convolutions is training on the images."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastnet import evaluate
from fastnet.config import Augment, Config
from fastnet.data.default import default_set
from fastnet.data.holdout import divide
from fastnet.distributed.ranks import Runtime
from fastnet.files import STALE
from fastnet.network.network import Network
from fastnet.training import features, inputs
from fastnet.training.checkpoint import load
from fastnet.training.placement import streamed_decode
from tests.support.disks import small_disk
from tests.support.paths import SCRIPT
from tests.support.ranks import start_ranks
from tests.support.runs import assert_same_end, events
from tests.support.tiny import TINY, refused, run_here, run_ranks

# Two frozen epochs, and two with conv2 to conv4 frozen.
FLAGS = ["--freeze", "conv4", "--log-every", "1"]
TRAINED_THEN_FROZEN = (
    "--network linear --head-freeze conv2 --head-epochs 1 --freeze conv4 --epochs 1 --ema 0.5"
)
# The frozen prefixes of the two phases are not the same.
PHASES = 2


@pytest.fixture(scope="module")
def own_set(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, as the features are kept beside the set."""
    return shutil.copytree(tiny_set, tmp_path_factory.mktemp("set") / "set")


@pytest.fixture(scope="module")
def kept(own_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on features of as many draws as it has epochs."""
    run = tmp_path_factory.mktemp("runs") / "kept"
    run_here(own_set, run, *FLAGS, "--cache-features", "4")
    return run


@pytest.mark.slow
def test_training_is_that_on_images(kept: Path, own_set: Path, tmp_path: Path) -> None:
    """Up to the rounding of features to float16, which the first step's loss sees once and later ones amplify."""
    run_here(own_set, tmp_path / "images", *FLAGS)
    eps = torch.finfo(torch.float16).eps
    for mine, theirs in zip(events(kept, "step"), events(tmp_path / "images", "step"), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=eps * mine["step"])
    assert {file.name for file in own_set.glob("features/*/*")} == {
        f"{draw}-0.npy" for draw in ("0", "1", "2", "3", "val")
    }
    assert len(list(own_set.glob("features/*"))) == PHASES


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_bit(kept: Path, own_set: Path, tmp_path: Path) -> None:
    """Files that are missing are computed again, to the same numbers; those that are there are not touched."""
    files = {file: file.read_bytes() for file in own_set.glob("features/*/*.npy")}
    for stop in ("3", "13"):
        run_here(own_set, tmp_path / "run", *FLAGS, "--cache-features", "4", "--max-steps", stop)
    lost = sorted(files)[0]
    lost.unlink()
    times = {file: file.stat().st_mtime_ns for file in files if file != lost}
    run_here(own_set, tmp_path / "run", *FLAGS, "--cache-features", "4")
    assert_same_end(tmp_path / "run", kept)
    # The lost file's phase is over.
    run_here(own_set, tmp_path / "again", *FLAGS, "--cache-features", "4", "--max-steps", "11")
    assert all(file.read_bytes() == content for file, content in files.items())
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


WRITING = """
import sys
from fastnet import train
from fastnet.training import features, inputs

write = features.FrozenFeatures._write

def told(self, path, *rest):
    print("writes", path.name, file=sys.stderr)
    write(self, path, *rest)

features.FrozenFeatures._write = told
train.main(sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_two_ranks_divide_the_files(kept: Path, own_set: Path, tmp_path: Path) -> None:
    other = tmp_path / "set"
    shutil.copytree(own_set, other, ignore=shutil.ignore_patterns("features"))
    flags = [*TINY, *FLAGS, "--data", str(other), "--run-dir", str(tmp_path / "run")]
    flags += ["--cache-features", "2", "--max-steps", "6"]
    ranks = start_ranks([[sys.executable, "-c", WRITING, *flags]] * 2)
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    written = [re.findall("^writes (.*)$", lines, re.MULTILINE) for lines in said]
    assert written == [["0-0.npy", "val-0.npy"], ["1-0.npy"]]
    for file in other.glob("features/*/*.npy"):
        mine, theirs = np.load(file), np.load(own_set / file.relative_to(other))
        assert np.allclose(mine, theirs, rtol=2 * np.finfo(np.float16).eps, atol=1e-6)
    assert len(list(other.glob("features/*/*.npy"))) == 3


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_hosts_with_sets_of_their_own(kept: Path, own_set: Path, tmp_path: Path) -> None:
    """Each computes all that its ranks may be dealt; where nothing is missing, no disk is written to."""
    sets = [
        shutil.copytree(own_set, tmp_path / name, ignore=shutil.ignore_patterns("features"))
        for name in ("first", "second")
    ]
    flags = [*FLAGS, "--cache-features", "1", "--max-steps", "2", "--run-dir", str(tmp_path / "run")]
    commands = [[sys.executable, str(SCRIPT), *TINY, *flags, "--data", str(own)] for own in sets]
    for missing in (sets, sets[1:], []):
        for own in missing:
            shutil.rmtree(own / "features", ignore_errors=True)
        times = [own.stat().st_mtime_ns for own in sets]
        ranks = start_ranks(commands)
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], said
        assert missing or times == [own.stat().st_mtime_ns for own in sets]
        for own in sets:
            names = sorted(file.name for file in own.glob("features/*/*"))
            assert names == ["0-0.npy", "val-0.npy"]
        shutil.rmtree(tmp_path / "run")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_stages_frozen_after_they_trained(tiny_set: Path, tmp_path: Path) -> None:
    """They are the same on all ranks, whose batch norms saw other images, and in the average of the weights."""
    own = shutil.copytree(tiny_set, tmp_path / "set")
    flags = TRAINED_THEN_FROZEN.split()
    done = run_ranks(2, own, tmp_path / "run", *flags, "--cache-features", "1")
    assert done.returncode == 0, done.stderr
    assert len(list(own.glob("features/*"))) == PHASES
    saved = load(tmp_path / "run" / "last.pt")
    assert saved.average
    for name, weights in saved.model.items():
        if name.startswith(("backbone.conv1", "backbone.layer1", "backbone.layer2", "backbone.layer3")):
            assert torch.equal(saved.average[name], weights), name
    scores = evaluate.main([str(tmp_path / "run"), "--data", str(own), "--checkpoint", "last"])
    validated = events(tmp_path / "run", "epoch")[-1]
    eps = torch.finfo(torch.float16).eps
    assert validated["val_loss"] == pytest.approx(scores["loss"], rel=eps)


@pytest.mark.parametrize("validated", ["features", "images"])
def test_a_linear_layer_reads_kept_features(validated: str, tiny_set: Path, tmp_path: Path) -> None:
    """A head phase on conv4 is the one on images, up to the rounding that the LSTMs' test allows. With --flip-average,
    it validates on images."""
    own = shutil.copytree(tiny_set, tmp_path / "set")
    flags = ["--network", "linear", "--stages", "conv4", "--epochs", "0", "--log-every", "1"]
    flags += ["--flip-average"] if validated == "images" else []
    for name, draws in (("images", "0"), ("kept", "2")):
        run_here(own, tmp_path / name, *flags, "--cache-features", draws)
    eps = torch.finfo(torch.float16).eps
    for kind, loss in (("step", "train_loss"), ("epoch", "val_loss")):
        mine, theirs = events(tmp_path / "kept", kind), events(tmp_path / "images", kind)
        assert len(mine) == {"step": 10, "epoch": 2}[kind]
        for kept, plain in zip(mine, theirs, strict=True):
            assert kept[loss] == pytest.approx(plain[loss], rel=eps * kept["step"])
    # 256 channels of 2x2 positions, of 42 images.
    assert np.load(next(own.glob("features/*/0-0.npy"))).size == 42 * 1024
    assert bool(list(own.glob("features/*/val-0.npy"))) == (validated == "features")


@pytest.mark.slow
def test_a_signal_is_heard_between_two_files(
    own_set: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained then, and the same command continues, with what was computed."""
    other = shutil.copytree(own_set, tmp_path / "set", ignore=shutil.ignore_patterns("features"))
    write = features.atomic_write

    @contextlib.contextmanager
    def write_and_stop(path: Path, **words: str) -> Iterator[Path]:
        with write(path, **words) as beside:
            yield beside
            os.kill(os.getpid(), signal.SIGTERM)

    for begun in (0, 10):  # each of the two phases computes its own
        with monkeypatch.context() as patch:
            patch.setattr(features, "atomic_write", write_and_stop)
            result = run_here(other, tmp_path / "run", *FLAGS, "--cache-features", "4")
        assert (result["step"], result["done"]) == (begun, False)
        done = run_here(other, tmp_path / "run", *FLAGS, "--cache-features", "4", "--max-steps", "10")
        assert done["step"] == 10
    run_here(other, tmp_path / "run", *FLAGS, "--cache-features", "4")
    assert_same_end(tmp_path / "run", kept)


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a set whose features need more room than is left once they are begun."""
    own = shutil.copytree(tiny_set, tmp_path / "set")
    folder = own / "features"
    with small_disk(folder, "64k"):
        flags = ["sample", "--data", own, "--run-dir", tmp_path / "run", "--network", "lstm"]
        flags += ["--image-size", "32", "--batch-size", "8", "--head-epochs", "1", "--cache-features", "1"]
        assert "0.0 GB are free" in refused(capsys, monkeypatch, *flags)
        monkeypatch.setattr(inputs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
        line = refused(capsys, monkeypatch, *flags)
        assert ": no space left on the disk; free some space, or use fewer draws" in line
        assert not list(folder.glob("*/*")) and not list(folder.glob("*/.*"))


@pytest.mark.slow
def test_what_killed_runs_left_goes_in_time(own_set: Path, kept: Path, tmp_path: Path) -> None:
    """And a file that lacks its last byte is computed anew."""
    cut = next(own_set.glob("features/*/1-0.npy"))
    content = cut.read_bytes()
    cut.write_bytes(content[:-1])
    lost = cut.with_name("0-0.npy")
    lost.unlink()
    old, new = (lost.with_name(f".{lost.name}.{name}.partial") for name in ("old", "new"))
    for left in (old, new):
        left.write_bytes(b"part")
    hours_ago = time.time() - 2 * STALE
    os.utime(old, (hours_ago, hours_ago))
    run_here(own_set, tmp_path / "run", *FLAGS, "--cache-features", "4")
    assert new.exists() and not old.exists()
    assert lost.exists() and cut.read_bytes() == content
    new.unlink()


@pytest.mark.slow
def test_no_draw_is_computed_that_no_epoch_sees(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And room is asked for once where two phases keep the same features."""
    own = shutil.copytree(tiny_set, tmp_path / "set")
    flags = ["--head-epochs", "1", "--freeze", "conv5", "--cache-features", "9"]
    run_here(own, tmp_path / "run", *flags)
    draws = sorted(sorted(file.stem for file in folder.iterdir()) for folder in own.glob("features/*"))
    assert draws == [["0-0", "1-0", "2-0", "val-0"]]
    taken = sum(file.stat().st_size for file in own.glob("features/*/*"))
    shutil.rmtree(own / "features")
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda path: SimpleNamespace(free=taken / 0.94))
    run_here(own, tmp_path / "again", *flags, "--max-steps", "1")


def test_a_file_in_the_place_of_the_features(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(tiny_set, tmp_path / "set")
    (own / "features").write_text("in the way")
    line = refused(
        capsys, monkeypatch, *TINY, "--data", own, "--run-dir", tmp_path / "run", "--cache-features", "1"
    )
    assert f"{own / 'features'}: cannot be written" in line


@pytest.mark.parametrize(
    ("phases", "free"),
    [("--head-epochs 9", 1e3), ("--head-freeze conv2 --head-epochs 1 --freeze conv5 --epochs 9", 1e6)],
)
def test_a_disk_too_small_is_refused_first(
    phases: str,
    free: float,
    own_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where there is room for those of the first phase."""
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    flags = ["sample", "--data", own_set, "--run-dir", tmp_path / "run", "--network", "lstm"]
    flags += ["--image-size", "32", "--batch-size", "8", *phases.split(), "--cache-features", "9"]
    line = refused(capsys, monkeypatch, *flags)
    assert "--cache-features 9: takes" in line and "0.0 GB are free; use fewer draws" in line
    assert not any(file.name.startswith("8-") for file in own_set.glob("features/*/*"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_files_of_few_images(
    kept: Path, own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers in files of eight images, of which no more are open than those of one draw and of validation."""
    most = 0
    shard = features.FrozenFeatures._shard

    def counted(self: features.FrozenFeatures, *where: Any) -> Any:
        nonlocal most
        found = shard(self, *where)
        most = max(most, len(self.shards))
        return found

    monkeypatch.setattr(features, "SHARD", 8)
    monkeypatch.setattr(features.FrozenFeatures, "_shard", counted)
    other = shutil.copytree(own_set, tmp_path / "set", ignore=shutil.ignore_patterns("features"))
    run_here(other, tmp_path / "run", *FLAGS, "--cache-features", "4")
    assert most == -(-42 // 8) + -(-10 // 8)
    eps = float(np.finfo(np.float16).eps)
    for mine, theirs in zip(events(tmp_path / "run", "epoch"), events(kept, "epoch"), strict=True):
        for key in ("train_loss", "val_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=eps * mine["step"])

    def by_draws(path: Path) -> dict[frozenset[str], Path]:
        return {
            frozenset(file.name.split("-")[0] for file in folder.iterdir()): folder
            for folder in path.glob("features/*")
        }

    expected, made = by_draws(own_set), by_draws(other)
    assert made.keys() == expected.keys()
    for draws, folder in made.items():
        for draw in draws:
            parts = np.concatenate([np.load(file) for file in sorted(folder.glob(f"{draw}-*"))])
            whole = np.load(expected[draws] / f"{draw}-0.npy")
            assert np.allclose(parts, whole, rtol=2 * eps, atol=1e-6)


def test_whatever_changes_the_numbers_changes_the_folder(tiny_set: Path) -> None:
    """Else a run would train on the features of another one."""
    data, cpu = default_set(tiny_set), torch.device("cpu")
    first = Config(image_size=32, weights="none", cache_features=1)

    def folder(config: Config = first, frozen: str = "conv4", amp: torch.dtype | None = None) -> Path:
        torch.manual_seed(0)
        network = Network(config, 3)
        network.freeze(frozen)
        division = divide(data, config.holdout)
        return features.FrozenFeatures(config, data, division, network, Runtime(cpu, amp=amp), [0]).folder

    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"image_size": 64},
        {"eval_crop": 0.875},
        {"holdout": 0.25},
        {"decode": "raw"},
        {"depth": 34},
        {"stem": "small"},
        *({"augment": augment} for augment in (Augment(min_crop=0.5), Augment(flip=0.0), Augment("jitter"))),
    ]
    found = [folder(), folder(frozen="conv3"), folder(amp=torch.bfloat16)]
    found += [folder(replace(first, **change)) for change in changes]
    assert len(set(found)) == len(found)
    assert found[0] == folder(replace(first, batch_size=8, lr=0.5, cache_features=3, epochs=2))

    network = Network(first, 3)
    network.freeze("conv4")
    parts = (first, data, divide(data, 0.0), network, Runtime(cpu), [0])
    before = features.FrozenFeatures(*parts).folder
    network.backbone.get_buffer("layer3.1.bn2.running_mean").add_(1e-6)
    assert features.FrozenFeatures(*parts).folder != before


def test_features_are_decoded_as_the_flag_says() -> None:
    for decode, made in (("auto", "cpu"), ("cpu", "cpu"), ("raw", "raw")):
        assert streamed_decode(decode, torch.device("cpu")) == made
    assert streamed_decode("device", torch.device("cuda")) == "gpu"
    assert streamed_decode("cpu", torch.device("cuda")) == "cpu"
