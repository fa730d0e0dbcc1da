"""Whole runs of one process at a tiny size: records and exact continuation."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastnet import evaluate
from fastnet.config import sample
from fastnet.data.default import default_set
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input.jpegs import jpeg_decoder
from fastnet.metrics import Totals
from fastnet.training.checkpoint import load
from fastnet.training.manifest import read_manifest
from fastnet.training.trainer import Trainer
from tests.support.runs import TIMES, assert_same_end, events, wait_for_step
from tests.support.tiny import STEPS, command, kill_again_and_again, run_here


def test_records(whole: Path) -> None:
    assert [(e["phase"], e["step"]) for e in events(whole, "phase")] == [("head", 0), ("full", 10)]
    epochs = events(whole, "epoch")
    assert [(e["phase"], e["epoch"], e["step"]) for e in epochs] == [
        ("head", 0, 5),
        ("head", 1, 10),
        ("full", 2, 15),
        ("full", 3, 20),
    ]
    assert all(e["val_count"] == 10 for e in epochs)
    assert {"train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr"} <= epochs[0].keys()
    assert [e["step"] for e in events(whole, "step")] == list(range(2, 21, 2))
    timed = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(timed[key] >= 0 for key in TIMES) and 0 <= timed["data_wait"] <= 1

    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["config"]["network"] == "lstm" and len(manifest["data"]["hash"]) == 64
    (session,) = manifest["sessions"]
    assert session["lstm_backend"] == "torch" and session["decode"] == "cpu" and session["ranks"] == 1
    assert session["jpeg_decoder"] == jpeg_decoder()
    assert session["versions"]["torch"] == torch.__version__.split("+")[0] and session["from_step"] == 0
    assert list((whole / "tensorboard").iterdir())


def test_frozen_phase_leaves_the_convolutions_to_the_bit(whole: Path, tiny_set: Path, tmp_path: Path) -> None:
    run_here(tiny_set, tmp_path / "one", "--max-steps", "1")
    run_here(tiny_set, tmp_path / "head", "--max-steps", "10")
    start, frozen, end = (load(run / "last.pt").model for run in (tmp_path / "one", tmp_path / "head", whole))
    backbone = [name for name in start if name.startswith("backbone.")]
    assert all(torch.equal(start[name], frozen[name]) for name in backbone)
    assert not any(torch.equal(start[n], frozen[n]) for n in start if n not in backbone)
    assert not any(torch.equal(frozen[n], end[n]) for n in backbone if n.endswith("weight"))


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[3, 13], [5, 10, 15], [9, 12]], ids=["mid-epoch", "between", "both"])
def test_stopped_runs_continue_to_the_bit(
    stops: list[int], whole: Path, tiny_set: Path, tmp_path: Path
) -> None:
    for stop in stops:
        assert not run_here(tiny_set, tmp_path / "run", "--max-steps", str(stop))["done"]
    assert run_here(tiny_set, tmp_path / "run")["done"]
    assert_same_end(tmp_path / "run", whole)
    sessions = json.loads((tmp_path / "run" / "manifest.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, *stops]


def test_a_finished_run_is_left_alone(whole: Path, tiny_set: Path) -> None:
    before = (whole / "last.pt").stat().st_mtime_ns
    assert run_here(tiny_set, whole)["done"]
    assert (whole / "last.pt").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_saves_and_the_same_command_continues(
    number: signal.Signals, whole: Path, tiny_set: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(command(1, tiny_set, run), stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, run, 4 if number == signal.SIGTERM else 12)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert "all saved; the same command continues" in said
    assert not load(run / "last.pt").position.done
    run_here(tiny_set, run)
    assert_same_end(run, whole)


@pytest.mark.slow
def test_killed_runs_continue_to_the_bit(whole: Path, tiny_set: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    in_each_phase = [draw.randrange(2, 10), draw.randrange(11, STEPS)]
    kill_again_and_again(1, tiny_set, tmp_path / "run", in_each_phase)
    assert_same_end(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob(".*.*"))


def test_what_may_change_when_a_run_continues(tiny_set: Path, tmp_path: Path, whole: Path) -> None:
    """How often it records changes no result, and naming the stages in another order is no other network."""
    run_here(tiny_set, tmp_path / "run", "--max-steps", "3", "--stages", "conv5,conv4")
    assert run_here(tiny_set, tmp_path / "run", "--log-every", "7", "--stages", "conv4,conv5")["done"]
    continued, straight = (load(run / "last.pt").model for run in (tmp_path / "run", whole))
    assert all(torch.equal(continued[name], straight[name]) for name in straight)


def test_label_smoothing_trains_and_is_not_in_the_recorded_loss(tiny_set: Path, tmp_path: Path) -> None:
    """The first step's loss is of the same weights; the update is not the same."""
    for smoothing in ("0", "0.5"):
        run_here(
            tiny_set,
            tmp_path / smoothing,
            "--label-smoothing",
            smoothing,
            "--max-steps",
            "1",
            "--log-every",
            "1",
        )
    plain, smooth = (tmp_path / "0", tmp_path / "0.5")
    assert events(plain, "step") == events(smooth, "step")
    name = "classifier.weight"
    assert not torch.equal(load(plain / "last.pt").model[name], load(smooth / "last.pt").model[name])


