"""The custom operator in torch's machinery: autograd, compile, export, fake tensors, checkpointing, DDP.

The kernels run in Triton's interpreter, so the sizes are tiny.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastnet_kernels import ChannelGroupLSTM, Stage, channel_group_lstm, op
from fastnet_kernels.plan import LAUNCH, padded_batch, plan, sizes
from tests.support.kernels import feature_maps
from tests.support.kernels import triton_on_cpu as triton_on_cpu

STAGES = [(1, 2, 4), (2, 3, 9)]
PAPER = (Stage(4, 64, 196), Stage(8, 64, 49))


def inputs(batch: int = 3, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> list[Tensor]:
    return [f.to(dtype).requires_grad_(requires_grad) for f in feature_maps(STAGES, batch)]


def pair(recompute: bool = False) -> tuple[ChannelGroupLSTM, ChannelGroupLSTM]:
    """The same parameters on the triton and on the torch backend."""
    ours = ChannelGroupLSTM(STAGES, backend="triton", recompute=recompute)
    theirs = ChannelGroupLSTM(STAGES, backend="torch")
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(module: nn.Module, x: list[Tensor], y: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    return list(torch.autograd.grad((y * weight).sum(), [*x, *module.parameters()]))


@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_torch(recompute: bool) -> None:
    ours, theirs = pair(recompute)
    x = inputs()
    y, expected = ours(x), theirs(x)
    assert ours.backend_used == "triton" and theirs.backend_used == "torch"
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(ours, x, y), gradients(theirs, x, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("triton_on_cpu")
def test_frozen_features_and_inference() -> None:
    ours, theirs = pair()
    x = inputs(requires_grad=False)
    torch.testing.assert_close(
        gradients(ours, [], ours(x)), gradients(theirs, [], theirs(x)), rtol=1e-4, atol=1e-5
    )
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
    flat, numbers = [p for w in ours.weights() for p in w], [n for s in ours.stages for n in s]
    with torch.no_grad():
        _, *saved = torch.ops.fastnet.channel_group_lstm(x, flat, numbers, False, False)
    assert all(t.numel() == 0 for t in saved)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=[pytest.mark.long, pytest.mark.slow])])
def test_opcheck(recompute: bool) -> None:
    module, _ = pair()
    x = inputs(2)
    flat, numbers = (
        [p.detach().requires_grad_() for w in module.weights() for p in w],
        [n for s in STAGES for n in s],
    )
    torch.library.opcheck(op._forward, (x, flat, numbers, True, recompute))
    with torch.no_grad():
        _, *saved = op._forward(x, flat, numbers, True, recompute)
        dout = torch.ones(2, module.out_features)
        arguments = (dout, [f.detach() for f in x], [w.detach() for w in flat], *saved, numbers, True)
        torch.library.opcheck(op._backward, arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_on_cpu")
@pytest.mark.parametrize(
    "backend", ["triton", pytest.param("torch", marks=[pytest.mark.long, pytest.mark.slow])]
)
def test_compile_fullgraph(backend: op.Backend) -> None:
    """A small network in one graph for any batch size, forward and backward."""
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()).to(memory_format=torch.channels_last)
    lstm = ChannelGroupLSTM([(1, 2, 4)], backend=backend)

    def forward(image: Tensor) -> Tensor:
        return lstm([network(image)])

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    parameters = [*network.parameters(), *lstm.parameters()]
    for batch in (2, 3):
        image = torch.randn(batch, 3, 2, 2)
        y, expected = compiled(image), forward(image)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), parameters), torch.autograd.grad(expected.sum(), parameters)
        )


@pytest.mark.usefixtures("triton_on_cpu")
def test_any_memory_format() -> None:
    ours, _ = pair()
    x = inputs(2, requires_grad=False)
    torch.testing.assert_close(ours([f.contiguous() for f in x]), ours(x), rtol=0, atol=0)


@pytest.mark.usefixtures("triton_on_cpu")
def test_export() -> None:
    ours, _ = pair()
    x = inputs(2, requires_grad=False)
    with torch.no_grad():
        exported = torch.export.export(ours, (x,))
        torch.testing.assert_close(exported.module()(x), ours(x))
    assert any("channel_group_lstm" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.usefixtures("triton_on_cpu")
def test_autocast_and_checkpoint() -> None:
    ours, _ = pair()
    x = inputs(2)
    with torch.autocast("cpu", torch.float16):
        y = ours(x)
        again = checkpoint(ours, x, use_reentrant=False)
    assert y.dtype == torch.float16
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    torch.testing.assert_close(gradients(ours, x, again), gradients(ours, x, y), rtol=0, atol=0)


@pytest.mark.usefixtures("triton_on_cpu")
def test_second_gradient_is_refused() -> None:
    ours, _ = pair()
    x = inputs(1)
    (dx, *_) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.usefixtures("triton_on_cpu")
def test_gradient_twice_over_one_graph() -> None:
    ours, _ = pair()
    x = inputs(1)
    y = ours(x).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, x), first, rtol=0, atol=0)


@pytest.mark.usefixtures("triton_on_cpu")
def test_ddp(tmp_path: Path) -> None:
    ours, theirs = pair()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(ours)
        x = inputs(2)
        wrapped(x).sum().backward()
        theirs(x).sum().backward()
    finally:
        dist.destroy_process_group()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_fake_cuda_without_a_gpu(recompute: bool) -> None:
    """Shapes, dtypes and devices of a training step of the paper's network, nothing computed."""
    with FakeTensorMode(), torch.device("cuda"):
        module = ChannelGroupLSTM(PAPER, backend="triton", recompute=recompute)
        x = [
            torch.empty(5, s.groups * s.seq_len, side, side, dtype=torch.bfloat16, requires_grad=True)
            for s, side in zip(PAPER, (14, 7), strict=True)
        ]
        y = module(x)
        assert y.shape == (5, 1176) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
        # Not y.backward(): the autograd engine itself asks for the device.
        flat, numbers = [p for w in module.weights() for p in w], [n for s in PAPER for n in s]
        _, *saved = op._forward(x, flat, numbers, True, recompute)
        found = op._backward(torch.empty_like(y), x, flat, *saved, numbers, True)
        for gradient, t in zip(found, [*x, *flat], strict=True):
            assert (gradient.shape, gradient.dtype, gradient.device) == (t.shape, t.dtype, t.device)


