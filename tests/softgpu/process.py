"""Starts Python programs on softgpu, in processes of their own: its GPUs cannot be taken back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tests.support.paths import REPOSITORY

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler"
)


PATH = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])


def run_python(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs `python COMMAND` in the repository, with one thread, and fails with its output unless it exits with 0."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=580,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done
