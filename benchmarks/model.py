"""What the compiled kernels imply for GPUs that are not here: counts, and the times that these cannot go below.

    python -m benchmarks.lstm --model

Counts come from running the compiled sm_80 code on the CPU (kernels/ptxrun) for one group and one tile of the batch
at two lengths: between them every count is a straight line in the steps, which gives the whole call. Registers and
shared memory come from cross-compiling for each architecture. A bound is the largest of the times that one resource
needs at its full rate; a kernel cannot be faster, and may be slower: latencies, and resources that wait for each other,
are not in it. All of it is modelled, nothing measured. On sm_90 the compiler may choose other instructions for the
GEMMs than the sm_80 code that is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.model_tables import tables
from fastnet_kernels import (
    ChannelGroupLSTM,
    Stage,
    fused_backward,
    fused_forward,
    gemm,
    launch,
    packing,
    plan,
)
from ptxrun import cross_compile, execute_ptx

STAGES = {"conv4": Stage(4, 64, 196), "conv5": Stage(8, 64, 49)}  # the paper's
STEPS = (8, 16)  # with a tile of 16 images these are whole tiles of every kernel
BATCHES = (64, 256, 1024)
RECURRENT = ("forward_kernel", "backward_kernel")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU as published; the boost clock of tensor-core work is taken as held."""

    arch: int
    sms: int
    ghz: float
    tensor: int  # bf16 floating point operations a clock and SM, dense; H100's is wgmma's, mma.sync has less
    l2: int  # bytes a clock, the whole GPU
    dram: float  # GB/s
    source: str
    issue: int = 4  # warp instructions a clock and SM: its four schedulers (both whitepapers)
    shared: int = (
        1  # wavefronts of 128 bytes a clock and SM: 32 banks of 4 bytes (CUDA C++ Best Practices Guide)
    )


# The only hardware figures of the project; kernels/README.md takes its tables from what they lead to.
GPUS = {
    "A100 SXM 80 GB": Gpu(
        arch=80,
        sms=108,
        ghz=1.41,
        tensor=2048,
        l2=5120,
        dram=2039.0,
        source="NVIDIA A100 Tensor Core GPU Architecture (whitepaper, 2020); memory: A100 datasheet, 80 GB",
    ),
    "H100 SXM": Gpu(
        arch=90,
        sms=132,
        ghz=1.83,
        tensor=4096,
        l2=5120,
        dram=3350.0,
        source="NVIDIA H100 Tensor Core GPU Architecture (whitepaper, 2022: 989.4 TFLOPS dense bf16 at 1.83 GHz);"
        " memory: H100 datasheet; L2: not published, the A100's",
    ),
}


def executed(hidden: int, steps: int) -> dict[str, Counter[str]]:
    """What forward and backward of one group and 16 images do, by kernel."""
    batch = plan.BATCH_TILE
    module = ChannelGroupLSTM([(1, steps, hidden)])
    x = torch.randn(batch, hidden, 1, steps).to(DTYPE).permute(0, 3, 1, 2)  # [B, T, H, 1] channels_last
    dout = torch.randn(batch, hidden).to(DTYPE)
    with torch.no_grad(), execute_ptx(packing, gemm, fused_forward, fused_backward) as runs:
        given = ([x], module.weights(), module.stages)
        _, *saved = launch.forward(*given, save=True, recompute=False)
        launch.backward(dout, *given, *saved, needs_dx=True)
    counts: dict[str, Counter[str]] = {}
    for kernel, launches in runs.items():
        counts[kernel] = Counter()
        for stats in launches:
            counts[kernel].update(
                {
                    "instructions": stats.instructions,
                    "mma": stats.mma,
                    "mma flops": stats.mma_flops,
                    "barriers": stats.barriers,
                    "bytes through L2": 32 * stats.total["global sectors"],
                    "bytes copied to shared": stats.cp_async_bytes,
                    "shared wavefronts": stats.total["shared wavefronts"],
                    "bytes touched": sum(r + w for r, w in stats.unique.values()),
                }
            )
    return counts


@dataclass(frozen=True)
class Line:
    """A count of one group and 16 images: at the start, and by step."""

    fixed: float
    step: float


def lines(hidden: int, lengths: tuple[int, int] = STEPS) -> dict[str, dict[str, Line]]:
    """Kernel -> count -> its line through the two lengths."""
    short, long = (executed(hidden, steps) for steps in lengths)
    found: dict[str, dict[str, Line]] = {}
    for kernel, counts in short.items():
        found[kernel] = {}
        for name in counts:
            step = (long[kernel][name] - counts[name]) / (lengths[1] - lengths[0])
            found[kernel][name] = Line(counts[name] - step * lengths[0], step)
    return found


