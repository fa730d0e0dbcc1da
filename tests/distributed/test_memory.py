"""What a process does with memory that was freed."""

from __future__ import annotations

import subprocess
import sys

COMMAND = """
import resource
import sys
import torch
from fastnet.distributed.memory import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25, 2**20)  # 100 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
print(min(faults_of_a_step() for _ in range(5)))
"""


def test_freed_memory_is_used_again() -> None:
    """Without page faults; by default there is one for each page of a large tensor, of 2 MiB at most."""
    faults = {}
    for what in ("keep", "give back"):
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, what], capture_output=True, text=True, check=True
        )
        faults[what] = int(done.stdout)
    assert faults["keep"] < 5 < 50 <= faults["give back"]
