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
    """While entered, SIGTERM and SIGINT ask for a stop, which all ranks take after the same step.

    Ranks agree likewise on a save that the clock of one of them asks for. Each step starts an all-reduce of the
    wishes and reads the one of the step before, which is long done: the ranks agree without waiting for each other.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.asked = False
        self.pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> StopSignal:
        self.before = {n: signal.signal(n, self._ask) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if exception[0] is None:
            self.settle()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def after_step(self, save: bool) -> tuple[bool, bool]:
        """Whether every rank is to stop now, and to save now. Collective: call it once after each step."""
        if self.runtime.world_size == 1:
            return self.asked, save
        agreed = self.settle()
        wishes = torch.tensor([int(self.asked), int(save)])
        self.pending = (wishes, dist.all_reduce(wishes, group=self.runtime.control, async_op=True))
        return agreed

    def settle(self) -> tuple[bool, bool]:
        """Waits for the vote under way, if any, and returns its outcome."""
        if self.pending is None:
            return False, False
        wishes, work = self.pending
        work.wait()
        self.pending = None
        stop, save = wishes.tolist()
        return stop > 0, save > 0

    def check_own(self, step: int) -> None:
        """Raises LostError after a stop that only another host was asked for: there, the launcher of this host
        must not take the end of its ranks for the end of the run."""
        hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        if hosts > 1 and not self.asked:
            raise LostError(
                f"rank {self.runtime.rank}: stopped after step {step}, all saved, since another host was asked to; "
                "start again to continue"
            )
