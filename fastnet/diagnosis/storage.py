"""Room and speed where runs and data go, and shared memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from fastnet.diagnosis.findings import Failed, Skipped

GB = 1e9
# Tiny ImageNet prepared, and decoded once for --decode raw or device; two checkpoints and one being written.
DATA_GB, RUNS_GB = 1.7, 0.5
TRIED = 64 << 20  # bytes written to tell the speed
SHARED = Path("/dev/shm")
SHARED_GB_PER_GPU = 0.125  # as docs/operations.md has it


def disk_for_data(path: Path) -> str:
    """As `disk`; a set that is there already needs no room and may be read-only."""
    if (path / "set.json").exists():
        return f"{path}: a prepared set, {shutil.disk_usage(path).free / GB:.1f} GB free"
    return disk(path, "data", DATA_GB)


def disk(path: Path, what: str, needed_gb: float) -> str:
    """Free space and speed of writing where `path` is, or is to be made."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / GB
    if free < needed_gb:
        raise Failed(f"{there}: {free:.2f} GB free, {what} take {needed_gb} GB")
    if not os.access(there, os.W_OK):
        raise Failed(f"{there}: not writable")
    return f"{there}: {free:.1f} GB free, writes {_speed(there):.0f} MB/s"


def shared_memory() -> str:
    """What NCCL needs between GPUs without peer access."""
    if not SHARED.is_dir():
        raise Failed(f"{SHARED} does not exist", "mount a tmpfs there")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    usage = shutil.disk_usage(SHARED)
    if gpus < 2:
        raise Skipped(f"fewer than two GPUs; {SHARED} has {usage.free / GB:.2f} GB free")
    needed = SHARED_GB_PER_GPU * gpus
    if usage.free / GB < needed:
        raise Failed(
            f"{SHARED} has {usage.free / GB:.2f} GB free; NCCL may need {needed:g} GB for {gpus} GPUs"
        )
    return f"{SHARED} has {usage.free / GB:.2f} GB free"


def _speed(folder: Path) -> float:
    """MB/s of writing a file to the disk, as a checkpoint is written."""
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(TRIED >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return TRIED / 1e6 / (time.perf_counter() - started)
