"""The ranks of a run: how they meet under torchrun, agree, and notice that one of them is gone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastnet.distributed.device import choose_device, choose_precision
from fastnet.errors import InputError, LostError, MemoryFullError, told

T = TypeVar("T")

MEMORY_FULL = "memory full"  # key in the store: how many ranks have said so
STORE_PATIENCE = 3.0  # seconds


@dataclass
class Runtime:
    """One rank: its place among the others, its device, and the precision it computes in.

    `amp` is the autocast dtype, None for float32. `control` is a gloo group for what the hosts agree on, `store` where
    a rank leaves word for ranks that wait for it in vain.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    amp: torch.dtype | None = None
    control: Any = None
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in: the type of autocast, or float32."""
        return self.amp or torch.float32

    @property
    def image_dtype(self) -> torch.dtype:
        """float16 where a GPU computes in half precision, as DALI has no bfloat16; else float32.

        Under bf16 autocast the batch is cast once more, by the first convolution.
        """
        return torch.float32 if self.amp is None or self.device.type == "cpu" else torch.float16

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

    @contextlib.contextmanager
    def agree(self) -> Iterator[None]:
        """Ends on every rank alike: an InputError inside the block on one rank is raised on all of them, and so is an
        OSError that `errors.told` makes one of.

        The ranks may do different things in the block, but no collective operation. A rank that failed itself
        raises its own error, with its traceback; the others raise the message of the first rank that failed.
        """
        own: InputError | None = None
        try:
            yield
        except InputError as error:
            own = error
        except OSError as error:
            own = told(error, "the run directory")
            if own is None:
                raise
            own.__cause__ = error
        problem = self.first_of(str(own) if own else None)
        if own:
            own.told_by = "run"
            raise own
        if problem:
            raise InputError(problem)

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of the ranks, on every rank. Collective."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def first_of(self, value: T | None) -> T | None:
        """The first rank's `value` that is not None, on every rank; None where all are. Collective."""
        return next((v for v in self.gather(value) if v is not None), None)

    def from_main(self, value: T) -> T:
        """Rank 0's `value`, on every rank. Collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def is_first_with(self, key: str) -> bool:
        """Whether no rank before this one has the same key. Collective."""
        return self.gather(key).index(key) == self.rank


def agreed_precision(choice: str, runtime: Runtime) -> torch.dtype | None:
    """The autocast dtype that `--precision` means, the same on every rank: GPUs of which some are older than sm_80 have
    fp16 in common. Collective. Raises InputError where a rank cannot have it."""
    with runtime.agree():
        own = choose_precision(choice, runtime.device)
    return own if len(set(runtime.gather(own))) == 1 else torch.float16


def single_process(device: str = "auto") -> Runtime:
    """One process alone, for the commands that use a trained network."""
    chosen = choose_device(device)
    return Runtime(chosen, amp=choose_precision("auto", chosen))


@contextlib.contextmanager
def joined(timeout: float, device: str = "auto") -> Iterator[Runtime]:
    """The ranks that torchrun's environment describes, or one process alone.

    An InputError is raised on every rank and leaves the process group in order, and so does the stop of one host.
    After a crash the launcher cleans up, and after an error that one rank has alone: NCCL's end waits for all of them.
    A MemoryFullError on one rank is raised on those that wait for it too, as far as they can notice.
    Raises LostError where another rank is gone, or has not answered for `timeout` seconds.
    """
    runtime = _join(timeout, device)
    with contextlib.ExitStack() as leave:
        if runtime.world_size > 1:
            leave.callback(dist.destroy_process_group)
        try:
            yield runtime
        except MemoryFullError as error:
            leave.pop_all()
            with contextlib.suppress(RuntimeError):  # the store may be gone with the rank that kept it
                error.told = runtime.store is not None and runtime.store.add(MEMORY_FULL, 1) > 1
            raise
        except InputError as error:
            if error.told_by == "rank":
                leave.pop_all()
            elif error.told_by == "host":
                error.told_by = "run"
            raise
        except LostError:
            raise
        except BaseException as error:
            leave.pop_all()
            if _is_of_the_group(error) and _heard_of_full_memory(runtime):
                full = MemoryFullError(f"rank {runtime.rank}: another rank's memory is full")
                full.told = True
                raise full from error
            if runtime.world_size > 1 and _is_of_the_group(error):
                raise _lost(runtime, timeout, error) from error
            raise


def _join(timeout: float, device: str) -> Runtime:
    """Joins the process group: NCCL with one GPU per rank, or gloo on the CPU.

    Raises InputError for a port in use and where some rank has no device, LostError if the ranks meet but cannot
    connect.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    choose = partial(choose_device, device, local_rank, local_world_size)
    if world_size == 1:
        return Runtime(choose())
    patience = timedelta(seconds=timeout)
    runtime = Runtime(torch.device("cpu"), rank, world_size)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=patience))
        runtime.store = dist.PrefixStore(_attempt(), store)
        if rank == 0:  # before the ranks meet; an earlier start may have left word
            runtime.store.delete_key(MEMORY_FULL)
        runtime.device = _agreed_device(choose, runtime.store, rank, world_size)
        on_gpu = runtime.device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=runtime.store,
            rank=rank,
            world_size=world_size,
            device_id=runtime.device if on_gpu else None,
            timeout=patience,
        )
        runtime.control = dist.new_group(backend="gloo", timeout=patience)
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            reason = "the port is in use; choose another with --master_port"
        raise InputError(f"{address}: the ranks cannot meet there: {reason}") from error
    except RuntimeError as error:
        if _is_of_the_group(error):
            raise _lost(runtime, timeout, error) from error
        raise
    return runtime


