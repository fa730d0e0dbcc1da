"""3x3 convolutions on a CPU: their numbers, which way is taken when, and that nobody else sees them.

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
from fastnet.network import convolution, winograd
from fastnet.network.convolution import Conv3x3
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
    matrix = Conv3x3(conv)
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


# B' and A of F(4x4, 3x3) (Lavin & Gray 2016).
B_T = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
A = torch.tensor(
    [[1, 0, 0, 0], [1, 1, 1, 1], [1, -1, 1, -1], [1, 2, 4, 8], [1, -2, 4, -8], [0, 0, 0, 1]],
    dtype=torch.float64,
)


def weight_gradient(x: Tensor, dy: Tensor, *, absolute: bool = False) -> Tensor:
    """Winograd's gradient of the weight in float64; or the sum of the sizes of all that is added up on its way."""
    b_t, a, g = (t.abs() if absolute else t for t in (B_T, A, winograd.G))
    x, dy = (t.detach().double().abs() if absolute else t.detach().double() for t in (x, dy))
    down, across = -x.shape[2] % 4, -x.shape[3] % 4
    inputs = F.pad(x, (1, 1 + across, 1, 1 + down)).unfold(2, 6, 4).unfold(3, 6, 4)  # [B, C, h, w, 6, 6]
    gradients = F.pad(dy, (0, across, 0, down)).unfold(2, 4, 4).unfold(3, 4, 4)  # [B, D, h, w, 4, 4]
    inner = torch.einsum("bchwij,bdhwij->dcij", b_t @ inputs @ b_t.T, a @ gradients @ a.T)
    return g.T @ inner @ g


@pytest.mark.parametrize("at_once", [B, 2, 1], ids=["together", "in parts", "image by image"])
@pytest.mark.parametrize("size", [(4, 4), (7, 7), (3, 3), (5, 10)], ids=str)
def test_winograds_gradient_is_the_convolutions(
    size: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the error of so many roundings, which is relative to the sizes of what is added up.

    Up to six roundings in each transform of a tile, one in their product, one for each tile in the sum, and 38 in the
    products with G, whose own values are rounded.
    """
    monkeypatch.setattr(winograd, "images_at_once", lambda count, c, d: at_once)
    monkeypatch.setattr(Conv3x3, "has_winograd", lambda conv, x: True)
    generator = torch.Generator().manual_seed(0)
    conv = Conv3x3(nn.Conv2d(32, 64, 3, padding=1, bias=False)).to(memory_format=torch.channels_last)
    x = torch.randn(B, 32, *size, generator=generator).to(memory_format=torch.channels_last)
    dy = torch.randn(B, 64, *size, generator=generator)
    x.requires_grad_()
    y = conv(x)
    with Operators() as seen:
        dx, dw = torch.autograd.grad(y, (x, conv.weight), dy)
    assert seen.names.count("aten.baddbmm_.default") == -(-B // at_once)
    assert dw.stride() == conv.weight.stride()

    right = gradients(x, conv.weight, dy, 1)
    sizes = gradients(x.abs(), conv.weight.abs(), dy.abs(), 1)
    torch.testing.assert_close(weight_gradient(x, dy), right[2])
    most = weight_gradient(x, dy, absolute=True)
    tiles = B * winograd.tiles_of(*size)
    assert bool(((dw.double() - right[2]).abs() <= rounded(tiles + 51, torch.float32) * most).all())
    for mine, exact, most, terms in ((y, right[0], sizes[0], 9 * 32), (dx, right[1], sizes[1], 9 * 64)):
        assert bool(((mine.double() - exact).abs() <= rounded(terms, torch.float32) * most).all())


def test_threads_share_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads for five images make the tiles that one makes."""
    images = torch.randn(B, 6, 9, 32, generator=torch.Generator().manual_seed(0))
    one, three = (torch.empty(B * 6, 36, 32) for _ in range(2))
    fill, _ = winograd.transforms(32)
    winograd.transform(fill, images, one, 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    winograd.transform(fill, images, three, 6)
    assert torch.equal(one, three)


def test_where_winograds_gradient_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(convolution, "SLOW", (capability,))

    def taken(shape: tuple[int, ...] = (32, 32, 8, 8), dtype: torch.dtype = torch.float32, stride: int = 1):
        conv = Conv3x3(nn.Conv2d(shape[1], 8, 3, stride, padding=1, bias=False, dtype=dtype))
        return conv.has_winograd(torch.empty(shape, dtype=dtype))

    assert taken()
    assert not taken(stride=2)
    assert not taken(dtype=torch.float64)
    assert not taken((32, 3, 8, 8))  # the small stem's channels
    assert not taken((31, 32, 8, 8))  # 124 tiles
    assert taken((128, 32, 3, 3)) and not taken((128, 32, 5, 5))  # 9 of 16 positions, 25 of 64
    with torch.no_grad():
        assert not taken()
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken()
    frozen = Conv3x3(nn.Conv2d(32, 8, 3, padding=1, bias=False)).requires_grad_(False)
    assert not frozen.has_winograd(torch.empty(32, 32, 8, 8))
    monkeypatch.setattr(convolution, "SLOW", ())
    assert not taken()


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
    conv = Conv3x3(nn.Conv2d(4, 4, 3, padding=1, bias=False, dtype=dtype))
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
    assert all(isinstance(conv, Conv3x3) and conv.weight.device.type == "cpu" for conv in threes)
    assert len(threes) == 16 + (stem == "small")


@pytest.mark.parametrize("way", ["exported", "compiled"])
def test_what_is_exported_or_compiled_has_convolutions(way: str) -> None:
    conv = Conv3x3(nn.Conv2d(4, 4, 3, padding=1, bias=False))
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
