"""The CUDA path on softgpu: each group of checks in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.softgpu.process import needs_compiler, run_python

CHECKS = Path(__file__).with_name("checks")
# The checks of each group and softgpu's options; the groups that take long come first.
GROUPS = {
    "steps": (["check_training.py", "-k", "bf16"], []),
    "steps in other types": (["check_training.py", "-k", "not bf16"], []),
    "kernels": (["check_kernels.py"], []),
    "compiled": (["check_compiled.py", "-k", "captured"], []),
    "commands": (["check_commands.py", "-k", "not deterministic"], []),
    "deterministic": (["check_commands.py", "-k", "deterministic"], []),
    "graphs": (["check_graphs.py"], []),
    "capture": (["check_capture.py", "-k", "recipe or waits or batch"], []),
    "more of capture": (
        ["check_capture.py", "-k", "not executed and not recipe and not waits and not batch"],
        [],
    ),
    "executed in a graph": (["check_capture.py", "-k", "executed"], []),
    "doctor": (["check_doctor.py"], ["--devices", "2"]),
    "apex": (["check_apex.py"], []),
    "budgets": (["check_budgets.py"], ["--operators", "null", "--triton", "null"]),
    "images": (["check_images.py"], ["--memory-mb", "512"]),
    "accumulation": (["check_accumulation.py"], ["--memory-mb", "64"]),
    "hopper": (
        ["check_compiled.py", "-k", "hopper"],
        ["--operators", "null", "--triton", "null", "--capability", "90"],
    ),
    "device": (["check_device.py"], ["--devices", "2", "--memory-mb", "512"]),
}


LONG = {"compiled", "executed in a graph", "deterministic", "images", "doctor", "apex", "hopper"}
LONG |= {"kernels", "commands", "steps in other types", "more of capture", "accumulation", "graphs"}


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in GROUPS]
)
def test_group(group: str) -> None:
    (file, *chosen), options = GROUPS[group]
    inside = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    run_python(["-m", "softgpu", *options, *inside, str(CHECKS / file), *chosen])


@needs_compiler
def test_report(tmp_path: Path) -> None:
    """A script by its path, and what it asked of CUDA at its end."""
    script = tmp_path / "script.py"
    script.write_text("import torch\nprint(torch.ones(3, device='cuda').sum().item())\n")
    done = run_python(["-m", "softgpu", "--report", str(script)])
    assert done.stdout == "3.0\n"
    assert "'waits': 1" in done.stderr and "softgpu: 2 operators" in done.stderr
