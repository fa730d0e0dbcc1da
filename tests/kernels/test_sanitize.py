"""kernels/sanitize.sh, which needs a GPU, chooses tests that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from tests.support.paths import REPOSITORY


@pytest.mark.long
@pytest.mark.slow
def test_the_tests_it_runs_are_there() -> None:
    script = (REPOSITORY / "kernels" / "sanitize.sh").read_text()
    command = re.search(r"-m pytest (.*?)\ndone", script.replace("\\\n", " "), re.DOTALL)
    assert command
    words = [sys.executable, "-m", "pytest", *shlex.split(command[1]), "--collect-only", "-q"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # Three hidden sizes in two dtypes, by small batches and large ones.
    assert "test_gpu.py: 12" in done.stdout, done.stdout
