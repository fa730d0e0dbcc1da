"""3x3 convolutions on a CPU: small maps as products of matrices, larger ones with Winograd's gradient of the weight.

`python -m benchmarks.convolution` times both beside oneDNN's convolutions.

Shapes: B images, C and D channels in and out, H and W height and width of the input, h and w of the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from fastnet.network import winograd

# Positions of the output, h * w, up to which the product is taken. conv5 has 4 for images of 64 px, 16 for 128 px.
SMALL = {torch.float32: 4, torch.bfloat16: 16}
# Instructions for which oneDNN computes the weight's gradient more slowly, and how many tiles a batch has to have.
SLOW = ("AVX2",)
ENOUGH = 128


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1 and without a bias, whose weight is `conv`'s own.

    On a CPU, small maps are convolved by `product`, and `has_winograd` says where the weight's gradient is Winograd's.
    In all other cases, and in what is compiled or exported, it is the convolution that it was made of.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, 3, conv.stride[0], padding=1, bias=False, device="meta"
        )
        self.weight = conv.weight  # [D, C, 3, 3]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, h, w], both channels_last."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            height, width = output_size(x, self.stride[0])
            if height * width <= SMALL.get(x.dtype, 0):
                return product(x, self.weight, self.stride[0])
            if self.has_winograd(x):
                return convolve(x, self.weight)
        return super().forward(x)

    def has_winograd(self, x: Tensor) -> bool:
        """Whether the weight's gradient is taken, and faster, by Winograd's algorithm."""
        tiles = winograd.tiles_of(x.shape[2], x.shape[3])
        return (
            torch.backends.cpu.get_cpu_capability() in SLOW
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and self.stride == (1, 1)
            and self.in_channels % 32 == 0  # its transforms compute with vectors of channels
            and 16 * tiles <= 2 * x.shape[2] * x.shape[3]  # not mostly padding
            and tiles * len(x) >= ENOUGH
        )


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution with stride 1 and padding 1; the weight's gradient is by Winograd's algorithm.

    x: [B, C, H, W] and weight: [D, C, 3, 3], both float32 and channels_last -> [B, D, H, W], channels_last.
    """
    y: Tensor = _WithWinograd.apply(x, weight)
    return y


class _WithWinograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = conv2d_input(x.shape, weight, dy, padding=1) if ctx.needs_input_grad[0] else None
        return dx, winograd.weight_gradient(x, dy)


def product(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The convolution with padding 1: the nine neighbours of each position side by side, times the weight.

    x: [B, C, H, W] and weight: [D, C, 3, 3], both channels_last -> [B, D, h, w], channels_last, in x's type.
    """
    y: Tensor = _Product.apply(x, weight, stride)
    return y


class _Product(torch.autograd.Function):
    """Its gradients are two more products. Autograd's own would clear and add nine copies of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        height, width = output_size(x, stride)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [B, H + 2, W + 2, C]
        neighbours = [padded[place] for place in _places(height, width, stride)]  # [B, h, w, C] each
        matrix = torch.cat(neighbours, dim=3).flatten(0, 2)  # [B * h * w, 9 * C]
        flat = weight.permute(0, 2, 3, 1).flatten(1).to(x.dtype)  # [D, 9 * C]
        ctx.save_for_backward(matrix, flat)
        ctx.sizes, ctx.stride, ctx.weight_dtype = x.shape, stride, weight.dtype
        y = matrix @ flat.T  # [B * h * w, D]
        return y.view(len(x), height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        matrix, flat = ctx.saved_tensors
        dy = dy.permute(0, 2, 3, 1)  # [B, h, w, D]
        rows = dy.flatten(0, 2)  # [B * h * w, D]
        images, channels, height, width = ctx.sizes
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            parts = (rows @ flat).view(*dy.shape[:3], 9, channels)
            padded = parts.new_zeros(images, height + 2, width + 2, channels)
            for n, place in enumerate(_places(dy.shape[1], dy.shape[2], ctx.stride)):
                padded[place] += parts[..., n, :]
            dx = padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[1]:
            dflat = (rows.T @ matrix).to(ctx.weight_dtype)  # [D, 9 * C]
            dweight = dflat.view(-1, 3, 3, channels).permute(0, 3, 1, 2)
        return dx, dweight, None


def _places(height: int, width: int, stride: int) -> Iterator[tuple[slice, slice, slice]]:
    """Where the neighbours of the output's positions lie in the padded input, row by row."""
    for row in range(3):
        for column in range(3):
            yield (
                slice(None),
                slice(row, row + stride * height, stride),
                slice(column, column + stride * width, stride),
            )


def output_size(x: Tensor, stride: int) -> tuple[int, int]:
    """h and w."""
    return (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1


def replace_convolutions(module: nn.Module) -> None:
    """Replaces the 3x3 convolutions in `module`, a ResNet, by Conv3x3, which take their weights and names."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and child.padding == (1, 1):
                setattr(parent, name, Conv3x3(child))
