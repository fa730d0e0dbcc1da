"""How a training step should scale past one machine: a model, in which nothing is measured.

    python -m benchmarks.scaling [--images-per-s 5000] [--least-step-ms 4]

A step takes as long as its images need at one GPU's rate, or as long as launching its kernels takes if that is longer,
plus the part of the gradients' sums that the backward pass does not hide. Gradients are float32, in the buckets of
DistributedDataParallel (1 MiB, then 25 MiB, from the last layer to the first). A bucket's sum starts when backward has
passed its layers (time taken as proportional to parameters) and the previous bucket's sum has ended. A sum over n nodes
of g GPUs is a reduce-scatter and an all-gather in the node, 2 (g-1)/g bytes over a GPU's NVLink, and between them a
ring over the nodes of 2 (n-1)/n of the node's share over each of its network cards (the accounting of nccl-tests,
doc/PERFORMANCE.md), plus 2 (g-1) hops in the node and 2 log2(n) between nodes, as in a tree (Thakur, Rabenseifner and
Gropp 2005, sections 4.4 and 4.5).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.harness import RESULTS, about, write_csv
from fastnet.config import paper
from fastnet.network.network import Network

GPUS_PER_NODE, TRAIN_IMAGES = 8, 100_000
BACKWARD = 2 / 3  # of a step: backward has twice the forward's multiplications
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20


@dataclass(frozen=True)
class Cluster:
    """Bytes a second in each direction, and seconds a hop. Rates are 0.8 of the nominal ones, for protocol overhead."""

    name: str
    nvlink: float
    cards: int
    card: float
    hop_inside: float = 3e-6
    hop_between: float = 15e-6


CLUSTERS = (
    Cluster("8 cards of 400 Gbit/s a node, NVLink 450 GB/s", 0.8 * 450e9, 8, 0.8 * 50e9),
    Cluster("1 card of 100 Gbit/s a node, NVLink 300 GB/s", 0.8 * 300e9, 1, 0.8 * 12.5e9),
    Cluster("1 card of 25 Gbit/s a node, NVLink 300 GB/s", 0.8 * 300e9, 1, 0.8 * 3.125e9, hop_between=40e-6),
)


def buckets(network: Network) -> list[int]:
    """Bytes of DDP's gradient buckets in the order in which backward fills them."""
    filled, limit = [0], FIRST_BUCKET
    for parameter in reversed(list(network.parameters())):
        filled[-1] += 4 * parameter.numel()
        if filled[-1] >= limit:
            filled.append(0)
            limit = BUCKET
    return [size for size in filled if size]


def sum_seconds(size: int, cluster: Cluster, gpus: int) -> float:
    """An all-reduce of `size` bytes over `gpus` GPUs."""
    inside = min(gpus, GPUS_PER_NODE)
    nodes = gpus // inside
    seconds = 2 * (inside - 1) / inside * size / cluster.nvlink + 2 * (inside - 1) * cluster.hop_inside
    if nodes > 1:
        seconds += 2 * (nodes - 1) / nodes * size / (cluster.cards * cluster.card)
        seconds += 2 * math.log2(nodes) * cluster.hop_between
    return seconds


def step(
    sizes: list[int], cluster: Cluster, gpus: int, images: int, rate: float, least: float
) -> tuple[float, float]:
    """(seconds of a step, seconds of sums in it that backward does not hide) at `images` per GPU."""
    work = max(images / rate, least)
    ready, ended, passed = work * (1 - BACKWARD), 0.0, 0
    for size in sizes:
        passed += size
        filled = ready + work * BACKWARD * passed / sum(sizes)
        ended = max(ended, filled) + sum_seconds(size, cluster, gpus)
    return max(work, ended), max(0.0, ended - work)


def rows(rate: float, least: float) -> Iterator[dict[str, Any]]:
    for name in ("baseline", "lstm"):
        network = Network(paper(name), 200)
        sizes = buckets(network)
        for cluster in CLUSTERS:
            for scaling, batch in (("256 images per GPU", 0), ("4,096 images in all", 4096)):
                for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
                    images = batch // gpus if batch else 256
                    if images * gpus > TRAIN_IMAGES:
                        continue  # not one step in an epoch
                    seconds, exposed = step(sizes, cluster, gpus, images, rate, least)
                    steps = TRAIN_IMAGES // (images * gpus)
                    yield {
                        "benchmark": "scaling",
                        "label": "modelled",
                        "network": name,
                        "scaling": scaling,
                        **{f"cluster_{key}": value for key, value in asdict(cluster).items()},
                        "images_per_s_of_a_gpu": rate,
                        "least_step_ms": least * 1e3,
                        "gradient_mb": sum(sizes) / 1e6,
                        "buckets": len(sizes),
                        "gpus": gpus,
                        "images_per_gpu": images,
                        "step_ms": f"{seconds * 1e3:.3f}",
                        "exposed_sum_ms": f"{exposed * 1e3:.3f}",
                        "images_per_s": f"{images * gpus / seconds:.0f}",
                        "efficiency": f"{images / rate / seconds:.3f}",
                        "steps_per_epoch": steps,
                        "epoch_s": f"{steps * seconds:.2f}",
                        **about(),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "--images-per-s", type=float, default=5000.0, help="of one GPU; default: an assumption"
    )
    parser.add_argument(
        "--least-step-ms", type=float, default=4.0, help="at any batch; default: an assumption"
    )
    args = parser.parse_args()
    path = RESULTS / "modelled" / "scaling.csv"
    made = list(rows(args.images_per_s, args.least_step_ms / 1e3))
    write_csv(path, made)
    print("modelled, not measured")
    for row in made:
        if row["network"] == "lstm":
            shown = ("scaling", "cluster_name", "gpus", "images_per_gpu", "step_ms", "exposed_sum_ms")
            print(*(row[key] for key in (*shown, "images_per_s", "efficiency", "epoch_s")), sep=" | ")
    print(path)


if __name__ == "__main__":
    main()
