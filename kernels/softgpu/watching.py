"""What a program asks of the device while somebody watches: counts, waits with their tracebacks, operands."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from softgpu import library

if TYPE_CHECKING:
    import torch

TRACEBACK_LINES = 8


class Operand(NamedTuple):
    """A tensor that an operator reads or writes."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Call(NamedTuple):
    """One operator of torch: its name without "aten::", and its tensors in the order of the arguments."""

    name: str
    operands: tuple[Operand, ...]


class Launch(NamedTuple):
    """One launch of a Triton kernel; `stats` are ptxrun's, None where the kernel was not executed."""

    name: str
    stats: Any


@dataclass(eq=False)
class Watch:
    """What happened in a `watch` block.

    counts: the counters that moved, by how much; complete once the block is left.
    waits: of each time the host waited for the device, what it was and the Python lines that led to it.
    operators: how often each operator of torch was computed.
    calls: the same with operands, if they were asked for.
    launches: of Triton kernels.
    """

    operands: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    calls: list[Call] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Races and reads of unwritten memory in the Triton kernels that were executed."""
        found = []
        for name, stats in self.launches:
            for kind in ("races", "cta_races", "uninit_reads"):
                if stats is not None and getattr(stats, kind):
                    found.append(f"{name}: {kind} {getattr(stats, kind)}")
        return found


_open: list[Watch] = []


@contextmanager
def watch(*, operands: bool = False) -> Iterator[Watch]:
    """Watches all threads of the process while the block runs; with `operands`, every tensor of every operator."""
    seen = Watch(operands)
    before = library.counters()
    _open.append(seen)
    try:
        yield seen
    finally:
        _open.remove(seen)
        seen.counts.update({k: n - before[k] for k, n in library.counters().items() if n != before[k]})


def note_operator(name: str, tensors: Sequence[torch.Tensor]) -> None:
    for seen in _open:
        seen.operators[name] += 1
        if seen.operands:
            operands = (Operand(t.device, t.dtype, tuple(t.shape), t.stride()) for t in tensors)
            seen.calls.append(Call(name, tuple(operands)))


def note_launch(name: str, stats: Any) -> None:
    for seen in _open:
        seen.launches.append(Launch(name, stats))


def _on_wait(what: bytes) -> None:
    if not _open:
        return
    here = Path(__file__).parent
    stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent != here]
    lines = "".join(traceback.format_list(stack[-TRACEBACK_LINES:]))
    for seen in _open:
        seen.waits.append(f"{what.decode()}\n{lines}")


_callback = library.ON_WAIT(_on_wait)  # has to outlive the library's use of it


def install() -> None:
    library.library().softgpu_on_wait(_callback)
