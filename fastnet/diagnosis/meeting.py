"""One rank of the check that ranks meet: started by torchrun, it sums as many numbers as ResNet-18 has gradients.

python -m fastnet.diagnosis.meeting SECONDS
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from fastnet.cli import run_command
from fastnet.distributed.ranks import joined
from fastnet.errors import InputError

GRADIENTS = 11_279_112


def main(argv: Sequence[str]) -> dict[str, Any]:
    with joined(float(argv[0])) as runtime:
        expected = runtime.world_size * (runtime.world_size + 1) // 2
        numbers = torch.empty(GRADIENTS, device=runtime.device)
        seconds = []
        for _ in range(3):  # NCCL makes its connections in the first
            numbers.fill_(runtime.rank + 1)
            started = time.perf_counter()
            right = bool((runtime.sum_(numbers) == expected).all())
            seconds.append(time.perf_counter() - started)
        with runtime.agree():
            if not right:
                raise InputError(f"rank {runtime.rank}: the sum over the ranks is wrong")
        if runtime.is_main:
            print(f"{1e3 * min(seconds):.1f}")
    return {}


if __name__ == "__main__":
    run_command(main)
