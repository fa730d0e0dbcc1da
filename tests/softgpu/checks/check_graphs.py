"""CUDA graphs on softgpu: what a capture refuses, and what a replay computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import softgpu
from benchmarks import harness


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def beyond(x):
    tl.store(x + 100_000_000, 1.0)


def captured(action: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph


def test_a_capture_has_no_effect_and_replays_have() -> None:
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    made: list[Tensor] = []

    def step() -> None:
        made.append(x * 2)
        total.add_(made[0])

    graph = captured(step)
    assert total.tolist() == [0, 0, 0]
    x.fill_(5)
    graph.replay()
    graph.replay()
    assert made[0].tolist() == [10] * 3 and total.tolist() == [20] * 3


def test_replays_read_half_precision_inputs_anew() -> None:
    x, w = (torch.ones(4, 4, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    made: list[Tensor] = []
    graph = captured(lambda: made.append(x @ w))
    x.fill_(3)
    graph.replay()
    assert made[0].tolist() == [[12.0] * 4] * 4


def test_replays_copy_from_pinned_memory_and_write_out_arguments() -> None:
    host, x, y = torch.ones(3).pin_memory(), torch.zeros(3, device="cuda"), torch.zeros(3, device="cuda")

    def step() -> None:
        x.copy_(host, non_blocking=True)
        torch.mul(x, 3, out=y)

    graph = captured(step)
    host.fill_(2)
    graph.replay()
    assert x.tolist() == [2] * 3 and y.tolist() == [6] * 3


def test_replays_run_triton_kernels() -> None:
    x, y = torch.ones(100, device="cuda"), torch.zeros(100, device="cuda")
    with softgpu.watch() as seen:
        graph = captured(lambda: double[(2,)](x, y, 100, BLOCK=64))
        assert not seen.launches and y.sum().item() == 0
        x.fill_(4)
        graph.replay()
    assert y.tolist() == [8] * 100 and [launch.name for launch in seen.launches] == ["double"]
    assert seen.counts["triton"] == seen.counts["graph_launches"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_fault_in_a_replay_fails() -> None:
    x = torch.ones(3, device="cuda")
    graph = captured(lambda: beyond[(1,)](x))
    with pytest.raises(RuntimeError, match="launch failure"):
        graph.replay()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_refuses_to_wait() -> None:
    x = torch.ones(3, device="cuda")
    for action in (x.sum().item, torch.cuda.synchronize, lambda: x.cpu(), lambda: torch.nonzero(x)):
        with pytest.raises(RuntimeError, match="captur"):
            captured(action)
    assert (x + 1).tolist() == [2, 2, 2]


def test_the_memory_of_a_benchmarked_graph_is_that_of_its_capture() -> None:
    """Two buffers of 2 MiB at once; a replay allocates nothing."""
    x = torch.ones(2**19, device="cuda")

    def step() -> None:
        y = x * 2
        torch.relu(y)

    graph = harness.Captured(step)
    plain = harness.peak_mb(lambda laps: step(), x.device)
    assert harness.peak_mb(graph, x.device) == plain == 4.0
    laps = harness.Laps(x.device)
    graph(laps)
    assert laps.milliseconds().keys() == {"replay", "total"}
