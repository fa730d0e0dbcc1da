"""Progress of long work, in one way: a bar on a terminal or in a notebook, else a line every ten seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

INTERVAL = 10.0  # seconds between two lines

T = TypeVar("T")


class Progress:
    """Shows on stderr how much of `total` is done and how long the rest will take. Only rank 0 shows anything.

    `done` is what an earlier run did already; it counts towards the total, not towards the speed.
    """

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        silent = os.environ.get("RANK", "0") != "0"
        self.bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=f" {unit}",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            disable=True if silent else None,  # None: no bar where stderr is no terminal
        )
        self.title, self.total, self.unit = title, total, unit
        self.done = self.before = done
        self.started = time.monotonic()
        self.next_line = float("inf") if silent or not self.bar.disable else self.started + INTERVAL

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()  # and removes it, so that the next line is printed below what was there before

    def add(self, count: int = 1) -> None:
        """Counts `count` more as done."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if now >= self.next_line:
            self.next_line = now + INTERVAL
            left = (now - self.started) / max(1, self.done - self.before) * (self.total - self.done)
            line = f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {tqdm.format_interval(left)} left"
            print(line, file=sys.stderr, flush=True)


def track(title: str, items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """The items, one after the other, with progress."""
    with Progress(title, total, unit) as progress:
        for item in items:
            yield item
            progress.add()
