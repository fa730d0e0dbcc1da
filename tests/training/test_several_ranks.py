"""Two ranks under torchrun: the same steps as one, killed, stopped, and refused together."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnet import train
from fastnet.cli import run_command
from fastnet.config import sample
from fastnet.data.prepared import open_set
from fastnet.input.draws import epoch_order
from fastnet.input.streams import step_share
from fastnet.training.checkpoint import load
from tests.support.paths import SCRIPT
from tests.support.ranks import start_ranks
from tests.support.runs import assert_same_end, events, wait_for_step
from tests.support.tiny import STEPS, TINY, command, kill_again_and_again, refused, run_here, run_ranks


@pytest.fixture(scope="module")
def whole_on_two(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end on two ranks."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = run_ranks(2, tiny_set, run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_killed_runs_of_two_ranks_continue_to_the_bit(
    whole_on_two: Path, tiny_set: Path, tmp_path: Path
) -> None:
    kill_again_and_again(2, tiny_set, tmp_path / "run", [random.Random(1).randrange(11, STEPS)])
    assert_same_end(tmp_path / "run", whole_on_two)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_signal_stops_two_ranks_after_the_same_step(tiny_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        command(2, tiny_set, run), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        wait_for_step(process, run, 6)
        process.terminate()
        _, said = process.communicate()
    assert "all saved; the same command continues" in said, said
    assert not load(run / "last.pt").position.done
    # Another number of ranks finishes it: the same steps on the same samples, the sums in another order.
    assert run_here(tiny_set, run)["done"]
    assert [event["step"] for event in events(run, "step")] == list(range(2, STEPS + 1, 2))
    assert [e["val_count"] for e in events(run, "epoch")] == [10] * 4


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_ranks_and_accumulation_compute_the_same_step(tiny_set: Path, tmp_path: Path) -> None:
    """With frozen batch norms images do not see each other: a global batch gives one gradient, however it is cut.

    7 images over 2 ranks and 3 parts divide nowhere. Bound: float32 sums of 7 terms in another order, a relative
    error of a few 1e-7 a step over 6 steps, with AdamW's division kept out by plain SGD.
    """
    flags = [
        "--network",
        "baseline",
        "--batch-size",
        "7",
        "--head-epochs",
        "1",
        "--epochs",
        "0",
        "--head-optimizer",
        "sgd",
        "--head-lr",
        "0.1",
    ]
    run_here(tiny_set, tmp_path / "one", *flags)
    run_here(tiny_set, tmp_path / "parts", *flags, "--accumulate", "3")
    done = run_ranks(2, tiny_set, tmp_path / "ranks", *flags, "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    one, *others = (load(tmp_path / run / "last.pt").model for run in ("one", "parts", "ranks"))
    for other in others:
        for name in ("classifier.weight", "classifier.bias"):
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-6)
    assert events(tmp_path / "ranks", "epoch")[0]["val_count"] == 10


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_bad_input_ends_every_rank(tiny_set: Path, tmp_path: Path) -> None:
    """The loss of two ranks becomes infinite: both end with code 2, one line speaks, no checkpoint is left."""
    done = run_ranks(2, tiny_set, tmp_path / "run", "--lr", "1e30", "--head-lr", "1e30", "--warmup", "0")
    assert done.returncode != 0
    assert len(re.findall(r"^error: .*not finite", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert re.findall(r"exitcode\s*: (\d+)", done.stderr) and set(
        re.findall(r"exitcode\s*: (\d+)", done.stderr)
    ) <= {"2"}
    assert not (tmp_path / "run" / "last.pt").exists()


def one_rank(data: Path, run: Path, *flags: str) -> list[str]:
    """What start_ranks starts as one of the ranks."""
    return [sys.executable, str(SCRIPT), *TINY, "--data", str(data), "--run-dir", str(run), *flags]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_rank_with_another_setting_is_named(tiny_set: Path, tmp_path: Path) -> None:
    """As where the command is typed on each host. Threads may differ."""
    own = (["--lr", "0.01", "--threads", "1"], ["--lr", "0.02", "--threads", "2"])
    ranks = start_ranks([one_rank(tiny_set, tmp_path / "run", *flags) for flags in own])
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert re.search(
        r"^error: --lr 0.01: rank 1 on \S+ has --lr 0.02; give all ranks the same$", said[0], re.M
    )
    assert "error" not in said[1] and not (tmp_path / "run").exists()


UNLIKE = """
import sys
from dataclasses import replace
from pathlib import Path
from fastnet.cli import run_command
from fastnet.config import sample
from fastnet.data.default import default_set
from fastnet.distributed.ranks import joined
from fastnet.errors import InputError
from fastnet.training.setup import check_alike

