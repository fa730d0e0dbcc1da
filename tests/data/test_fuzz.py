"""The fuzzer on a few inputs of each reader, the same ones every time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import REPOSITORY


@pytest.mark.long
@pytest.mark.slow
def test_a_few_mutated_inputs_of_each_reader() -> None:
    line = [sys.executable, "-m", "tests.trials.fuzz", "--quick"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()
    assert len(rows) == 13 and any("'used': 0" not in row for row in rows)