def bound(
    gpu: Gpu, parts: Sequence[tuple[Stage, Mapping[str, Line]]], batch: int, *, recurrent: bool
) -> tuple[float, str]:
    """(microseconds, the resource that takes them) of one kernel over all `parts`, (stage, its lines).

    Besides the whole GPU's rates, a recurrent kernel is held by the chain of one thread block's steps on one SM.
    """
    tiles = launch.padded_batch(batch) // plan.BATCH_TILE
    total: Counter[str] = Counter()
    chain = 0.0
    for stage, line in parts:
        steps, blocks = stage.seq_len, stage.groups * tiles
        # A GEMM's fixed part is of its sums over many tiles: counted once a group, it is not counted too often.
        starts = blocks if recurrent else stage.groups
        for name, own in line.items():
            total[name] += own.fixed * starts + own.step * steps * blocks  # type: ignore[assignment]
        # Weights are read from DRAM once a group and not once a tile: they are in the fixed part.
        total["dram"] += (
            line["bytes touched"].fixed * stage.groups + line["bytes touched"].step * steps * blocks
        )  # type: ignore[assignment]
        one = {name: own.step for name, own in line.items()}
        clocks = (
            one["mma flops"] / gpu.tensor,
            one["instructions"] / gpu.issue,
            one["shared wavefronts"] / gpu.shared,
        )
        chain = max(chain, max(clocks) * steps)
    clock = gpu.ghz * 1e3  # per microsecond
    times = {
        "tensor": total["mma flops"] / (gpu.tensor * gpu.sms * clock),
        "issue": total["instructions"] / (gpu.issue * gpu.sms * clock),
        "shared": total["shared wavefronts"] / (gpu.shared * gpu.sms * clock),
        "l2": total["bytes through L2"] / (gpu.l2 * clock),
        "dram": total["dram"] / (gpu.dram * 1e3),
    }
    if recurrent:
        times["steps of one block"] = chain / clock
    worst = max(times, key=lambda name: times[name])
    return times[worst], worst


def static(arch: int) -> dict[str, dict[str, int]]:
    """Registers a thread, bytes of shared memory and instructions in the code of the recurrent kernels."""
    plans = plan.plan(tuple(STAGES.values()), DTYPE, arch, save=True)
    kernels = {
        "forward_kernel": fused_forward.forward_kernel,
        "backward_kernel": fused_backward.backward_kernel,
    }
    kinds = dict.fromkeys(("gates", "h", "packed", "out", "dout", "dgates"), DTYPE)
    kinds |= dict.fromkeys(("c", "carry"), torch.float32)
    found = {}
    for name, kernel in kernels.items():
        constants: dict[str, Any] = {"PLANS": plans, "R": plan.BATCH_TILE}
        if name == "forward_kernel":
            constants |= {"STATES": True, "GATES": True}
        pointers = {n: kinds[n] for n in kernel.arg_names if n in kinds}
        options = launch.recurrent_options(DTYPE, forward=name == "forward_kernel", split=False)
        r = cross_compile(kernel, arch, pointers, constants, **options)
        found[name] = {
            "registers": r.registers,
            "shared bytes": r.shared,
            "local bytes": r.local + r.stack,
            "tensor instructions in the code": r.count("HMMA|HGMMA"),
        }
    return found


def main(*, lengths: tuple[int, int] = STEPS, folder: Path = harness.RESULTS / "modelled") -> Path:
    rows: list[dict[str, Any]] = []

    def put(
        stage: str, kernel: str, where: str, quantity: str, unit: str, value: float, note: str = ""
    ) -> None:
        rows.append(
            {
                "benchmark": "model",
                "label": "modelled",
                "stage": stage,
                "kernel": kernel,
                "where": where,
                "quantity": quantity,
                "unit": unit,
                "value": f"{value:.6g}",
                "note": note,
                **harness.about(),
            }
        )
        print(
            f"  {stage:<12}{kernel:<24}{where:<16}{quantity:<36}{value:>14.6g} {unit:<10}{note}", flush=True
        )

    print("modelled, not measured")
    counted = {stage: lines(sizes.hidden, lengths) for stage, sizes in STAGES.items()}
    for stage, kernels in counted.items():
        for kernel, counts in kernels.items():
            for name, line in counts.items():
                put(stage, kernel, "sm_80", name, "per step", line.step, "one group, 16 images")
    for arch in plan.LAUNCH:
        for kernel, facts in static(arch).items():
            for name, value in facts.items():
                put("conv4,conv5", kernel, f"sm_{arch}", name, "", value)
    for name, gpu in GPUS.items():
        for batch in BATCHES:
            whole = 0.0
            for kernel in counted["conv4"]:
                parts = [(STAGES[stage], counted[stage][kernel]) for stage in STAGES]
                micro, why = bound(gpu, parts, batch, recurrent=kernel in RECURRENT)
                put("conv4,conv5", kernel, name, f"at least, batch {batch}", "us", micro, why)
                whole += micro
            put("conv4,conv5", "all", name, f"at least, batch {batch}", "us", whole)
        for key, value in vars(gpu).items():
            if key != "source":
                put("", "", name, f"parameter {key}", "", value, gpu.source)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.csv"
    harness.write_csv(path, rows)
    print(path, *tables(rows), sep="\n\n")
    return path
