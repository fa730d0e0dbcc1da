"""nsys.sh and ncu.sh."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY


@pytest.mark.parametrize(
    ("script", "tool", "flag"), [("nsys.sh", "NSYS", "--output"), ("ncu.sh", "NCU", "--export")]
)
def test_profiler_scripts_name_a_file_per_rank(script: str, tool: str, flag: str, tmp_path: Path) -> None:
    """The profiler is not here: `echo` in its place shows the command line that it would be given."""
    path = REPOSITORY / "benchmarks" / script
    env = {**os.environ, tool: "echo", "OUT": str(tmp_path / "out"), "RANK": "3"}
    line = [str(path), "python", "train.py", "--run-dir", "a b"]
    said = subprocess.run(line, env=env, check=True, capture_output=True, text=True).stdout.strip()
    assert said.endswith("python train.py --run-dir a b")
    assert str(tmp_path / "out" / "rank3") in said.partition(flag)[2]
    assert (tmp_path / "out").is_dir()
    assert subprocess.run([str(path)], env=env, capture_output=True, text=True).returncode == 2


def test_ncu_measures_every_kernel_of_fastnet() -> None:
    script = (REPOSITORY / "benchmarks" / "ncu.sh").read_text(encoding="utf-8")
    default = re.search(r"KERNELS:-'regex:(.*)'}", script)
    sources = (REPOSITORY / "kernels" / "fastnet_kernels").glob("*.py")
    kernels = [
        name
        for path in sources
        for name in re.findall(r"@triton.jit.*\ndef (\w+_kernel)\(", path.read_text())
    ]
    assert default and len(kernels) >= 5
    assert [name for name in kernels if not re.match(default[1], name)] == []
