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
from benchmarks.model_counts import DTYPE, STEPS, Line, executed_split, lines
from benchmarks.model_tables import SPLIT, tables
from fastnet_kernels import Stage, fused_backward, fused_forward, launch, plan
from ptxrun import cross_compile

STAGES = {"conv4": Stage(4, 64, 196), "conv5": Stage(8, 64, 49)}  # the paper's
BATCHES = (32, 64, 256, 1024)
RECURRENT = ("forward_kernel", "backward_kernel")


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
    # The next two are assumptions. As tensor, of mma.sync: the A100's, half of what wgmma does on the H100.
    mma: int = 2048
    # Clocks of a hit in L2: 222 to 339 were measured over the multiprocessors of an L40 (arXiv 2606.22588).
    latency: int = 300
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


# Latencies of L2 that follow each other in a meeting: the stores are acknowledged (1), the counter is added to (1), a
# program that waits reads it, half a read too late on average (1.5), and then reads what the others stored (1).
MEETING = 4.5


def split_step(gpu: Gpu, line: Mapping[str, Line], parts: int, together: int) -> dict[str, float]:
    """Clocks of a step of a split group, by what takes them, if nothing overlaps; `together` programs share an SM.

    Latencies within the SM (barriers, special functions) come on top.
    """
    one = {name: own.step / parts for name, own in line.items()}
    return {
        "meeting": MEETING * gpu.latency,
        "shared": together * one["shared wavefronts"] / gpu.shared,
        "tensor": together * one["mma flops"] / gpu.mma,
        "issue": together * one["instructions"] / gpu.issue,
        "l2": together * one["bytes through L2"] / (gpu.l2 / gpu.sms),
    }


def static(arch: int, *, split: bool) -> dict[str, dict[str, int]]:
    """Registers a thread, bytes of shared memory and instructions in the code of the recurrent kernels."""
    plans = plan.plan(tuple(STAGES.values()), DTYPE, arch, save=True, split=split)
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
        options = launch.recurrent_options(DTYPE, forward=name == "forward_kernel", split=split)
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
    of_split = lines(STAGES["conv4"].hidden, lengths, executed_split)
    for kernel, counts in of_split.items():
        for name, line in counts.items():
            note = "one group, 16 images, all programs"
            put("conv4", f"{kernel}, split", "sm_80", name, "per step", line.step, note)
    for arch in plan.LAUNCH:
        for split in (False, True):
            for kernel, facts in static(arch, split=split).items():
                for name, value in facts.items():
                    put("conv4,conv5", f"{kernel}{', split' * split}", f"sm_{arch}", name, "", value)
    for name, gpu in GPUS.items():
        for batch in BATCHES:
            whole = 0.0
            for kernel in counted["conv4"]:
                parts = [(STAGES[stage], counted[stage][kernel]) for stage in STAGES]
                micro, why = bound(gpu, parts, batch, recurrent=kernel in RECURRENT)
                put("conv4,conv5", kernel, name, f"at least, batch {batch}", "us", micro, why)
                whole += micro
            put("conv4,conv5", "all", name, f"at least, batch {batch}", "us", whole)
        for batch in SPLIT:
            tiles = launch.padded_batch(batch) // plan.BATCH_TILE
            paper = tuple(STAGES.values())
            plans = plan.decide(paper, DTYPE, gpu.arch, save=True, tiles=tiles, processors=gpu.sms)
            together = -(-plan.programs(plans) * tiles // gpu.sms)
            for kernel in RECURRENT if plan.is_split(plans) else ():
                clocks = split_step(gpu, of_split[kernel], plans[0].parts, together)
                micro = sum(clocks.values()) * plans[0].steps / (gpu.ghz * 1e3)
                note = " ".join(f"{what} {n:.0f}" for what, n in clocks.items())
                put("conv4,conv5", f"{kernel}, split", name, f"about, batch {batch}", "us", micro, note)
        for key, value in vars(gpu).items():
            if key != "source":
                put("", "", name, f"parameter {key}", "", value, gpu.source)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.csv"
    harness.write_csv(path, rows)
    print(path, *tables(rows), sep="\n\n")
    return path
