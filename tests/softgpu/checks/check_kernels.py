"""The tests that wait for a GPU (tests/kernels/test_gpu.py) at sizes that take seconds, their kernels executed."""

from __future__ import annotations

import pytest
import torch

import softgpu
from fastnet_kernels import launch
from tests.kernels import test_gpu
from tests.kernels.test_gpu import test_compile_fullgraph as test_compile_fullgraph
from tests.kernels.test_gpu import test_cuda_graph as test_cuda_graph
from tests.kernels.test_gpu import test_runs_are_bit_identical as test_runs_are_bit_identical
from tests.support.kernels import failures

SMALL = [(2, 4, 16), (1, 3, 68)]  # in place of the paper's (groups, steps, hidden); the second is split


@pytest.fixture
def splits() -> None:
    """In place of those of test_gpu: as the GPU decides. test_ptx.py has what is not split."""


@pytest.fixture(autouse=True)
def _small_and_without_races(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(test_gpu, "PAPER", SMALL)
    with softgpu.watch() as seen:
        yield
    assert seen.launches and not seen.problems, seen.problems
    assert not seen.counts["kernels"]
    forward = next(one for one in seen.launches if one.name == "forward_kernel")
    assert forward.stats is not None and len(forward.stats.per_cta) % (2 + 3) == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_backward(recompute: bool) -> None:
    assert not failures(launch, SMALL, 5, torch.bfloat16, recompute=recompute, device="cuda")
