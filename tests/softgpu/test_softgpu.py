"""The CUDA path on softgpu. Each group of checks runs in a process of its own: the GPUs cannot be taken back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

CHECKS = Path(__file__).with_name("checks")
# The checks of each group and softgpu's options. Groups of like length, as two of them run at a time.
GROUPS = {
    "device": (["check_device.py"], ["--devices", "2", "--memory-mb", "512"]),
    "graphs": (["check_graphs.py"], []),
    "budgets": (["check_budgets.py"], ["--operators", "null", "--triton", "null"]),
    "commands": (["check_commands.py"], []),
    "kernels": (["check_kernels.py"], []),
    "baseline": (["check_training.py", "-k", "not lstm"], []),
    "lstm": (["check_training.py", "-k", "lstm"], []),
}


def softgpu(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "softgpu", *command],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(
    not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler"
)
@pytest.mark.parametrize("group", GROUPS)
def test_group(group: str) -> None:
    (file, *chosen), options = GROUPS[group]
    done = softgpu(
        *options,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=short",
        str(CHECKS / file),
        *chosen,
    )
    assert done.returncode == 0, done.stdout + done.stderr
