"""How the benchmarks time and record. Nothing here reads a clock."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import GpuWatch
from fastnet.errors import InputError

CPU = torch.device("cpu")
ROUNDS = 9


def test_turns_change_and_warmup_is_apart() -> None:
    calls: list[str] = []

    def called(name: str) -> harness.Candidate:
        def run(laps: harness.Laps) -> None:
            calls.append(name)
            laps("work")

        return run

    runs = {name: called(name) for name in "abc"}
    times = harness.alternate(runs, CPU, seconds=0, least=ROUNDS, before=lambda _: calls.append("."))
    assert calls[:3] == ["a", "b", "c"] and calls[3::2] == ["."] * 3 * ROUNDS
    order = "".join(calls[4::2])
    rounds = [order[at : at + 3] for at in range(0, len(order), 3)]
    blocks = [rounds[at : at + 3] for at in range(0, ROUNDS, 3)]
    assert all(set(place) == set("abc") for block in blocks for place in zip(*block, strict=True))
    assert len({block[0] for block in blocks}) > 1
    assert {name: len(laps["work"]) for name, laps in times.items()} == dict.fromkeys("abc", ROUNDS)


def test_laps_add_up() -> None:
    laps = harness.Laps(CPU)
    for name, moment in (("one", 0.25), ("two", 1.0)):
        laps.marks.append((name, laps.marks[0][1] + moment))
    assert laps.milliseconds() == pytest.approx({"one": 250, "two": 750, "total": 1000})


def test_a_results_folder_that_cannot_be_made_is_said_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "QUICK", tmp_path / "file")
    harness.QUICK.touch()
    with pytest.raises(InputError, match=r"file/.*cannot be made"):
        harness.Table("lstm", quick=True)


def test_rows_say_what_they_belong_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "QUICK", tmp_path)
    table = harness.Table("lstm", quick=True)
    table.add({"batch": 4}, "slow", "total", "ms", np.array([10.0, 20.0, 30.0]))
    table.add({"batch": 4}, "fast", "total", "ms", np.array([5.0, 5.0, 5.0]))
    table.add({"batch": 8}, "slow", "total", "images/s", [10.0])
    table.add({"batch": 8}, "fast", "total", "images/s", [40.0])
    table.note({"batch": 4}, "absent", "not run: no GPU here")
    harness.mark_ratios(table.rows, "slow", ("batch", "quantity"))
    rows = harness.read_csv(table.write())
    assert (rows[0]["p20"], rows[0]["p50"], rows[0]["p80"], rows[0]["n"]) == ("14", "20", "26", "3")
    assert [row["ratio"] for row in rows] == ["1.000", "4.000", "1.000", "4.000", ""]
    assert rows[4]["note"] == "not run: no GPU here" and rows[4]["p50"] == ""
    for key in (
        "torch",
        "triton",
        "dali",
        "git",
        "machine",
        "date",
        "load_1_min",
        "clocks.sm",
        "driver_version",
    ):
        assert key in rows[0]


SMI = """#!/bin/sh
echo "$@" >"$SMI_CALLS"
printf '1980, 2619, 310.5, 61, 580.95\\n1500, 2619, 350.5, 63, 580.95\\n1995, 2619, 300.5, 62, 580.95\\n1980, 26'
exec sleep 60
"""


def test_a_gpu_is_watched_while_it_works_by_the_id_of_the_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of nvidia-smi a script that samples three times, and is stopped within a line."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SMI_CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid="9f3c"))
    with GpuWatch() as gpu:
        assert gpu.state == {}
    assert list(gpu.state.values()) == ["1980", "2619", "310.5", "62", "580.95"]
    assert "--id=GPU-9f3c" in (tmp_path / "calls").read_text().split()


def test_without_a_gpu_nothing_is_watched() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with GpuWatch() as gpu:
        pass
    assert gpu.state == {}
