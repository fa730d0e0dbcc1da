"""NCCL's place: collectives on the device's memory, by a gloo group.

c10d sends each collective through torch's dispatcher. Here those on CUDA tensors are done by the CPU's, on aliases of
the same memory. As with NCCL, the host does not wait for the device, the work's future holds the device's tensors, and
a capture takes a collective without talking to the other ranks: they meet at the replays.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from softgpu import graphs, watching
from softgpu.host import Placement, region, tensors_in

_library: torch.library.Library | None = None
_graphs: set[int] = set()  # that a collective was captured in


class Collective:
    """One operator of c10d, for tensors on the device."""

    def __init__(self, name: str) -> None:
        self.name, self.op = name, getattr(torch.ops.c10d, name).default
        self.tensors_returned = len(self.op._schema.returns) > 1

    def __call__(self, *args: Any) -> Any:
        tensors = tensors_in(list(args))
        watching.note_operator(f"c10d::{self.name}", tensors)
        placement = Placement(f"c10d::{self.name}", host_tensors=False)
        host_args = [placement.to_host(value) for value in args]
        device = tensors[0].device
        graph = graphs.capturing(device.index)
        if graph:
            graphs.keep(graph, map(region, tensors))
            graphs.record(graph, lambda: self._run(host_args))
            _graphs.add(graph)
        else:
            self._run(host_args)
        work = _done(args[0], device).boxed()
        return (args[0], work) if self.tensors_returned else work

    def _run(self, host_args: list[Any]) -> None:
        answer = self.op(*host_args)
        dist.Work.unbox(answer[-1] if self.tensors_returned else answer).wait()


def _done(results: Any, device: torch.device) -> dist.Work:
    """Work on `device` that is in its streams: who waits for it has the current stream wait, not the host."""
    future: Future = Future(devices=[device])
    future.set_result(tensors_in(results))
    return torch._C._distributed_c10d._create_work_from_future(future)


def install() -> None:
    """From here on a process group that asks for NCCL uses gloo; `device_id` has to be the current device."""
    global _library
    _library = torch.library.Library("c10d", "IMPL")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, base = name.partition("::")
        if namespace == "c10d" and base != "check_for_nan":
            _library.impl(base, Collective(base), "CUDA")

    init, destroy = dist.init_process_group, dist.destroy_process_group

    def init_process_group(backend: str | None = None, *, device_id: Any = None, **kwargs: Any) -> None:
        if backend == "nccl":
            current = torch.device("cuda", torch.cuda.current_device())
            if device_id not in (None, current):
                raise RuntimeError(f"softgpu: NCCL bound to {device_id}, current is {current}")
            backend, device_id = "gloo", None
        init(backend, device_id=device_id, **kwargs)

    def destroy_process_group(group: Any = None) -> None:
        if any(graphs.is_alive(graph) for graph in _graphs):
            raise RuntimeError("softgpu: NCCL waits for ever for a CUDA graph that has its collectives")
        destroy(group)

    dist.init_process_group = init_process_group  # type: ignore[assignment]
    dist.destroy_process_group = destroy_process_group
