"""The table of runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from fastnet import runs as command
from fastnet.distributed import lock
from fastnet.distributed.lock import run_lock
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.training.events import read_events


def test_the_runs_below_a_directory(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/baseline", "b/lstm"):
        shutil.copytree(runs[name.startswith("b")], tmp_path / name)
    shutil.copytree(runs[0], tmp_path / "b" / "torn")
    (tmp_path / "b" / "torn" / "metrics.jsonl").write_text("{}\n")
    shutil.copytree(runs[0], tmp_path / ".hidden" / "run")
    (tmp_path / "b" / "no run").mkdir()
    with run_lock(tmp_path / "b" / "lstm", Runtime(torch.device("cpu"))):
        told = command.main([str(tmp_path)])["runs"]
    assert [Path(run["run"]).relative_to(tmp_path).as_posix() for run in told] == [
        "a/baseline",
        "b/lstm",
        "b/torn",
    ]
    assert [run["state"] for run in told] == ["done", "running", "damaged"]
    recorded = json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert told[0]["best_top1"] == recorded["val_top1"] and told[0]["network"] == "baseline"
    assert (told[0]["epochs"], told[0]["epochs_planned"]) == (1, 1)
    titles, first, _, torn = capsys.readouterr().out.splitlines()
    assert titles.split() == ["run", "network", "data", "best", "top-1", "epochs", "images/s", "state"]
    assert first.split()[1] == "baseline" and f"{recorded['val_top1']:.4f}" in first
    assert torn.split()[1:] == ["-", "-", "-", "-", "-", "damaged"]


def test_links_are_followed_once(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "disk" / "big")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "big").symlink_to(tmp_path / "disk" / "big")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    told = command.main([str(tmp_path / "runs")])["runs"]
    assert [run["run"] for run in told] == [str(tmp_path / "runs" / "big")]


def test_nothing_to_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)])["runs"] == []
    assert capsys.readouterr().out == f"{tmp_path}: no runs below it\n"
    with pytest.raises(InputError, match="nowhere: no such directory"):
        command.main([str(tmp_path / "nowhere")])


def test_a_holdout_is_not_val(runs: list[Path], tmp_path: Path) -> None:
    """Its scores are not beside those of other runs, only the look at val is."""
    run = shutil.copytree(runs[0], tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["holdout"] = 0.25
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert command.main([str(tmp_path)])["runs"][0]["best_top1"] is None
    scores = {"val_loss": 1.0, "val_top1": 0.375, "val_top5": 0.5, "val_count": 8}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "final", "step": 3, **scores}) + "\n")
    assert command.main([str(tmp_path)])["runs"][0]["best_top1"] == 0.375


def test_a_file_system_without_locks(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There nothing says that a run is being trained."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    shutil.copytree(runs[0], tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert command.main([str(tmp_path)])["runs"][0]["state"] == "done"


def test_a_look_at_a_run_does_not_keep_it_from_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.close(looking))
    lock.RunLock(tmp_path).release()


def test_a_line_that_is_being_written(runs: list[Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    whole = read_events(run / "metrics.jsonl")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epoch", "pha')
    assert read_events(run / "metrics.jsonl") == whole
    assert command.main([str(tmp_path)])["runs"][0]["state"] == "done"
