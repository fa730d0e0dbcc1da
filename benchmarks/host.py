"""What a training step asks of the host, for `benchmarks.step`: launches, CUDA calls, waits, and its threads' time.

On a GPU a trace counts; on softgpu, softgpu does. There, cuDNN's and cuBLAS's part of the time is missing, and the same
calls cost Python's time instead: a replay has none of them.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.harness import Table, on_softgpu
from benchmarks.phase import at_phase
from benchmarks.trace import Trace, counts_of, traced
from fastnet.config import paper
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.ranks import Runtime
from fastnet.training.capture import CapturedStep
from fastnet.training.step import TrainStep
from fastnet.training.trainer import Trainer

STEPS_BEFORE, COUNTED = 4, 4
# A GPU's share of the paper's batch, on eight. The size makes no difference to the host.
IMAGE_SIZE, BATCH = 64, 32
# softgpu's counts
LAUNCHES = ("kernels", "triton", "graph_launches")
CALLS = (*LAUNCHES, "h2d", "d2h", "d2d", "peer", "memsets", "events", "mallocs", "frees", "host_allocs")


@dataclass(frozen=True)
class Variant:
    decode: str
    captured: bool
    compiled: bool


VARIANTS = {
    "plain": Variant("gpu", captured=False, compiled=False),
    "plain, set on the device": Variant("device", captured=False, compiled=False),
    "compiled": Variant("gpu", captured=False, compiled=True),
    "CUDA graph": Variant("gpu", captured=True, compiled=False),
    "CUDA graph, set on the device": Variant("device", captured=True, compiled=False),
    "compiled, CUDA graph, set on the device": Variant("device", captured=True, compiled=True),
}


def host_costs(table: Table, data: PreparedSet, device: torch.device, *, quick: bool, threads: int) -> None:
    """Rows of every variant for both networks in both phases, in bf16 and fp16; quickly, of the LSTM network in one.
    Numbers that are computed play no part: on softgpu they may be left out."""
    cases = itertools.product(("baseline", "lstm"), (torch.bfloat16, torch.float16), ("head", "full"))
    for network, dtype, phase in [("lstm", torch.bfloat16, "full")] if quick else cases:
        case = {"network": network, "phase": phase, "image_size": IMAGE_SIZE, "batch": BATCH}
        case |= {"precision": str(dtype).removeprefix("torch."), "threads": threads}
        case |= {"device": "softgpu" if on_softgpu() else "cuda"}
        print(f"{network}, phase {phase}, {case['precision']}, batch {BATCH}: the host's part")
        for name, variant in VARIANTS.items():
            if not (quick and variant.compiled):
                measure(table, case, name, variant, data, Runtime(device, amp=dtype))


def measure(
    table: Table, case: dict[str, Any], name: str, variant: Variant, data: PreparedSet, runtime: Runtime
) -> None:
    """Rows of one variant: what a step asks for, and the milliseconds of processor time that it takes the host."""
    sizes = {"image_size": case["image_size"], "batch_size": case["batch"], "threads": case["threads"]}
    config = replace(paper(case["network"]), **sizes, weights="none", head_epochs=1, plateau=0)
    config = replace(config, decode=variant.decode, compile=variant.compiled, cuda_graph="off")
    torch.compiler.reset()  # it refuses a function of more than eight networks
    with at_phase(config, case["phase"], data, runtime) as trainer:
        if variant.captured:
            capture(trainer)
        step = trainer.train_step
        for _ in range(STEPS_BEFORE):
            step()
        for quantity, value in _counts(step, runtime.device).items():
            table.add(case, name, quantity, "a step", [value])
        table.add(case, name, "host ms", "a step", _host_ms(step, 10 if table.quick else 60, runtime.device))


def capture(trainer: Trainer) -> None:
    """Has the trainer replay a CUDA graph, without the check that its numbers are right."""
    running = trainer.running
    assert running and isinstance(running.launch, TrainStep)
    plain = running.launch
    plain.batches = running.batches.fixed(trainer.runtime.dtype)
    for _ in range(STEPS_BEFORE):
        plain()
    running.launch = running.graph = CapturedStep(plain)
    running.graph.capture()


def _counts(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    if not on_softgpu():
        return counts_of(Trace(traced(step, COUNTED, device)), COUNTED)
    import softgpu

    with softgpu.watch() as seen:
        for _ in range(COUNTED):
            step()
    asked = {"launches": LAUNCHES, "CUDA calls": CALLS, "synchronisations": ("waits",)}
    return {name: sum(seen.counts[kind] for kind in kinds) / COUNTED for name, kinds in asked.items()}


def _host_ms(step: Callable[[], None], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of processor time of the calling thread and of autograd's, step by step."""
    clocks = [time.CLOCK_THREAD_CPUTIME_ID, _autograds_clock(device)]
    taken = []
    for _ in range(steps):
        before = sum(map(time.clock_gettime, clocks))
        step()
        taken.append((sum(map(time.clock_gettime, clocks)) - before) * 1e3)
    return taken


def _autograds_clock(device: torch.device) -> int:
    """The clock of the thread in which the backward pass runs on `device`."""
    found: list[int] = []
    x = torch.ones(1, device=device, requires_grad=True)
    x.register_hook(lambda _: found.append(time.pthread_getcpuclockid(threading.get_ident())))
    x.sum().backward()
    return found[0]
