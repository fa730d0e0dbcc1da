"""The profiled window of a run: which ranges its trace holds, how often, and one inside the other."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fastnet import train
from fastnet.distributed.launch import launch_command
from fastnet.errors import InputError
from fastnet.training.checkpoint import load
from tests.support.paths import SCRIPT
from tests.support.ranks import start_ranks

FLAGS = "sample --network lstm --image-size 32 --batch-size 8 --epochs 1 --head-epochs 0 --threads 1"
RANGES = ("data", "forward", "backbone", "lstm", "backward", "optimizer")


def ranges(trace: Path) -> dict[str, list[dict[str, Any]]]:
    """The project's own ranges in a Chrome trace, by name, in order of time."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    found: dict[str, list[dict[str, Any]]] = {}
    for event in sorted(events, key=lambda e: e["ts"]):
        found.setdefault(event["name"], []).append(event)
    return found


def inside(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


def test_trace_of_a_window(tiny_set: Path, tmp_path: Path) -> None:
    """Two of four steps: every range twice, in a step's order, the network's parts inside the forward."""
    given = ["--data", str(tiny_set), "--run-dir", str(tmp_path / "run")]
    train.main([*FLAGS.split(), *given, "--profile-steps", "1:3", "--max-steps", "4"])
    found = ranges(tmp_path / "run" / "trace-rank0.json")
    assert {name: len(found[name]) for name in RANGES} == dict.fromkeys(RANGES, 2)
    for step in range(2):
        order = [found[name][step]["ts"] for name in ("data", "forward", "backward", "optimizer")]
        assert order == sorted(order)
        for part in ("backbone", "lstm"):
            assert inside(found[part][step], found["forward"][step])
    # Continued behind its window, or without one, the run writes no trace.
    (tmp_path / "run" / "trace-rank0.json").unlink()
    train.main([*FLAGS.split(), *given, "--max-steps", "5"])
    assert not (tmp_path / "run" / "trace-rank0.json").exists()
    assert load(tmp_path / "run" / "last.pt").position.step == 5


def test_a_window_that_the_run_ends_in(tiny_set: Path, tmp_path: Path) -> None:
    given = ["--data", str(tiny_set), "--run-dir", str(tmp_path / "run")]
    train.main([*FLAGS.split(), *given, "--profile-steps", "1:9", "--max-steps", "2"])
    assert len(ranges(tmp_path / "run" / "trace-rank0.json")["optimizer"]) == 1


def test_a_trace_that_cannot_be_written(tiny_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "trace-rank0.json").mkdir(parents=True)
    given = ["--data", str(tiny_set), "--run-dir", str(run)]
    with pytest.raises(InputError, match=r"trace-rank0\.json: is no file"):
        train.main([*FLAGS.split(), *given, "--profile-steps", "0:1", "--max-steps", "2"])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_trace_that_one_rank_cannot_write_at_the_end(tiny_set: Path, tmp_path: Path) -> None:
    """All is saved by then; both ranks end alike, and rank 0 says why."""
    run = tmp_path / "run"
    (run / "trace-rank1.json").mkdir(parents=True)
    given = ["--data", tiny_set, "--run-dir", run, "--profile-steps", "1:9", "--max-steps", 2]
    ranks = start_ranks([launch_command(SCRIPT, [*FLAGS.split(), *given], ranks=1)] * 2)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert re.search(r"^error: .*trace-rank1\.json: is no file", said[0], re.M)
    assert load(run / "last.pt").position.step == 2


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_file_per_rank(tiny_set: Path, tmp_path: Path) -> None:
    """With two ranks each writes its own, and the gradients' all-reduce shows."""
    given = ["--data", tiny_set, "--run-dir", tmp_path / "run", "--profile-steps", "1:2", "--max-steps", 2]
    line = launch_command(SCRIPT, [*FLAGS.split(), *given], ranks=2)
    done = subprocess.run(line, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        trace = tmp_path / "run" / f"trace-rank{rank}.json"
        assert len(ranges(trace)["backward"]) == 1
        names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
        assert any("all_reduce" in name or "allreduce" in name for name in names), sorted(names)
