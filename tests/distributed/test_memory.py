"""What a process does with memory that was freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMAND = """
import resource
import sys
import torch
from fastnet.distributed.memory import keep_freed_memory

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(10, 2**20).mul(2).sum()  # 40 MB, twice
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
faults(40)
print(faults(20))
"""


@pytest.mark.long
@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    """Almost without page faults; by default there is one for each page of every large tensor."""
    faults = {}
    for what in ("keep", "give back"):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, what], capture_output=True, text=True, check=True
        )
        faults[what] = int(done.stdout)
    assert 4 * faults["keep"] < faults["give back"]
