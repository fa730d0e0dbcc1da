"""Where a training step's micro-batches come from: a stream, or fixed places that a CUDA graph reads.

Shapes: B images of a micro-batch, S image size.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastnet.input.device import DeviceTrainStream
from fastnet.input.streams import Batch
from fastnet.profiling import span


class Batches(Protocol):
    """A step is `advance()`, `make(micro)` for each of its micro-batches, `count()`."""

    def advance(self) -> None:
        """The host's part."""

    def make(self, micro: int) -> tuple[Any, Tensor]:
        """Images x [B, 3, S, S] channels_last, or their features, and labels y [B] of a micro-batch, on the device."""

    def count(self) -> None:
        """The device's part at the end of a step."""


class FixedBatches(Batches, Protocol):
    """Batches whose `make` and `count` only ask for work on the device, from fixed places in its memory."""

    def rehearse(self, step: int) -> None:
        """Readies a batch that does not count, in place of `advance`: another one for each `step`."""

    def state(self) -> list[Tensor]:
        """What `count` changes."""


class Stream(Protocol):
    """Micro-batches without end, `accumulate` of them for a step."""

    accumulate: int

    def __next__(self) -> Batch: ...


class Streamed:
    """Micro-batches as a stream delivers them. `waited` is told the seconds that each was waited for."""

    def __init__(self, stream: Stream, device: torch.device, waited: Callable[[float], None]) -> None:
        self.stream, self.device, self.waited = stream, device, waited
        self.ahead: deque[Batch] = deque()

    def peek(self) -> list[Batch]:
        """The next step's micro-batches, which `take` returns later."""
        while len(self.ahead) < self.stream.accumulate:
            self.ahead.append(self._next())
        return list(self.ahead)

    def take(self) -> Batch:
        return self.ahead.popleft() if self.ahead else self._next()

    def _next(self) -> Batch:
        started = time.perf_counter()
        with span("data", self.device):
            batch = next(self.stream)
        self.waited(time.perf_counter() - started)
        return batch

    def advance(self) -> None:
        pass

    def make(self, micro: int) -> tuple[Any, Tensor]:
        x, y, _ = self.take()
        return x, y

    def count(self) -> None:
        pass

    def fixed(self, dtype: torch.dtype) -> FixedBatches:
        """The same micro-batches in fixed places, in the type that the first convolution takes."""
        return Copied(self, dtype)


class Copied:
    """Micro-batches of a stream, copied to fixed places."""

    def __init__(self, streamed: Streamed, dtype: torch.dtype) -> None:
        self.streamed = streamed
        self.x = [tree_map(lambda t: t.to(dtype, copy=True), batch.x) for batch in streamed.peek()]
        self.y = [batch.y.clone() for batch in streamed.peek()]

    def advance(self) -> None:
        for x, y in zip(self.x, self.y, strict=True):
            batch = self.streamed.take()
            tree_map(Tensor.copy_, x, batch.x)
            y.copy_(batch.y)

    def rehearse(self, step: int) -> None:
        for x, y, batch in zip(self.x, self.y, self.streamed.peek(), strict=True):
            tree_map(lambda to, t: to.copy_(t.roll(step, dims=3)), x, batch.x)
            y.copy_(batch.y.roll(step))

    def make(self, micro: int) -> tuple[Any, Tensor]:
        return self.x[micro], self.y[micro]

    def count(self) -> None:
        pass

    def state(self) -> list[Tensor]:
        return []


class Resident:
    """Micro-batches that a kernel makes of the split in the device's memory: they are in fixed places as they are."""

    def __init__(self, stream: DeviceTrainStream) -> None:
        self.stream = stream
        self.advanced = False  # for the next step already

    def advance(self) -> None:
        if not self.advanced:
            self.stream.advance()
        self.advanced = False

    def make(self, micro: int) -> tuple[Tensor, Tensor]:
        return self.stream.make(micro)

    def count(self) -> None:
        self.stream.count()

    def fixed(self, dtype: torch.dtype) -> FixedBatches:
        """These. From here on the epoch's table is on the device, which a rehearsal reads."""
        self.advance()
        self.advanced = True
        return self

    def rehearse(self, step: int) -> None:
        self.stream.counter.fill_(step % self.stream.steps_per_epoch)

    def state(self) -> list[Tensor]:
        return [self.stream.counter]
