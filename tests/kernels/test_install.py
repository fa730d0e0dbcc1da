"""kernels/ installed by itself: it brings what it needs, and neither fastnet nor DALI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

PROGRAM = """
import sys
sys.modules["nvidia.dali"] = None  # to import it is an error
import torch
import fastnet_kernels, ptxrun
from fastnet_kernels import ChannelGroupLSTM

lstm = ChannelGroupLSTM([(2, 3, 4)])
y = lstm([torch.randn(5, 6, 2, 2)])
y.sum().backward()
assert y.shape == (5, 8) and lstm.backend_used == "torch"
assert all(p.grad is not None for p in lstm.parameters())
assert "fastnet" not in sys.modules
print(fastnet_kernels.__file__, ptxrun.__file__)
"""


@pytest.mark.long
@pytest.mark.slow
def test_kernels_alone(tmp_path: Path) -> None:
    """pip install ./kernels, without its dependencies: those of this environment serve."""
    source, target = tmp_path / "kernels", tmp_path / "site"
    shutil.copytree(
        REPOSITORY / "kernels", source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--no-index", "--target", target, source], check=True
    )
    assert list((target / "softgpu" / "cuda").glob("*.c"))  # softgpu compiles them when it is first used
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert all(Path(file).is_relative_to(target) for file in done.stdout.split())
