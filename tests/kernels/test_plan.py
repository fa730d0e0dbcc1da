"""The layout: every hidden size is covered, packing loses nothing, the tuning candidates are launchable plans."""

from __future__ import annotations

import pytest
import torch

from fastnet_kernels import Stage, Weights, tune
from fastnet_kernels.plan import BLOCKED, LAUNCH, RESIDENT, Plan, pack, pack_columns, plan, unpack


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


@pytest.mark.parametrize("hidden", [1, 16, 37, 196, 272])
def test_packing_and_back(hidden: int) -> None:
    (p,) = plan([Stage(2, 3, hidden)], torch.float16, 80, save=True)
    ih, hh = (torch.randn(2, 4 * hidden, hidden) for _ in range(2))
    biases = [torch.randn(2, 4 * hidden) for _ in range(2)]
    packed_ih, packed_hh, bias = pack(Weights(ih, hh, *biases), p, torch.float32)
    assert packed_ih.shape == (2, hidden, 4 * p.padded) and packed_hh.shape == (
        2,
        p.chunks,
        p.padded,
        4 * p.units,
    )
    assert torch.equal(unpack(packed_ih.mT.contiguous(), p), ih)
    columns = packed_hh.transpose(1, 2).flatten(2)  # [G, Hp, 4*Hp]
    assert torch.equal(unpack(columns[:, :hidden].mT.contiguous(), p), hh) and not columns[:, hidden:].any()
    assert torch.equal(unpack(bias[..., None], p)[..., 0], biases[0] + biases[1])
    # Gate g of unit j stands in chunk j // U at column g * U + j % U.
    unit, gate = hidden - 1, 2
    column = pack_columns(ih, p)[0, :, unit // p.units, gate, unit % p.units]
    assert torch.equal(column, ih[0, gate * hidden + unit])


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tune", "--stages", "4x64x196"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
