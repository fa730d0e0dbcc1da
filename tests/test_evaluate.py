"""The evaluate command: the numbers that training recorded, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnet import evaluate
from fastnet.data.prepared import open_set
from fastnet.errors import InputError
from tests.support.tiny import refused


@pytest.mark.parametrize("batch_size", [3, 128])
def test_evaluate_repeats_what_training_measured(tiny_set: Path, runs: list[Path], batch_size: int) -> None:
    for run in runs:
        recorded = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert recorded["event"] == "epoch"
        flags = ["--checkpoint", "last", "--batch-size", str(batch_size)]
        result = evaluate.main([str(run), "--data", str(tiny_set), *flags])
        assert result["count"] == 10
        assert (result["top1"], result["top5"]) == (recorded["val_top1"], recorded["val_top5"])
        assert result["correct1"] == round(10 * recorded["val_top1"])
        # Both round logits below 2^5 and their exponentials to 24 bits, and sum them in another order.
        assert result["loss"] == pytest.approx(recorded["val_loss"], abs=8 * 2**5 * 2**-24)


def test_the_checkpoint_is_the_one_that_is_named(tiny_set: Path, runs: list[Path], tmp_path: Path) -> None:
    """After one epoch both are the same, so one is changed: it gives every image the first class."""
    run = shutil.copytree(runs[0], tmp_path / "run")
    content = torch.load(run / "best.pt", weights_only=True)
    content["model"]["classifier.bias"] = torch.tensor([100.0, 0.0, 0.0])
    torch.save(content, run / "best.pt")
    first = (open_set(tiny_set).splits["val"].labels == 0).mean()
    losses = {}
    for which in ("best", "last"):
        result = evaluate.main([str(run), "--data", str(tiny_set), "--checkpoint", which])
        losses[which] = result["loss"]
        assert which == "last" or result["top1"] == pytest.approx(first)
    assert losses["best"] > 10 + losses["last"]


@pytest.mark.slow
def test_evaluate_as_a_command_prints_json_last(tiny_set: Path, runs: list[Path]) -> None:
    command = [sys.executable, "-m", "fastnet.evaluate", str(runs[0]), "--data", str(tiny_set), "--json"]
    done = subprocess.run([*command, "--split", "train"], capture_output=True, text=True, check=True)
    line, last = done.stdout.splitlines()
    assert line.startswith("baseline (best, step 3) on 42 train images: top-1 ")
    assert json.loads(last)["count"] == 42


def test_split_without_labels_is_refused(tiny_set: Path, runs: list[Path]) -> None:
    with pytest.raises(InputError, match="set: its test split has no labels"):
        evaluate.main([str(runs[0]), "--data", str(tiny_set), "--split", "test"])


def test_bad_values_are_named(tiny_set: Path, set_without_test_split: Path, runs: list[Path]) -> None:
    run = str(runs[0])
    with pytest.raises(InputError, match="--batch-size"):
        evaluate.main([run, "--data", str(tiny_set), "--batch-size", "0"])
    with pytest.raises(InputError, match="set: has no test split; choose one of train, val"):
        evaluate.main([run, "--data", str(set_without_test_split), "--split", "test"])


def test_without_data_it_takes_the_set_of_the_run(
    tiny_set: Path, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = evaluate.main([str(runs[0]), "--data", str(tiny_set)])
    capsys.readouterr()
    assert evaluate.main([str(runs[0])]) == expected
    assert f"data: {tiny_set} (that of {runs[0]})" in capsys.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(runs[0], moved)
    text = (moved / "manifest.json").read_text().replace(str(tiny_set), str(tmp_path / "gone"))
    (moved / "manifest.json").write_text(text)
    with pytest.raises(
        InputError, match=r"moved: was trained on .*gone, which is not there; give the set with --data"
    ):
        evaluate.main([str(moved)])


def test_a_set_that_has_taken_the_place_of_the_runs_is_refused(
    tiny_set: Path, set_without_test_split: Path, runs: list[Path], tmp_path: Path
) -> None:
    """Its val split may have images that the run was trained on."""
    run = shutil.copytree(runs[0], tmp_path / "run")
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(tiny_set), str(set_without_test_split)))
    with pytest.raises(InputError, match=r"run: was trained on another set than the one that is at .* now"):
        evaluate.main([str(run)])


def test_another_set_is_said(
    set_without_test_split: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(runs[0]), "--data", str(set_without_test_split)])
    assert "baseline: was trained on another set than" in capsys.readouterr().err


def test_a_name_that_is_too_long(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file system refuses is one line."""
    refused(capsys, monkeypatch, tmp_path / ("x" * 300), "--data", tiny_set, main=evaluate.main)


@pytest.mark.long
@pytest.mark.slow
def test_a_name_that_is_no_text(tiny_set: Path, runs: list[Path], tmp_path: Path) -> None:
    """It is shown with escapes."""
    run = shutil.copytree(runs[0], tmp_path / os.fsdecode(b"caf\xe9"))
    command = [sys.executable, "-m", "fastnet.evaluate", str(run), "--data", str(tiny_set)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONUTF8": "1"}
    )
    assert done.returncode == 0 and done.stdout.startswith("caf\\udce9 (best"), done.stderr
