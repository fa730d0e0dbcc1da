"""The Triton kernels in Triton's interpreter against float64 nn.LSTM: the output and every gradient.

bfloat16 is left to the executed PTX: the interpreter computes it wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.kernels import failures, interpreted

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # exp of a saturated gate
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every buffer allocated without a value is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("hidden", "batch"),
    [
        *[(1, 16), (4, 5), (16, 19), (24, 1), (37, 5), (49, 19), (64, 1), (100, 16)],
        pytest.param(196, 5, marks=pytest.mark.slow),
    ],
)
def test_hidden_sizes(hidden: int, batch: int, dtype: torch.dtype) -> None:
    assert not failures(interpreted(), [(1, 3, hidden)], batch, dtype)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_stages_together(recompute: bool) -> None:
    """Resident and streamed, odd steps, several groups in one launch."""
    stages = [(1, 3, 68), (2, 4, 49), (1, 1, 9)]
    assert not failures(interpreted(), stages, 5, torch.float16, recompute=recompute)


def test_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows cut into parts for the weights' gradients, as for large batches: more parts than tiles, one ragged."""
    monkeypatch.setattr(interpreted(), "_PART_ROWS", 16)
    assert not failures(interpreted(), [(2, 5, 9), (1, 3, 37)], 19, torch.float16)


@pytest.mark.slow
def test_blocked() -> None:
    """The path of hidden sizes above 256."""
    assert not failures(interpreted(), [(1, 2, 272)], 2, torch.float16)


@pytest.mark.slow
def test_many_steps() -> None:
    assert not failures(interpreted(), [(1, 64, 16)], 3, torch.float16)


@pytest.mark.parametrize("scale", [0.0, 200.0], ids=["zeros", "saturated"])
def test_extreme_inputs(scale: float) -> None:
    assert not failures(interpreted(), [(2, 3, 9), (1, 2, 68)], 3, torch.float16, scale=scale)
