"""Two ranks under torchrun: the same steps as one, killed, stopped, and refused together."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnet.training.checkpoint import load
from tests.support.ranks import start_ranks
from tests.support.runs import assert_same_end, events, wait_for_step
from tests.support.tiny import STEPS, command, kill_again_and_again, run_here, run_ranks


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
def test_a_signal_stops_two_ranks_after_the_same_step(
    whole_on_two: Path, tiny_set: Path, tmp_path: Path
) -> None:
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
    assert run_ranks(1, tiny_set, run).returncode == 0
    assert [e["step"] for e in events(run, "step")] == [e["step"] for e in events(whole_on_two, "step")]
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