@pytest.mark.parametrize("arch", LAUNCH)
def test_saved_memory(arch: int) -> None:
    """At most 1.3 MB an image for the paper's network, 0.55 MB with recompute: gates and h in 2 bytes, c in 4.

    The packed weights come on top, once a call: 3.6 MB.
    """
    batch = 256
    size = sizes(plan(PAPER, torch.bfloat16, arch, save=True), padded_batch(batch))
    assert (2 * size.gates + 6 * size.states) / batch <= 1.3e6
    assert 6 * size.states / batch <= 0.55e6
    assert 2 * size.weights <= 3.6e6


def test_choice_of_the_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_announced", False)
    auto = ChannelGroupLSTM(STAGES)
    for _ in range(2):
        auto(inputs())
    assert auto.backend_used == "torch"
    assert capsys.readouterr().err.count("channel-group LSTM: backend torch") == 1
    with pytest.raises(RuntimeError, match=r"cannot run: CPU tensors .* TRITON_INTERPRET=1"):
        ChannelGroupLSTM(STAGES, backend="triton")(inputs())
    with pytest.raises(RuntimeError, match="float64"):
        ChannelGroupLSTM(STAGES, backend="triton")(inputs(dtype=torch.float64))
    with pytest.raises(ValueError, match="'cuda' is not one of auto, triton, torch"):
        channel_group_lstm(inputs(), auto.weights(), auto.stages, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch is empty"):
        channel_group_lstm(inputs(0), auto.weights(), auto.stages)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weights_of_other_shapes_are_refused(backend: op.Backend, triton_on_cpu: None) -> None:
    """Kernels take the stages' word for them, and would read past their ends."""
    module = ChannelGroupLSTM(STAGES, backend=backend)
    first, second = module.weights()
    for wrong in (second._replace(ih=second.ih.transpose(1, 2)), second._replace(bias_hh=first.bias_hh)):
        with pytest.raises(ValueError, match=r"the weights of stage 1 are .*; it needs two of \[2, 36, 9\]"):
            channel_group_lstm(inputs(), [first, wrong], module.stages, backend=backend)
