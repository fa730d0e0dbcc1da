"""train.py at a tiny size, in this process or as a command on one or several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fastnet import train
from fastnet.cli import run_command
from fastnet.distributed.launch import launch_command
from tests.support.paths import SCRIPT
from tests.support.runs import wait_for_step

# Two phases of two epochs, five steps each: 42 images in batches of 8.
FLAGS = "--network lstm --image-size 32 --batch-size 8 --head-epochs 2 --epochs 2 --log-every 2 --threads 1"
TINY = ["sample", *FLAGS.split()]
STEPS = 20


def run_here(data: Path, run: Path, *flags: str) -> dict[str, Any]:
    return train.main([*TINY, "--data", str(data), "--run-dir", str(run), *flags])


def command(ranks: int, data: Path, run: Path, *flags: str) -> list[str]:
    return launch_command(SCRIPT, [*TINY, "--data", data, "--run-dir", run, *flags], ranks=ranks)


def run_ranks(ranks: int, data: Path, run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(ranks, data, run, *flags), capture_output=True, text=True, timeout=240)


def refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *flags: object,
    main: Callable[[Sequence[str]], dict[str, Any]] = train.main,
) -> str:
    """Runs a command, train.py if none is given, with bad input in this process: one line on stderr, exit code 2; the
    line."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith(("data: ", "uses: "))
    ]
    assert lines[-1].startswith("error: ") and sum("error" in line for line in lines) == 1, lines
    return lines[-1]


def kill_again_and_again(ranks: int, data: Path, run: Path, targets: list[int]) -> None:
    """Kills the run without warning as soon as it has recorded each of the given steps, then lets it end."""
    for target in targets:
        with subprocess.Popen(
            command(ranks, data, run, "--checkpoint-every", "3"),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            wait_for_step(process, run, target)
            os.killpg(process.pid, signal.SIGKILL)
    done = run_ranks(ranks, data, run, "--checkpoint-every", "3")
    assert done.returncode == 0, done.stderr
