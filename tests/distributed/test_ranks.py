"""Two ranks: which of them is first, and how they end when memory runs out."""

from __future__ import annotations

import sys

import pytest

from tests.support.ranks import start_ranks

CODE = """
import sys
import torch
from fastnet.cli import run_command
from fastnet.distributed.memory import memory_for
from fastnet.distributed.ranks import joined

def main(argv):
    with joined(30, "cpu") as runtime:
        first = [runtime.is_first_with(key) for key in ("same", f"own of {runtime.rank}")]
        print(f"first: {runtime.rank} {first}", file=sys.stderr)
        with memory_for(f"rank {runtime.rank}: all of it", runtime.device, "take less"):
            torch.empty(1 << 50)

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_memory_that_runs_out_on_all_ranks_is_told_once() -> None:
    ranks = start_ranks([[sys.executable, "-c", CODE]] * 2)
    said = [line for rank in ranks for line in rank.communicate(timeout=60)[1].splitlines()]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    (line,) = [line for line in said if line.startswith("error: ")]
    assert ": all of it: out of memory on this machine" in line and line.endswith("; take less")
    assert not any("Traceback" in line for line in said)
    assert sorted(line for line in said if line.startswith("first: ")) == [
        "first: 0 [True, True]",
        "first: 1 [False, True]",
    ]
