"""3x3 convolutions as products of matrices: their numbers, when they are taken, and that nobody else sees them.

Shapes: B images, C and D channels in and out, H and W height and width of the input, h and w of the output.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnet.config import Config
from fastnet.network import convolution
from fastnet.network.convolution import MatrixConv2d
from fastnet.network.network import Network

B, C, D = 5, 16, 24


def rounded(count: int, dtype: torch.dtype) -> float:
    """The relative error of `count` roundings to `dtype` in a row (gamma_n; Higham 2002, section 3.1)."""
    unit = count * torch.finfo(dtype).eps / 2
    return unit / (1 - unit)


def gradients(x: Tensor, weight: Tensor, dy: Tensor, stride: int) -> list[Tensor]:
    """nn.Conv2d in float64: output, gradient of the input, gradient of the weight."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    y = F.conv2d(x, weight, stride=stride, padding=1)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy.double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (3, 3), (5, 2)], ids=str)
def test_it_is_the_convolution(
    size: tuple[int, int], stride: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the error that sums of so many terms can have in any order, which is relative to the sum of their sizes.

    Products are summed in float32 and rounded to `dtype` once. The gradient of the input gathers nine of these sums.
    """
    monkeypatch.setattr(convolution, "SMALL", {dtype: 25})
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(C, D, 3, stride, padding=1, bias=False).to(dtype)
    conv.to(memory_format=torch.channels_last)
    x = torch.randn(B, C, *size, generator=generator).to(dtype, memory_format=torch.channels_last)
    x.requires_grad_()
    matrix = MatrixConv2d(conv)
    with Operators() as seen:
        y = matrix(x)
    assert "aten.mm.default" in seen.names and "aten.convolution.default" not in seen.names
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn(y.shape, generator=generator).to(dtype)
    own = [y.detach(), *torch.autograd.grad(y, (x, matrix.weight), dy)]

    right = gradients(x, conv.weight, dy, stride)
    sizes = gradients(x.abs(), conv.weight.abs(), dy.abs(), stride)
    positions = y[0, 0].numel()
    terms, roundings = (9 * C, D, B * positions), (1, 9, 1)
    for mine, exact, most, count, times in zip(own, right, sizes, terms, roundings, strict=True):
        bound = ((1 + rounded(count, torch.float32)) * (1 + rounded(times, dtype)) - 1) * most
        assert mine.dtype == dtype and bool(((mine.double() - exact).abs() <= bound).all())


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "side", "taken"),
    [
        (torch.float32, 2, True),
        (torch.float32, 3, False),
        (torch.bfloat16, 4, True),
        (torch.bfloat16, 5, False),
        (torch.float64, 1, False),
    ],
    ids=str,
)
def test_only_small_maps_are_products(dtype: torch.dtype, side: int, taken: bool) -> None:
    conv = MatrixConv2d(nn.Conv2d(4, 4, 3, padding=1, bias=False, dtype=dtype))
    with Operators() as seen:
        conv(torch.randn(2, 4, side, side, dtype=dtype))
    assert ("aten.convolution.default" not in seen.names) == taken


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_a_network_has_torchvisions_tensors(stem: str) -> None:
    """Their names, order, and first values: making the products draws no random numbers."""
    torch.manual_seed(0)
    network = Network(Config(stem=stem, image_size=64), 3)
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    own, theirs = network.backbone.state_dict(), resnet.state_dict()
    assert list(own) == [name for name in theirs if not name.startswith("fc.")]
    assert [name for name in own if not torch.equal(own[name], theirs[name])] == (
        ["conv1.weight"] if stem == "small" else []
    )
    threes = [m for m in network.backbone.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(isinstance(conv, MatrixConv2d) and conv.weight.device.type == "cpu" for conv in threes)
    assert len(threes) == 16 + (stem == "small")


@pytest.mark.parametrize("way", ["exported", "compiled"])
def test_what_is_exported_or_compiled_has_convolutions(way: str) -> None:
    conv = MatrixConv2d(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    x = torch.randn(2, 4, 2, 2)
    graphs: list[torch.fx.Graph] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    if way == "exported":
        graphs.append(torch.export.export(conv, (x,), strict=False).graph)
    else:
        torch.compile(conv, backend=backend, fullgraph=True)(x)
    (graph,) = graphs
    (call,) = [node for node in graph.nodes if node.op == "call_function"]
    assert "conv2d" in str(call.target)
