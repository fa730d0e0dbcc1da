"""The module: its parameters, its ways to and from nn.LSTM, its errors, the torch backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastnet_kernels import ChannelGroupLSTM, naive, op
from tests.support.kernels import feature_maps, run_lstms

STAGES = [(2, 5, 6), (3, 4, 9)]


def test_naive_is_nn_lstm() -> None:
    module = ChannelGroupLSTM(STAGES).double()
    x = feature_maps(STAGES, 3)
    expected = run_lstms(module.to_lstms(), x, module.stages)
    torch.testing.assert_close(naive(x, module.weights(), module.stages), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_backend(dtype: torch.dtype) -> None:
    """Output and gradients against the float64 reference, within 16 units in the last place of the dtype."""
    module = ChannelGroupLSTM(STAGES, backend="torch")
    x = [f.to(dtype).requires_grad_() for f in feature_maps(STAGES, 3)]
    y = module(x)
    assert y.dtype == dtype and y.shape == (3, module.out_features) and module.backend_used == "torch"
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * direction.to(dtype)).sum().backward()

    twin = ChannelGroupLSTM(STAGES).double()
    twin.load_state_dict(module.state_dict())
    exact = [f.detach().double().requires_grad_() for f in x]
    expected = naive(exact, twin.weights(), twin.stages)
    (expected * direction.to(dtype).double()).sum().backward()
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    for ours, theirs in zip([*x, *module.parameters()], [*exact, *twin.parameters()], strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == ours.dtype
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=tolerance * max(scale, 1))


def test_autocast_decides_the_dtype() -> None:
    module = ChannelGroupLSTM(STAGES, backend="torch")
    x = [f.float() for f in feature_maps(STAGES, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_lstms_both_ways() -> None:
    lstms = [nn.LSTM(h, h, batch_first=True) for g, _, h in STAGES for _ in range(g)]
    module = ChannelGroupLSTM(STAGES, backend="torch")
    module.load_lstms(lstms)
    for lstm, back in zip(lstms, module.to_lstms(), strict=True):
        for (name, ours), theirs in zip(back.named_parameters(), lstm.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
    x = [f.float() for f in feature_maps(STAGES, 2)]
    torch.testing.assert_close(module(x), run_lstms(lstms, x, module.stages))


def test_cudnn_order_both_ways() -> None:
    """The order of nn.LSTM's own flat weights, which on a GPU are cuDNN's (see test_gpu.py)."""
    module = ChannelGroupLSTM(STAGES)
    buffers = module.to_cudnn()
    for buffer, lstm in zip(buffers, module.to_lstms(), strict=True):
        assert torch.equal(buffer, torch.cat([p.flatten() for p in lstm._flat_weights if p is not None]))
    other = ChannelGroupLSTM(STAGES)
    other.load_cudnn(buffers)
    for p, q in zip(other.parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="buffer 1 has 3 elements"):
        other.load_cudnn([buffers[0], torch.zeros(3), *buffers[2:]])


def test_initialised_as_nn_lstm() -> None:
    module = ChannelGroupLSTM([(4, 2, 64)])
    for p in module.parameters():
        assert p.dtype == torch.float32 and p.abs().max() <= 1 / 8
        assert p.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


@pytest.mark.parametrize("stages", [[], [(0, 4, 4)], [(1, 0, 4)], [(1, 4, 0)]], ids=lambda s: str(s))
def test_impossible_stages(stages: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match=r"stage|groups"):
        ChannelGroupLSTM(stages)


def test_clear_errors() -> None:
    module = ChannelGroupLSTM(STAGES, backend="torch")
    a, b = (f.float() for f in feature_maps(STAGES, 2))
    with pytest.raises(ValueError, match="2 stages need as many"):
        module([a])
    with pytest.raises(ValueError, match=r"feature map 1 is \[2, 10, 2, 3\]"):
        module([a, a])
    with pytest.raises(ValueError, match="feature map 1 differs"):
        module([a, b.half()])
    with pytest.raises(ValueError, match="one layer"):
        module.load_lstms([nn.LSTM(6, 6, 2), *[nn.LSTM(6, 6)] * 4])
    with pytest.raises(ValueError, match="needs"):
        module.load_lstms([nn.LSTM(6, 6)] * 5)
    with pytest.raises(ValueError, match="not one of"):
        ChannelGroupLSTM(STAGES, backend="cuda")  # type: ignore[arg-type]


def test_more_hidden_units_than_the_kernels_take() -> None:
    with pytest.raises(RuntimeError, match="1025 hidden units, the kernels take up to 1024"):
        op.choose("triton", torch.device("cuda"), torch.float16, 1025)
    assert op.choose("auto", torch.device("cuda"), torch.float16, 1025) == "torch"
