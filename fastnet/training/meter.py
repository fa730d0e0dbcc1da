"""What an epoch measures of itself besides loss and accuracy: the time of its steps, and the waits for data."""

from __future__ import annotations

import itertools
import resource
import time
from typing import Any

import numpy as np
import torch


class Stopwatch:
    """Times of steps and of waits for data, in this process and session.

    On a GPU the steps are timed by CUDA events, which are read at the end of the epoch only; elsewhere by the host's
    clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Begins an epoch, or the part of one that this session trains."""
        self.waits: list[float] = []
        self.events: list[list[torch.cuda.Event]] = []
        self.times: list[list[float]] = []
        self.resume()

    def resume(self) -> None:
        """To be called after what is no part of the steps, such as saving."""
        self.events.append([])
        self.times.append([])
        self.step()

    def waited(self, seconds: float) -> None:
        """Adds a wait for data."""
        self.waits.append(seconds)

    def step(self) -> None:
        """To be called after each step."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events[-1].append(event)
        else:
            self.times[-1].append(time.perf_counter())

    def milliseconds(self) -> np.ndarray:
        """[steps] float64: the time of each step since `restart`. Waits for the device."""
        if self.device.type != "cuda":
            return np.concatenate([np.diff(times) for times in self.times]) * 1e3
        torch.cuda.synchronize()
        pairs = (pair for events in self.events for pair in itertools.pairwise(events))
        return np.array([a.elapsed_time(b) for a, b in pairs])

    def summary(self, batch_size: int) -> dict[str, Any]:
        """What an epoch's line of metrics.jsonl says of speed and memory; `batch_size` is the global one. Where another
        session made all of its steps, that is memory alone."""
        steps, memory = self.milliseconds(), {"peak_mem_mb": _peak_memory(self.device) / 2**20}
        if not len(steps):
            return memory
        seconds = float(steps.sum()) / 1e3
        p50, p95 = np.percentile(steps, [50, 95])
        return {
            "images_per_s": len(steps) * batch_size / seconds,
            "step_ms_p50": float(p50),
            "step_ms_p95": float(p95),
            "data_wait": sum(self.waits) / seconds,
            **memory,
            "seconds": seconds,
        }


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
