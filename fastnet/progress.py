"""Progress of long work on stderr: a bar on a terminal, else a plain line every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

INTERVAL = 10.0


class Progress:
    def __init__(self, total: int, unit: str) -> None:
        self.bar = tqdm(total=total, unit=f" {unit}", unit_scale=True, disable=None, dynamic_ncols=True)
        self.total, self.unit = total, unit
        self.done = 0
        self.next_line = time.monotonic() + INTERVAL

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if self.bar.disable and time.monotonic() > self.next_line:
            print(f"{self.done:,} of {self.total:,} {self.unit}", file=sys.stderr, flush=True)
            self.next_line = time.monotonic() + INTERVAL
