"""3x3 convolutions of small maps on a CPU, as products of matrices.

oneDNN computes a weight gradient of conv5 at 64 px (512 channels, 2x2) many times slower than the product of matrices
that it is: benchmarks/convolution.py has the ratios.

Shapes: B images, C and D channels in and out, H and W height and width of the input, h and w of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Positions of the output, h * w, up to which the product is the faster one for conv5.
SMALL = {torch.float32: 4, torch.bfloat16: 16}


class MatrixConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 and without a bias, whose weight is `conv`'s own.

    On a CPU, a small map's nine neighbours are laid side by side, and one matrix multiplication does the rest. In all
    other cases, and in what is exported, it is the convolution that it was made of.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, 3, conv.stride, padding=1, bias=False, device="meta"
        )
        self.weight = conv.weight  # [D, C, 3, 3]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, h, w], both channels_last."""
        step = self.stride[0]
        height, width = ((length - 1) // step + 1 for length in x.shape[2:])
        small = height * width <= SMALL.get(x.dtype, 0)
        if x.device.type != "cpu" or not small or torch.compiler.is_compiling():
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # [B, H + 2, W + 2, C]
        neighbours = [
            padded[:, row : row + step * height : step, column : column + step * width : step]
            for row in range(3)
            for column in range(3)
        ]
        matrix = torch.cat(neighbours, dim=3).flatten(0, 2)  # [B * h * w, 9 * C]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [D, 9 * C], a view in channels_last
        y = F.linear(matrix, weight)  # [B * h * w, D]
        return y.view(len(x), height, width, -1).permute(0, 3, 1, 2)


def multiply_small_maps(module: nn.Module) -> None:
    """Replaces the 3x3 convolutions in `module` that fit by MatrixConv2d, which take their weights and names."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and child.padding == (1, 1):
                setattr(parent, name, MatrixConv2d(child))
