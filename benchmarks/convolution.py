"""When are a network's own convolutions faster?  python -m benchmarks.convolution  (five minutes on two cores)

The 3x3 convolutions of ResNet-18 on the CPU, forward and backward, as nn.Conv2d, as the product of matrices that
fastnet.network.convolution takes on small maps, here timed on all of conv5's, and, in float32, with the gradient of the
weight by Winograd's algorithm. In bfloat16 under autocast, as in training. Writes convolution.csv; `taken` says which
of them a network takes there. The rows "error of the weight's gradient" are the root mean square of its difference from
float64, as a share of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Laps, Table
from fastnet.cli import run_command
from fastnet.network.convolution import SMALL, Conv3x3, convolve, product

IMAGE_SIZES = (32, 64, 128, 224)
# Channels in and out, stride, and how many times smaller than the image the output is.
LAYERS = ((64, 64, 1, 4), (128, 128, 1, 8), (256, 256, 1, 16), (512, 512, 1, 32), (256, 512, 2, 32))
CONVOLUTION, PRODUCT, WINOGRAD = "nn.Conv2d", "product of matrices", "Winograd's gradient"
KEYS = ("image_size", "channels_in", "channels_out", "stride", "batch", "dtype", "quantity")


def candidate(conv: nn.Conv2d, compute: Callable[[Tensor], Tensor], x: Tensor) -> harness.Candidate:
    """Forward, and backward to the input and the weight. x: [B, C, H, W]."""
    with torch.no_grad(), torch.autocast("cpu", x.dtype, enabled=x.dtype == torch.bfloat16):
        dy = torch.randn_like(compute(x))  # [B, D, h, w]

    def run(laps: Laps) -> None:
        with torch.autocast("cpu", x.dtype, enabled=x.dtype == torch.bfloat16):
            y = compute(x)
        laps("forward")
        torch.autograd.grad(y, (x, conv.weight), dy)
        laps("backward")

    return run


def error(compute: Callable[[Tensor], Tensor], conv: nn.Conv2d, x: Tensor) -> float:
    """The root mean square of the weight's gradient less that in float64, as a share of its own."""
    y = compute(x)
    dy = torch.randn_like(y)
    (dw,) = torch.autograd.grad(y, conv.weight, dy)
    exact = torch.nn.grad.conv2d_weight(x.detach().double(), dw.shape, dy.double(), conv.stride, conv.padding)
    return float((dw - exact).norm() / exact.norm())


def measure(table: Table, case: dict[str, Any], dtype: torch.dtype, side: int, *, seconds: float) -> None:
    """Rows of all ways for one convolution."""
    stride, channels = case["stride"], case["channels_in"]
    conv = nn.Conv2d(channels, case["channels_out"], 3, stride, padding=1, bias=False)
    conv.to(memory_format=torch.channels_last)
    x = torch.randn(case["batch"], channels, side * stride, side * stride, dtype=dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    print(
        f"{channels} to {case['channels_out']} channels, output {side}x{side}, batch {case['batch']}, {case['dtype']}"
    )
    ways: dict[str, Callable[[Tensor], Tensor]] = {CONVOLUTION: conv}
    if case["channels_out"] == 512:
        ways[PRODUCT] = lambda x: product(x, conv.weight, stride)
    if dtype == torch.float32 and stride == 1:
        ways[WINOGRAD] = lambda x: convolve(x, conv.weight)
    taken = WINOGRAD if Conv3x3(conv).has_winograd(x) else CONVOLUTION
    taken = PRODUCT if side * side <= SMALL[dtype] else taken
    candidates = {name: candidate(conv, compute, x) for name, compute in ways.items()}
    times = harness.alternate(candidates, torch.device("cpu"), seconds=seconds)
    for name, laps in times.items():
        for lap, samples in laps.items():
            table.add(case, name, lap, "ms", samples, taken=taken)
        if dtype == torch.float32:
            what = "error of the weight's gradient"
            table.add(case, name, what, "of its size", [error(ways[name], conv, x)], taken=taken)


def main(argv: Sequence[str]) -> None:
    args = harness.parser("convolution", __doc__).parse_args(argv)
    torch.set_num_threads(args.threads)
    table = Table("convolution", quick=args.quick)
    for size in IMAGE_SIZES:
        for channels_in, channels_out, stride, reduction in LAYERS:
            # Outside conv5 bfloat16 has one way only.
            for dtype in (torch.float32, torch.bfloat16) if reduction == 32 else (torch.float32,):
                case = {"image_size": size, "channels_in": channels_in, "channels_out": channels_out}
                case |= {"stride": stride, "batch": 32 if size == 224 else 128}
                named = {**case, "dtype": str(dtype).removeprefix("torch."), "threads": args.threads}
                measure(table, named, dtype, size // reduction, seconds=0.2 if args.quick else 2)
    harness.mark_ratios(table.rows, CONVOLUTION, KEYS)
    table.write()


if __name__ == "__main__":
    run_command(main)
