"""Whether the ranks of this host find each other: one for each GPU over NCCL, or two on the CPU over gloo."""

from __future__ import annotations

import subprocess

import torch

from fastnet.diagnosis.findings import Failed, Skipped
from fastnet.diagnosis.meeting import GRADIENTS
from fastnet.distributed.launch import launch_command

MEETING, PATIENCE = "fastnet.diagnosis.meeting", 60.0


def ranks() -> str:
    """They meet as in training, and sum as many numbers as a step does."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 1:
        raise Skipped("one GPU trains in one process")
    count, kind = (gpus, "NCCL") if gpus else (2, "gloo, on the CPU")
    command = launch_command(MEETING, [PATIENCE], ranks=count, options=["--standalone", "-m"])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{count} ranks over {kind} did not end within {2 * PATIENCE:.0f} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "rror" in line] or ["without a message"]
        raise Failed(f"{count} ranks over {kind} fail: {said[0].removeprefix('error: ').strip():.400}")
    size = 4 * GRADIENTS / 1e6
    return f"{count} over {kind}; a sum of {size:.0f} MB takes {float(done.stdout.split()[-1]):.1f} ms"
