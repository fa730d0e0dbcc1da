"""Finds launch-table rows for the GPU at hand: python -m fastnet_kernels.tune --stages 4x64x196,8x64x49.

Nothing is tuned by itself, at import or in a first step: put the rows it prints into LAUNCH in plan.py. A batch that is
split over more programs (see plan.py) uses little of its row and says nothing about it. Such a batch is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch

from .module import ChannelGroupLSTM
from .naive import Stage
from .plan import (
    BATCH_TILE,
    BLOCKED,
    LAUNCH,
    RESIDENT,
    STREAMED,
    Tile,
    architecture,
    decide,
    is_split,
    multiprocessors,
    padded_batch,
)


def candidates(hidden: int) -> Iterator[Tile]:
    """Rows that could serve a hidden size: where W_hh is kept, pipeline depths, block of K."""
    if hidden <= 64:
        yield Tile(hidden, RESIDENT, 16 if hidden <= 16 else 32, 16 if hidden <= 16 else 32, 3, 3)
    for forward, backward in product((2, 3, 4), repeat=2):
        if hidden <= 256:
            yield Tile(hidden, STREAMED, 32, 64, forward, backward)
        for block in (32, 64, 128):
            yield Tile(hidden, BLOCKED, 32, block, forward, backward)


@contextmanager
def served_by(tile: Tile) -> Iterator[None]:
    """Makes a row the whole table of this GPU."""
    before = dict(LAUNCH)
    LAUNCH[architecture(torch.device("cuda"))] = (tile,)
    try:
        yield
    finally:
        LAUNCH.clear()
        LAUNCH.update(before)


def splits(stage: Stage, tile: Tile, batch: int, dtype: torch.dtype) -> bool:
    """Whether a batch would be split with a row."""
    device = torch.device("cuda")
    tiles, processors = padded_batch(batch) // BATCH_TILE, multiprocessors(device)
    with served_by(tile):
        plans = decide([stage], dtype, architecture(device), save=True, tiles=tiles, processors=processors)
    return is_split(plans)


def milliseconds(stage: Stage, tile: Tile, batch: int, dtype: torch.dtype) -> float:
    """Median time of forward and backward of one stage with a row, infinite if it cannot be launched."""
    import triton
    from triton.runtime.errors import OutOfResources

    from . import launch

    device = torch.device("cuda")
    module = ChannelGroupLSTM([stage], backend="triton").to(device)
    x = torch.randn(batch, stage.groups * stage.seq_len, stage.hidden, 1, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    dout = torch.randn(batch, module.out_features, device=device, dtype=dtype)
    weights = module.weights()

    def step() -> None:
        with torch.no_grad():
            _, *saved = launch.forward([x], weights, [stage], save=True, recompute=False)
            launch.backward(dout, [x], weights, [stage], *saved, needs_dx=True)

    try:
        with served_by(tile):
            return triton.testing.do_bench(step, return_mode="median")
    except OutOfResources:
        return float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastnet_kernels.tune", description=__doc__)
    parser.add_argument("--stages", required=True, help="GROUPSxSTEPSxHIDDEN, comma separated")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args()
    stages = [Stage(*map(int, s.split("x"))) for s in arguments.stages.split(",")]
    if not torch.cuda.is_available():
        print("error: tuning needs an NVIDIA GPU", file=sys.stderr)
        return 2
    batch, dtype = arguments.batch, getattr(torch, arguments.dtype)
    for stage in stages:
        if any(splits(stage, tile, batch, dtype) for tile in candidates(stage.hidden)):
            print(f"error: --batch {batch}: {stage} would be split; take more images", file=sys.stderr)
            return 2
    print(f"rows for sm_{architecture(torch.device('cuda'))}:")
    for stage in stages:
        times = {tile: milliseconds(stage, tile, batch, dtype) for tile in candidates(stage.hidden)}
        best = min(times, key=lambda tile: times[tile])
        print(f"{best}  # {times[best]:.3f} ms forward and backward, {stage}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
