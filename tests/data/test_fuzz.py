"""The fuzzer on a few inputs of each reader, the same ones every time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import REPOSITORY

# The readers that use one of their five inputs, at least.
USED = {"jpeg", "text", "arrow", "raw", "checkpoint", "weights", "safetensors", "records"}


@pytest.mark.long
@pytest.mark.slow
def test_a_few_mutated_inputs_of_each_reader() -> None:
    line = [sys.executable, "-m", "tests.trials.fuzz", "--quick"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()
    used = {row.split()[0] for row in rows if "'used': 0," not in row}
    assert len(rows) == 13 and used >= USED
