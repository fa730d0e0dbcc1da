"""Which kernels does a training step run, and how long does each take?  python -m benchmarks.kernels  (needs a GPU)

A short profile of both networks where everything trains: torch.profiler over a few steps on one resident batch.
Writes kernels.csv, a row for each kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Table
from benchmarks.phase import OneBatch, at_phase
from benchmarks.trace import Trace, counts_of, kernels_of, traced
from fastnet.cli import run_command
from fastnet.config import paper
from fastnet.data.default import default_set
from fastnet.distributed.ranks import single_process
from fastnet.errors import InputError
from fastnet.input.streams import Batch

STEPS, WARMUP = 5, 5


def main(argv: Sequence[str]) -> None:
    args = harness.parser("kernels", __doc__).parse_args(argv)
    if not torch.cuda.is_available():
        raise InputError(
            "benchmarks.kernels: needs a GPU; without one, --profile-steps of train.py writes a trace"
        )
    runtime, data = single_process(), default_set(None)
    table = Table("kernels", quick=args.quick)
    for network in ("baseline", "lstm"):
        config = replace(paper(network), batch_size=256, weights="none", cuda_graph="off")
        x = torch.randn(config.batch_size, 3, config.image_size, config.image_size, device=runtime.device)
        y = torch.arange(config.batch_size, device=runtime.device) % len(data.classes)
        batch = Batch(
            x.to(runtime.image_dtype, memory_format=torch.channels_last), y, np.arange(config.batch_size)
        )
        with at_phase(config, "full", data, runtime, OneBatch(batch, 10**6)) as trainer:
            for _ in range(WARMUP):
                trainer.train_step()
            trace = Trace(traced(trainer.train_step, STEPS, runtime.device))
        case = {"network": network, "image_size": config.image_size, "batch": config.batch_size}
        for name, count in counts_of(trace, STEPS).items():
            table.add(case, "all", name, "a step", [count])
        for name, (times, microseconds) in kernels_of(trace, STEPS).items():
            table.add(case, name, "time", "us a step", [microseconds], times_a_step=times)
    table.write()


if __name__ == "__main__":
    run_command(main)
