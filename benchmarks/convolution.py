"""When is a convolution faster as a product of matrices?  python -m benchmarks.convolution  (a minute on two cores)

The convolutions of ResNet-18's conv5 on the CPU, forward and backward, as nn.Conv2d and as the product that
fastnet.network.convolution takes on small maps; here it is timed on all of them. In bfloat16 under autocast, as in
training. Writes convolution.csv; `taken` says whether a network takes the product there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.harness import Laps, Table
from fastnet.cli import run_command
from fastnet.network.convolution import SMALL, product

IMAGE_SIZES = (32, 64, 128, 224)
LAYERS = ((512, 512, 1), (256, 512, 2))  # channels in and out, stride
DTYPES = (torch.float32, torch.bfloat16)
CONVOLUTION, PRODUCT = "nn.Conv2d", "product of matrices"
KEYS = ("image_size", "channels_in", "stride", "batch", "dtype", "quantity")


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


def measure(table: Table, case: dict[str, Any], dtype: torch.dtype, *, seconds: float) -> None:
    """Rows of both ways for one convolution."""
    stride, side = case["stride"], case["image_size"] // 32
    conv = nn.Conv2d(case["channels_in"], case["channels_out"], 3, stride, padding=1, bias=False)
    conv.to(memory_format=torch.channels_last)
    x = torch.randn(case["batch"], case["channels_in"], side * stride, side * stride, dtype=dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    print(
        f"{case['channels_in']} to 512 channels, output {side}x{side}, batch {case['batch']}, {case['dtype']}"
    )
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        CONVOLUTION: conv,
        PRODUCT: lambda x: product(x, conv.weight, stride),
    }
    candidates = {name: candidate(conv, compute, x) for name, compute in ways.items()}
    taken = "product" if side * side <= SMALL[dtype] else "convolution"
    times = harness.alternate(candidates, torch.device("cpu"), seconds=seconds)
    for name, laps in times.items():
        for lap, samples in laps.items():
            table.add(case, name, lap, "ms", samples, taken=taken)


def main(argv: Sequence[str]) -> None:
    args = harness.parser("convolution", __doc__).parse_args(argv)
    torch.set_num_threads(args.threads)
    table = Table("convolution", quick=args.quick)
    for size in IMAGE_SIZES:
        for channels_in, channels_out, stride in LAYERS:
            for dtype in DTYPES:
                case = {"image_size": size, "channels_in": channels_in, "channels_out": channels_out}
                case |= {"stride": stride, "batch": 32 if size == 224 else 128}
                named = {**case, "dtype": str(dtype).removeprefix("torch."), "threads": args.threads}
                measure(table, named, dtype, seconds=0.2 if args.quick else 2)
    harness.mark_ratios(table.rows, CONVOLUTION, KEYS)
    table.write()


if __name__ == "__main__":
    run_command(main)
