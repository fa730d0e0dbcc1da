"""The CUDA path on softgpu: each group of checks in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.softgpu.process import needs_compiler, run_python

CHECKS = Path(__file__).with_name("checks")
# The checks of each group and softgpu's options.
GROUPS = {
    "lstm": (["check_training.py", "-k", "lstm"], []),
    "baseline": (["check_training.py", "-k", "not lstm"], []),
    "commands": (["check_commands.py"], []),
    "kernels": (["check_kernels.py"], []),
    "budgets": (["check_budgets.py"], ["--operators", "null", "--triton", "null"]),
    "graphs": (["check_graphs.py"], []),
    "device": (["check_device.py"], ["--devices", "2", "--memory-mb", "512"]),
}


@needs_compiler
@pytest.mark.parametrize("group", GROUPS)
def test_group(group: str) -> None:
    (file, *chosen), options = GROUPS[group]
    inside = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    run_python(["-m", "softgpu", *options, *inside, str(CHECKS / file), *chosen])
