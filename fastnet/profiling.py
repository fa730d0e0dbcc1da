"""For profilers: named ranges within a step, and a window of steps to record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from fastnet.files import atomic_write


def span(name: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A named range for torch.profiler, and on a GPU for Nsight Systems as well. None within torch.compile."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if device.type == "cuda":
        return _cuda_span(name)
    return torch.profiler.record_function(name)


@contextlib.contextmanager
def _cuda_span(name: str) -> Iterator[None]:
    with torch.cuda.nvtx.range(name), torch.profiler.record_function(name):
        yield


class Window:
    """Records a run on this rank, from the step after step `first` to step `last`; None records nothing.

    On a GPU it opens the window that `nsys --capture-range=cudaProfilerApi` and `ncu --profile-from-start off` wait
    for (benchmarks/nsys.sh and ncu.sh). On the CPU, torch.profiler writes the file `trace`, for ui.perfetto.dev.
    """

    def __init__(self, steps: tuple[int, int] | None, device: torch.device, trace: Path) -> None:
        self.first, self.last = steps or (0, 0)
        self.device, self.trace = device, trace
        self.profiler: torch.profiler.profile | None = None
        self.open = False

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def moves_at(self, step: int) -> bool:
        """Whether `at` would open or close the window; the same on all ranks."""
        return (self.first <= step < self.last) != self.open

    def at(self, step: int) -> None:
        """Call it before the first step and after each step, with the number of steps done."""
        if self.first <= step < self.last and not self.open:
            self._open()
        elif step >= self.last:
            self.close()

    def _open(self) -> None:
        self.open = True
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.profiler.start()
        else:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.start()

    def close(self) -> None:
        """Ends the window and writes its trace, if it is open. Raises InputError if the trace cannot be written."""
        if not self.open:
            return
        self.open = False
        if self.profiler is None:
            torch.cuda.synchronize(self.device)
            torch.cuda.profiler.stop()
            return
        self.profiler.stop()
        with atomic_write(self.trace) as beside:
            self.profiler.export_chrome_trace(str(beside))
        self.profiler = None
