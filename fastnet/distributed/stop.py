"""Stopping and saving at the same step on every rank."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fastnet.distributed.ranks import Runtime
from fastnet.errors import LostError


class StopSignal:
    """Inside its `with` block, SIGTERM and SIGINT ask for a stop, which all ranks make after the same step.

    In the same way the ranks agree on a save that one rank's clock asks for. Each step starts an all-reduce of these
    wishes and reads the result of the step before, which has long arrived, so no rank waits for another.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.received = False
        self.pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> StopSignal:
        self.before = {n: signal.signal(n, self._receive) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if exception[0] is None:
            self.settle()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def after_step(self, save: bool) -> tuple[bool, bool]:
        """Whether every rank is to stop now, and to save now. Collective: call it once after each step."""
        if self.runtime.world_size == 1:
            return self.received, save
        agreed = self.settle()
        wishes = torch.tensor([int(self.received), int(save)])
        self.pending = (wishes, dist.all_reduce(wishes, group=self.runtime.control, async_op=True))
        return agreed

    def asked(self) -> bool:
        """Whether any rank was told to stop by now. Collective; waits for the others."""
        told, _ = self.settle()
        return self.runtime.first_of(self.received or told or None) is not None

    def settle(self) -> tuple[bool, bool]:
        """Waits for the all-reduce under way, if there is one, and returns its result."""
        if self.pending is None:
            return False, False
        wishes, work = self.pending
        work.wait()
        self.pending = None
        stop, save = wishes.tolist()
        return stop > 0, save > 0

    def check_own(self, step: int) -> None:
        """Raises LostError after a stop that only another host was asked for, so that this host's torchrun starts its
        ranks again instead of taking their end for the end of the run. Collective."""
        self.settle()
        hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        if hosts > 1 and not self.received:
            raise LostError(
                f"rank {self.runtime.rank}: stopped after step {step}, all saved, since another host was asked to; "
                "start again to continue"
            )
