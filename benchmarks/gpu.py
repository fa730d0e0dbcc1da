"""The state of a GPU while something is measured on it."""

from __future__ import annotations

import select
import shutil
import subprocess

import numpy as np
import torch

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "driver_version")
SAMPLE_MS, FIRST_SAMPLE_S = 200, 10.0


class GpuWatch:
    """What nvidia-smi says of this process's GPU between entering and leaving: clocks in MHz, watts, degrees, driver.

    One nvidia-smi samples all along, beside the work; nothing is set. `state` has the medians of the samples, and is
    empty without a GPU or nvidia-smi.
    """

    def __init__(self) -> None:
        self.state: dict[str, str] = {}
        self.sampler: subprocess.Popen[str] | None = None

    def __enter__(self) -> GpuWatch:
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            # By its id: nvidia-smi counts all GPUs, also those that $CUDA_VISIBLE_DEVICES hides from torch.
            gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", f"--id=GPU-{gpu}"]
            command += ["--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}"]
            self.sampler = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.sampler is None or self.sampler.stdout is None:
            return
        select.select([self.sampler.stdout], [], [], FIRST_SAMPLE_S)
        self.sampler.terminate()
        said, _ = self.sampler.communicate()
        rows = [line.split(", ") for line in said.splitlines()]
        whole = [row for row in rows if len(row) == len(FIELDS)]
        self.state = {name: _median([row[n] for row in whole]) for n, name in enumerate(FIELDS) if whole}


def _median(values: list[str]) -> str:
    """Of numbers; of other values, such as a driver's version or [N/A], the first."""
    try:
        return f"{np.median([float(value) for value in values]):g}"
    except ValueError:
        return values[0]
