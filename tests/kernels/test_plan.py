"""The layout: every hidden size is covered, packing loses nothing, each device has its own row of the launch table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastnet_kernels import Stage, Weights, op, tune
from fastnet_kernels.plan import BLOCKED, LAUNCH, RESIDENT, Plan, _capability, architecture, plan
from tests.support.kernels import interpreted


def assert_sound(p: Plan) -> None:
    assert p.hidden <= p.padded < p.hidden + max(p.units, p.block)
    for pieces in (p.pieces, p.wide):
        ends = [start + width for start, width in pieces]
        assert [start for start, _ in pieces] == [0, *ends[:-1]] and p.hidden <= ends[-1] <= p.padded
        assert all(width >= 16 and width & (width - 1) == 0 for _, width in pieces)
    assert p.padded % 16 == 0
    if p.mode == BLOCKED:
        assert p.padded % p.block == 0
    if p.mode == RESIDENT:
        assert p.chunks <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", LAUNCH)
def test_every_hidden_size(arch: int, dtype: torch.dtype) -> None:
    for hidden in range(1, 1025):
        assert_sound(plan([Stage(1, 2, hidden)], dtype, arch, save=True)[0])


@pytest.mark.parametrize("hidden", [1, 16, 49, 64, 196, 256, 784, 1024])
def test_tuning_candidates(hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in tune.candidates(hidden):
        monkeypatch.setitem(LAUNCH, 80, (tile,))
        assert_sound(plan([Stage(1, 2, hidden)], torch.bfloat16, 80, save=True)[0])


def packed_columns(matrix: Tensor, p: Plan) -> Tensor:
    """[G, 4H, K] -> [G, K, C, 4, U], units beyond H zero: the columns of a row in the order (chunk, gate, unit)."""
    groups, _, k = matrix.shape
    w = F.pad(matrix.view(groups, 4, p.hidden, k), (0, 0, 0, p.padded - p.hidden))
    return w.view(groups, 4, p.chunks, p.units, k).permute(0, 4, 2, 1, 3)


@pytest.mark.parametrize("hidden", [1, 16, 37, 68])
def test_packing(hidden: int) -> None:
    plans = plan([Stage(1, 3, 8), Stage(2, 3, hidden)], torch.float16, 80, save=True)
    weights = [
        Weights(*(torch.randn(p.groups, 4 * p.hidden, *rest) for rest in [(p.hidden,)] * 2 + [()] * 2))
        for p in plans
    ]
    packed = interpreted().pack(weights, plans, torch.float32)
    p, w, end = plans[1], weights[1], plans[1].hidden_weights_at
    hh = packed[end : p.input_weights_at].view(2, p.chunks, p.padded, 4, p.units)
    ih = packed[p.input_weights_at : p.counters_at].view(2, hidden, p.chunks, 4, p.units)
    assert torch.equal(ih, packed_columns(w.ih, p))
    assert torch.equal(hh[:, :, :hidden].transpose(1, 2), packed_columns(w.hh, p))
    assert not hh[:, :, hidden:].any()


@pytest.mark.parametrize("hidden", [1, 37])
def test_unpacking_adds_the_parts(hidden: int) -> None:
    """Whole numbers, so that sums are exact; the gradients arrive in the type of the weights."""
    (p,) = plan([Stage(2, 3, hidden)], torch.float16, 80, save=True)
    parts, columns = 3, 2 * 4 * p.padded
    partial = torch.randint(-9, 9, (parts * columns * (2 * hidden + 1),)).float()
    shapes = [(2, 4 * hidden, hidden)] * 2 + [(2, 4 * hidden)] * 2
    ih, hh, bias_ih, bias_hh = found = [torch.full(shape, torch.nan, dtype=torch.float16) for shape in shapes]
    interpreted().unpack(partial, [Weights(*found)], (p,), parts)
    rest = partial[2 * parts * columns * hidden :].view(parts, 2, 4 * p.padded, 1).sum(0)
    sums = partial[: 2 * parts * columns * hidden].view(2, parts, 2, 4 * p.padded, hidden).sum(1)
    for gradient, total in [
        (ih, sums[0]),
        (hh, sums[1]),
        (bias_ih[..., None], rest),
        (bias_hh[..., None], rest),
    ]:
        expected = total.view(2, p.chunks, 4, p.units, -1).permute(0, 4, 1, 2, 3)
        assert torch.equal(packed_columns(gradient.float(), p)[..., : p.units], masked(expected, p))


def masked(columns: Tensor, p: Plan) -> Tensor:
    """Packed columns [G, K, C, 4, U] with zeros for units beyond H."""
    unit = torch.arange(p.padded).view(p.chunks, 1, p.units)
    return torch.where(unit < p.hidden, columns, 0)


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Capabilities are asked for anew, before and after."""
    _capability.cache_clear()
    yield
    _capability.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_each_device_is_asked_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two kinds of GPUs: what counts is the tensor's device, whichever is current."""
    capabilities = [(9, 0), (8, 6)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    assert [architecture(torch.device("cuda", n)) for n in (0, 1)] == [90, 86]
    assert architecture(torch.device("cuda")) == 86
    capabilities[1] = (7, 5)
    _capability.cache_clear()
    assert op.choose("triton", torch.device("cuda", 0), torch.float16, 16) == "triton"
    with pytest.raises(RuntimeError, match="cuda:1 is older than compute capability"):
        op.choose("triton", torch.device("cuda", 1), torch.float16, 16)


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tune", "--stages", "4x64x196"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