def main(argv):
    data, config = default_set(Path(argv[0])), sample("baseline")
    with joined(60, "cpu") as runtime:
        mine = lambda *values: values[runtime.rank]
        check_alike(replace(config, threads=mine(1, 2), weights=mine("a.pth", "b.pth")), data, runtime)
        flip = replace(config.augment, flip=mine(0.5, 0.25))
        for own in (replace(config, augment=flip), replace(config, seed=mine(0, 1))):
            try:
                check_alike(own, data, runtime)
            except InputError as error:
                print(error, file=sys.stderr)
        check_alike(config, replace(data, hash=mine(data.hash, "another")), runtime)

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_ranks_compare_settings_and_data(tiny_set: Path) -> None:
    ranks = start_ranks([[sys.executable, "-c", UNLIKE, str(tiny_set)]] * 2)
    said = [
        [line for line in rank.communicate(timeout=60)[1].splitlines() if not line.startswith("data: ")]
        for rank in ranks
    ]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    *settings, data = said[0]
    assert said[1] == settings
    for line, start in zip(settings, ("--flip 0.5: rank 1 on ", "--seed 0: rank 1 on "), strict=True):
        assert line.startswith(start) and line.endswith("; give all ranks the same")
    assert re.match(r"error: --data: rank 1 on \S+ has another set than rank 0 on \S+; prepare it once", data)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_run_directory_that_only_rank_0_sees(tiny_set: Path, tmp_path: Path) -> None:
    """Every rank has the result that rank 0 reads in it, and none fails at the end for want of it."""
    flags = ["--network", "baseline", "--max-steps", "6", "--json"]
    folders = [tmp_path / "seen", tmp_path / "elsewhere"]
    ranks = start_ranks([one_rank(tiny_set, folder, *flags) for folder in folders])
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert (folders[0] / "last.pt").exists() and not folders[1].exists()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_bad_image_is_named_by_the_rank_that_reads_it(tiny_set: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_set, tmp_path / "set")
    split, config = open_set(data).splits["train"], sample("baseline")
    share = step_share(len(split), 8, 0, 1, 2)  # of rank 1, of two, in the first step
    image = int(epoch_order(len(split), config.seed, 0)[share][0])
    file = data / "train.arrow"
    content, jpeg = file.read_bytes(), split.jpeg(image).tobytes()
    file.write_bytes(content.replace(jpeg, bytes(len(jpeg)), 1))
    ranks = start_ranks([one_rank(data, tmp_path / "run", "--network", "baseline")] * 2)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 2], said
    assert "error: rank 0: another rank is gone" in said[0]
    assert re.search(rf"^error: {re.escape(str(file))}: {re.escape(split.names[image])} ", said[1], re.M), (
        said
    )


def test_each_host_says_what_it_cannot_read(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the ranks meet, as rank 0 may have the file."""
    flags = ["--data", tiny_set, "--run-dir", tmp_path, "--config", tmp_path / "nowhere.toml"]
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "nowhere.toml: no such file" in refused(capsys, monkeypatch, *flags)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        run_command(train.main)
    assert "error" not in capsys.readouterr().err


BY_TIME = """
import sys
from dataclasses import replace
from pathlib import Path
from fastnet.config import sample
from fastnet.data.default import default_set
from fastnet.distributed.ranks import joined
from fastnet.training.trainer import Trainer

config = replace(sample("baseline"), image_size=32, batch_size=8, epochs=1, threads=1)
with joined(60, "cpu") as runtime:
    trainer = Trainer(config, default_set(Path(sys.argv[1])), Path(sys.argv[2]), runtime)
    trainer.resume()
    with trainer.resources():
        trainer.begin_phase()
        if runtime.is_main:
            trainer.schedule.last -= 300
        trainer.train_epoch()
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_two_ranks_save_by_the_clock_of_one(tiny_set: Path, tmp_path: Path) -> None:
    """After the step in which they agreed on it."""
    run = tmp_path / "run"
    run.mkdir()
    ranks = start_ranks([[sys.executable, "-c", BY_TIME, str(tiny_set), str(run)]] * 2)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert load(run / "last.pt").position.step == 2