def _agreed_device(
    choose: Callable[[], torch.device], store: dist.Store, rank: int, world_size: int
) -> torch.device:
    """This rank's device, once all have one of the same kind. The process group depends on it, so they say it in the
    store. Raises InputError on every rank alike."""
    problem = ""
    try:
        device = choose()
    except InputError as error:
        device, problem = torch.device("cpu"), str(error)
    where = f"rank {rank} on {socket.gethostname()}"
    store.set(f"device of {rank}", json.dumps([where, device.type, problem]))
    said = [json.loads(store.get(f"device of {other}")) for other in range(world_size)]
    failed = [(there, why) for there, _, why in said if why]
    kinds = {kind: there for there, kind, _ in said}
    if not failed and len(kinds) == 1:
        return device
    # The store may live in the process of rank 0.
    store.set(f"heard by {rank}", "")
    if rank == 0:
        store.wait([f"heard by {other}" for other in range(world_size)])
    if not failed:
        raise InputError(
            f"--device auto: {kinds['cuda']} has a GPU, {kinds['cpu']} has none; use hosts alike, or --device cpu"
        )
    there, why = failed[0]
    raise InputError(why if len(failed) == world_size else f"{there}: {why}")


def _attempt() -> str:
    """Keeps the keys of this start apart from those of earlier starts.

    torchrun 2.14 keeps its store when it restarts the ranks of one host, and gloo would then find the addresses of
    dead ranks in it. The agents of several hosts count restarts separately; there, torchrun has to be told to make
    a new store (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
    """
    several_hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    return "start 0" if several_hosts else f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _lost(runtime: Runtime, timeout: float, error: BaseException) -> LostError:
    reason = " ".join(str(error).split())
    return LostError(
        f"rank {runtime.rank}: another rank is gone or did not answer within --timeout {timeout:g} s; "
        f"start again to continue from the last checkpoint ({reason:.200})"
    )


def _heard_of_full_memory(runtime: Runtime) -> bool:
    """Asks the store, in a thread: it may live in the very rank that does not answer any more."""
    heard: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that kept it
            heard.append(runtime.store is not None and runtime.store.check([MEMORY_FULL]))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(STORE_PATIENCE)
    return any(heard)


def _is_of_the_group(error: BaseException) -> bool:
    """Whether a collective operation failed. Gloo raises plain RuntimeErrors, which only their text tells apart."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    )
