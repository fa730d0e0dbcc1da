"""Where a process runs: its rank under torchrun, its device, its arithmetic, and how ranks agree."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastnet.errors import InputError, LostError

T = TypeVar("T")


@dataclass
class Runtime:
    """One rank's surroundings. `amp` is the autocast dtype, None for float32; `control` carries host-side votes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    amp: torch.dtype | None = None
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def image_dtype(self) -> torch.dtype:
        """Images arrive in half precision where the network computes in it; DALI has no bfloat16."""
        return torch.float32 if self.amp is None else torch.float16

    def say(self, line: str) -> None:
        """Prints a line once, on rank 0, to standard error: standard output is for results."""
        if self.is_main:
            print(line, file=sys.stderr, flush=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank; an InputError or a full disk on any of them is raised on all: none waits.

        The ranks may do different things in it, but no collective operation.
        """
        result, problem = None, None
        try:
            result = action()
        except InputError as error:
            problem = str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            problem = (
                f"{error.filename or 'the run directory'}: no space left on the disk; free some and continue"
            )
        if self.world_size > 1:
            problems: list[str | None] = [None] * self.world_size
            dist.all_gather_object(problems, problem, group=self.control)
            problem = next((p for p in problems if p), None)
        if problem:
            raise InputError(problem)
        return result  # type: ignore[return-value]

    def from_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on rank 0 and gives every rank its result, or its InputError."""
        result = self.together(lambda: action() if self.is_main else None)
        if self.world_size == 1:
            return result  # type: ignore[return-value]
        box = [result]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[Runtime]:
    """The ranks that torchrun's environment describes, or a process alone.

    An InputError is every rank's, and leaves the group in order; after a crash that is the launcher's work.
    Raises LostError where another rank is gone, or has not answered for `timeout` seconds.
    """
    runtime = _join(timeout)
    with contextlib.ExitStack() as leave:
        if runtime.world_size > 1:
            leave.callback(dist.destroy_process_group)
        try:
            yield runtime
        except InputError:
            raise
        except BaseException as error:
            leave.pop_all()
            if runtime.world_size > 1 and _is_of_the_group(error):
                raise _lost(runtime, timeout, error) from error
            raise


def _lost(runtime: Runtime, timeout: float, error: BaseException) -> LostError:
    reason = " ".join(str(error).split())
    return LostError(
        f"rank {runtime.rank}: another rank is gone or did not answer within --timeout {timeout:g} s; "
        f"start again to continue from the last checkpoint ({reason:.200})"
    )


def _is_of_the_group(error: BaseException) -> bool:
    """Whether a collective operation failed. Gloo's failures are RuntimeErrors that only their text tells apart."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    )


def _join(timeout: float) -> Runtime:
    """Joins the process group: NCCL and one GPU per rank where there are GPUs, gloo on the CPU where there are none.
    Raises InputError for a port in use or more ranks than GPUs, LostError where the ranks meet but do not connect.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if torch.cuda.is_available():
        if local_world_size > torch.cuda.device_count():
            raise InputError(
                f"--nproc_per_node {local_world_size}: more ranks than the {torch.cuda.device_count()} GPUs here"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        device = torch.device("cpu")
    runtime = Runtime(device, rank, world_size)
    if world_size > 1:
        patience = timedelta(seconds=timeout)
        try:
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=patience))
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore(_attempt(), store),
                rank=rank,
                world_size=world_size,
                device_id=device if device.type == "cuda" else None,
                timeout=patience,
            )
            runtime.control = dist.new_group(backend="gloo", timeout=patience)
        except dist.DistError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = str(error).splitlines()[0]
            if "EADDRINUSE" in str(error) or "already in use" in str(error):
                reason = "the port is in use; choose another by --master_port"
            raise InputError(f"{address}: ranks cannot meet: {reason}") from error
        except RuntimeError as error:
            if _is_of_the_group(error):
                raise _lost(runtime, timeout, error) from error
            raise
    return runtime


def _attempt() -> str:
    """What keeps the keys of this start apart from those of the starts before it.

    torchrun 2.14 keeps its store when it restarts the ranks of one host, and gloo then finds the addresses of dead
    ranks in it. Agents of several hosts count restarts each for itself; there torchrun has to be told to take a new
    store (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
    """
    several_hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    return "start 0" if several_hosts else f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def solo() -> Runtime:
    """One process without ranks, for the commands that read a trained network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Runtime(device, amp=choose_precision("auto", device))


def threads_per_rank() -> int:
    """The cores this process may use, shared among the ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def choose_precision(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype: bf16 on sm_80 and newer, fp16 on older GPUs, float32 (None) on the CPU."""
    if device.type == "cpu":
        if choice not in ("auto", "fp32"):
            raise InputError(f"--precision {choice}: needs a GPU; use auto or fp32 here")
        return None
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    if choice == "bf16" and not modern:
        raise InputError("--precision bf16: this GPU is older than sm_80; use fp16")
    if choice == "auto":
        choice = "bf16" if modern else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[choice]
