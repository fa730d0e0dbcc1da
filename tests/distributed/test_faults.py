"""What a run survives: killed and frozen ranks, a restart while the old rank 0 hangs, saves under way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastnet.config import Config, sample
from fastnet.distributed.launch import launch_command
from fastnet.distributed.lock import RunLock
from fastnet.errors import InputError
from fastnet.training import checkpoint
from fastnet.training.checkpoint import Schedule, Writer, load
from tests.support.paths import SCRIPT
from tests.support.ranks import start_ranks
from tests.support.runs import children, events, wait_for_step
from tests.support.tiny import STEPS, TINY, run_ranks

JOB = "TORCHELASTIC_RUN_ID"


def ranks_by_hand(data: Path, run: Path, *flags: str, hosts: int = 1) -> list[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT), *TINY, "--data", str(data), "--run-dir", str(run), *flags]
    return start_ranks([command, command], hosts=hosts)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSTOP],
    ids=["killed", "frozen"],
)
def test_a_lost_rank_ends_the_other_in_time(
    number: signal.Signals, victim: int, tiny_set: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks = ranks_by_hand(tiny_set, run, "--timeout", "5", "--checkpoint-every", "3")
    wait_for_step(ranks[0], run, 4)
    ranks[victim].send_signal(number)
    try:
        _, said = ranks[1 - victim].communicate(timeout=60)
    finally:
        ranks[victim].kill()
    ranks[victim].communicate()
    assert ranks[1 - victim].returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert f"rank {1 - victim}: another rank is gone or did not answer within --timeout 5 s" in line
    assert "Traceback" not in said
    if (number, victim) == (signal.SIGSTOP, 0):
        done = run_ranks(2, tiny_set, run)
        assert done.returncode == 0, done.stderr
        assert load(run / "last.pt").position.step == STEPS
        assert [epoch["train_count"] for epoch in events(run, "epoch")] == [40] * 4


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_torchrun_starts_ranks_again_that_were_killed(tiny_set: Path, tmp_path: Path) -> None:
    """Twice: torchrun keeps its store, and the new ranks must not take the addresses of dead ones from it."""
    run = tmp_path / "run"
    flags = [*TINY, "--data", tiny_set, "--run-dir", run, "--checkpoint-every", 3, "--timeout", 20]
    with subprocess.Popen(
        launch_command(SCRIPT, flags, ranks=2, options=["--standalone", "--max-restarts=2"]),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for step in (STEPS // 3, 2 * STEPS // 3):
            wait_for_step(process, run, step)
            os.kill(children(process.pid)[1], signal.SIGKILL)
        _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert [event["step"] for event in events(run, "step")] == list(range(2, STEPS + 1, 2))
    assert len(json.loads((run / "manifest.json").read_text())["sessions"]) == 3


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("hosts", "code"), [pytest.param(1, 0, marks=pytest.mark.long), (2, 1)])
def test_a_host_that_was_not_told_to_stop_does_not_call_it_done(
    hosts: int, code: int, tiny_set: Path, tmp_path: Path
) -> None:
    """SIGTERM reaches one of two ranks; both stop after the same step, and what they stopped at is saved."""
    run = tmp_path / "run"
    ranks = ranks_by_hand(tiny_set, run, hosts=hosts)
    wait_for_step(ranks[0], run, 4)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code, 0]
    lines = [line for line in said[0].splitlines() if line.startswith("error:")]
    stopped = load(run / "last.pt").position.step
    assert lines == (
        [
            f"error: rank 0: stopped after step {stopped}, all saved, since another host was asked to; "
            "start again to continue"
        ]
        if code
        else []
    )


def test_a_restart_of_the_same_job_takes_the_run_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    monkeypatch.setenv(JOB, "job-7")
    frozen = RunLock(tmp_path)
    checkpoint.save(path, {"step": 1}, best=False, lock=frozen)
    restarted = RunLock(tmp_path)
    checkpoint.save(path, {"step": 2}, best=False, lock=restarted)
    with pytest.raises(InputError, match="taken over by a restart"):
        checkpoint.save(path, {"step": 1}, best=True, lock=frozen)
    assert torch.load(path)["step"] == 2 and not (tmp_path / "best.pt").exists()
    monkeypatch.setenv(JOB, "job-8")
    with pytest.raises(InputError, match="another process is training there"):
        RunLock(tmp_path)
    monkeypatch.delenv(JOB)
    with pytest.raises(InputError, match="another process is training there"):
        RunLock(tmp_path)
    frozen.release()
    restarted.release()
    RunLock(tmp_path).release()


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    weights, go = torch.zeros(3), threading.Event()
    with Writer(tmp_path / "last.pt", None) as writer:
        writer.pool.submit(go.wait)
        writer.save({"model": {"w": weights}, "optimizer": [weights]}, best=False)
        weights += 1
        go.set()
    saved = torch.load(tmp_path / "last.pt")
    assert saved["model"]["w"].tolist() == saved["optimizer"][0].tolist() == [0, 0, 0]


def test_a_failed_save_is_said_by_the_next(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.touch()
    with Writer(occupied / "last.pt", None) as writer:
        writer.save({}, best=False)
        with pytest.raises(InputError, match="cannot be written"):
            writer.save({}, best=False)
        writer.finish()


def test_when_a_checkpoint_is_due() -> None:
    def schedule(every: str) -> Schedule:
        return Schedule(replace(sample("lstm"), checkpoint_every=every))

    by_steps, by_time = schedule("3"), schedule("5m")
    by_steps.last -= 1e6
    assert [by_steps.after_steps(step) for step in (1, 2, 3, 6)] == [False, False, True, True]
    assert not by_steps.after_time() and not by_time.after_steps(300)
    by_time.last -= 299
    assert not by_time.after_time()
    by_time.last -= 2
    assert by_time.after_time() and not by_time.after_time()


@pytest.mark.parametrize(
    ("every", "interval"), [("1", (1, 0)), ("500", (500, 0)), ("30s", (0, 30)), ("2h", (0, 7200))]
)
def test_checkpoint_intervals(every: str, interval: tuple[int, float]) -> None:
    assert Config(checkpoint_every=every).checkpoint_interval == interval


@pytest.mark.parametrize("every", ["0", "0s", "-1", "5 m", "m", "1.5m", "5d", ""])
def test_bad_checkpoint_intervals(every: str) -> None:
    with pytest.raises(InputError, match=r"--checkpoint-every .*give steps, or a time such as 30s"):
        Config(checkpoint_every=every)