def test_a_step_line_is_of_the_steps_since_the_line_before(
    whole: Path, tiny_set: Path, tmp_path: Path
) -> None:
    """Or since the epoch began. Sums of losses are exact, and batches of eight divide them exactly."""
    run_here(tiny_set, tmp_path / "run", "--max-steps", "6", "--log-every", "1")
    each = [event["train_loss"] for event in events(tmp_path / "run", "step")]
    two, four, six = (event["train_loss"] for event in events(whole, "step")[:3])
    assert [two, four] == [sum(each[:2]) / 2, sum(each[2:4]) / 2]
    assert six == each[5]  # an epoch has five steps


def test_best_is_the_first_epoch_with_the_highest_top1(tiny_set: Path, tmp_path: Path) -> None:
    config = replace(sample("baseline"), image_size=32, batch_size=14, epochs=4)
    made = Trainer(config, default_set(tiny_set), tmp_path / "run", Runtime(torch.device("cpu")))
    made.resume()
    with made.resources():
        for hits in (2, 5, 5, 3):
            made.begin_phase()
            made.train_epoch()
            made.end_epoch(made.epoch_record(), Totals(images=10, correct1=hits))
    saved = {name: load(tmp_path / "run" / name).position for name in ("best.pt", "last.pt")}
    assert (saved["best.pt"].step, saved["last.pt"].step, saved["last.pt"].best_top1) == (6, 12, 0.5)


def test_a_checkpoint_after_five_minutes(tiny_set: Path, tmp_path: Path) -> None:
    """The default, besides those at the ends of epochs."""
    config = replace(sample("baseline"), image_size=32, batch_size=14, epochs=1)
    made = Trainer(config, default_set(tiny_set), tmp_path / "run", Runtime(torch.device("cpu")))
    made.resume()
    with made.resources():
        made.begin_phase()
        made.schedule.last -= 300
        made.train_epoch()
    assert made.state.step == 3 and load(tmp_path / "run" / "last.pt").position.step == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_both_phases_train_on_a_gpu(backend: str, precision: str, tiny_set: Path, tmp_path: Path) -> None:
    flags = ["--precision", precision, "--backend", backend, "--head-epochs", "1", "--epochs", "1"]
    assert run_here(tiny_set, tmp_path / "run", *flags)["done"]
    assert run_here(tiny_set, tmp_path / "stopped", *flags, "--max-steps", "3")["step"] == 3
    assert run_here(tiny_set, tmp_path / "stopped", *flags)["done"]


def test_paths_that_are_no_text(tiny_set: Path, tmp_path: Path) -> None:
    """They are recorded with escapes, under which the set is not found again."""
    own = shutil.copytree(tiny_set, tmp_path / os.fsdecode(b"caf\xe9"))
    run_here(own, tmp_path / "run", "--max-steps", "1")
    run_here(own, tmp_path / "run", "--max-steps", "2")
    assert read_manifest(tmp_path / "run").data["path"] == str(tmp_path / "caf\\xe9")
    with pytest.raises(InputError, match=r"caf\\xe9, which is not there; give the set with --data"):
        evaluate.main([str(tmp_path / "run")])
    weights = tmp_path / os.fsdecode(b"\xe9.pt")
    shutil.copy(tmp_path / "run" / "last.pt", weights)
    run_here(own, tmp_path / "again", "--weights", str(weights), "--max-steps", "1")
    run_here(own, tmp_path / "again", "--weights", str(weights), "--max-steps", "2")
    assert read_manifest(tmp_path / "again").config["weights"] == str(tmp_path / "\\xe9.pt")
