"""The tables of kernels/README.md, from the rows of results/modelled/model.csv; a test holds the two together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

KERNELS = ("forward_kernel", "backward_kernel")  # the recurrent ones
BATCH = 256
WORK = {  # row of the table -> quantity, its unit in the table
    "tensor-core instructions (m16n8k16)": ("mma", ""),
    "warp instructions": ("instructions", ""),
    "barriers": ("barriers", ""),
    "copied to shared memory": ("bytes copied to shared", "KB"),
    "through L2": ("bytes through L2", "KB"),
    "wavefronts of shared memory": ("shared wavefronts", ""),
}


def tables(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Three tables in Markdown: work of a step, registers and shared memory, bounds of a call of BATCH images."""
    return [work(rows), resources(rows), bounds(rows)]


def work(rows: Sequence[Mapping[str, str]]) -> str:
    value = {
        (r["stage"], r["kernel"], r["quantity"]): float(r["value"]) for r in rows if r["unit"] == "per step"
    }
    columns = [(stage, kernel) for stage in unique(stage for stage, _, _ in value) for kernel in KERNELS]
    body = []
    for label, (quantity, unit) in WORK.items():
        numbers = (value[stage, kernel, quantity] for stage, kernel in columns)
        body.append([label, *(f"{n / 1000:,.0f} KB" if unit else f"{n:,.0f}" for n in numbers)])
    return markdown(["", *(f"{stage} {plain(kernel)}" for stage, kernel in columns)], body)


def resources(rows: Sequence[Mapping[str, str]]) -> str:
    value = {(r["kernel"], r["where"], r["quantity"]): float(r["value"]) for r in rows}
    body = []
    for where in unique(r["where"] for r in rows if r["quantity"] == "registers"):
        registers = (f"{value[kernel, where, 'registers']:.0f}" for kernel in KERNELS)
        shared = (f"{value[kernel, where, 'shared bytes'] / 1024:.1f} KB" for kernel in KERNELS)
        body.append([where, *registers, *shared])
    heads = [
        f"{quantity}, {plain(kernel)}" for quantity in ("registers", "shared memory") for kernel in KERNELS
    ]
    return markdown(["", *heads], body)


def bounds(rows: Sequence[Mapping[str, str]]) -> str:
    rows = [r for r in rows if r["quantity"] == f"at least, batch {BATCH}"]
    gpus = unique(r["where"] for r in rows)
    body = []
    for kernel in unique(r["kernel"] for r in rows):
        own = {r["where"]: r for r in rows if r["kernel"] == kernel}
        limits = (f" ({own[gpu]['note']})" if own[gpu]["note"] else "" for gpu in gpus)
        times = (f"{float(own[gpu]['value']):.0f}" for gpu in gpus)
        body.append([plain(kernel), *(time + limit for time, limit in zip(times, limits, strict=True))])
    return markdown(["microseconds, at least", *gpus], body)


def plain(kernel: str) -> str:
    return kernel.removesuffix("_kernel").replace("_", " ")


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])
