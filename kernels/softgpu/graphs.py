"""CUDA graphs: what is done within a capture is kept on a tape and done again at each replay.

The driver runs nothing during a capture. Here operators, copies and Triton kernels are run, so that what follows finds
sane values, and what they changed is put back when the capture ends: a program that relies on their effect finds none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import torch

from softgpu import library

_tapes: dict[int, list[Callable[[], object]]] = {}
_before: dict[int, dict[tuple[int, int], bytes]] = {}


def capturing(device: int) -> int:
    """The graph that this thread's current stream of `device` is captured into, 0 for none; counts a node."""
    lib = library.library()
    if not lib.softgpu_captures_open():
        return 0
    return lib.softgpu_capturing(ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(device)), device)


def keep(graph: int, regions: Iterable[tuple[int, int]]) -> None:
    """Remembers memory, given as (address, bytes), as it was before the capture."""
    kept = _before.setdefault(graph, {})
    for at, size in regions:
        if size and (at, size) not in kept:
            kept[at, size] = ctypes.string_at(at, size)


def record(graph: int, action: Callable[[], object]) -> None:
    """Has `action` done again at each replay of `graph`."""
    _tapes.setdefault(graph, []).append(action)


def is_alive(graph: int) -> bool:
    """Whether something was recorded for `graph`, and its executable form is not destroyed."""
    return graph in _tapes


def _on_captured(graph: int, what: bytes, to: int, source: int, n: int, value: int) -> None:
    keep(graph, [(to, n)])
    if what == b"copy":
        record(graph, lambda: ctypes.memmove(to, source, n))
    elif what == b"memset":
        record(graph, lambda: ctypes.memset(to, value, n))


def _on_graph(graph: int, what: int) -> int:
    """1, unless it raises: ctypes then returns 0, and the launch of the graph fails."""
    if what == library.GRAPH_LAUNCHED:
        for action in _tapes.get(graph, ()):
            action()
    elif what == library.CAPTURE_ENDED:
        # The newest first: where regions overlap, the oldest has the last word.
        for (at, size), data in reversed(_before.pop(graph, {}).items()):
            ctypes.memmove(at, data, size)
    elif what == library.GRAPH_DESTROYED:
        _tapes.pop(graph, None)
    return 1


# They have to outlive the library's use.
_callbacks = library.ON_CAPTURED(_on_captured), library.ON_GRAPH(_on_graph)


def install() -> None:
    library.library().softgpu_on_graph(*_callbacks)
