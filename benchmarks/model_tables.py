"""The tables of kernels/README.md, from the rows of results/modelled/model.csv; a test holds the two together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

KERNELS = ("forward_kernel", "backward_kernel")  # the recurrent ones
BATCH = 256
SMALL, SPLIT = 32, (32, 64, 80)
WORK = {  # row of the table -> quantity, its unit in the table
    "tensor-core instructions (m16n8k16)": ("mma", ""),
    "warp instructions": ("instructions", ""),
    "barriers": ("barriers", ""),
    "copied to shared memory": ("bytes copied to shared", "KB"),
    "through L2": ("bytes through L2", "KB"),
    "wavefronts of shared memory": ("shared wavefronts", ""),
}


def tables(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Tables in Markdown: work of a step, registers and shared memory, the bounds of a call of BATCH images, and what
    small batches take split and not."""
    return [work(rows), resources(rows), bounds(rows), small_batches(rows)]


def work(rows: Sequence[Mapping[str, str]]) -> str:
    value = {
        (r["stage"], r["kernel"], r["quantity"]): float(r["value"]) for r in rows if r["unit"] == "per step"
    }
    columns = [(stage, kernel) for stage in unique(stage for stage, _, _ in value) for kernel in KERNELS]
    columns += [("conv4", f"{kernel}, split") for kernel in KERNELS]
    body = []
    for label, (quantity, unit) in WORK.items():
        numbers = (value[stage, kernel, quantity] for stage, kernel in columns)
        body.append([label, *(f"{n / 1000:,.0f} KB" if unit else f"{n:,.0f}" for n in numbers)])
    return markdown(["", *(f"{stage} {plain(kernel)}" for stage, kernel in columns)], body)


def resources(rows: Sequence[Mapping[str, str]]) -> str:
    value = {(r["kernel"], r["where"], r["quantity"]): float(r["value"]) for r in rows}
    both = (*KERNELS, *(f"{kernel}, split" for kernel in KERNELS))
    body = []
    for where in unique(r["where"] for r in rows if r["quantity"] == "registers"):
        registers = (f"{value[kernel, where, 'registers']:.0f}" for kernel in both)
        shared = (f"{value[kernel, where, 'shared bytes'] / 1024:.1f} KiB" for kernel in both)
        body.append([where, *registers, *shared])
    heads = [f"{quantity}, {plain(kernel)}" for quantity in ("registers", "shared memory") for kernel in both]
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


def small_batches(rows: Sequence[Mapping[str, str]]) -> str:
    value = {(r["kernel"], r["where"], r["quantity"]): float(r["value"]) for r in rows if r["unit"] == "us"}
    gpus = unique(where for _, where, _ in value)
    body = []
    for kernel in KERNELS:
        streamed = (f"{value[kernel, gpu, f'at least, batch {SMALL}']:.0f}" for gpu in gpus)
        body.append([f"{plain(kernel)}, not split, at least", *streamed])
        for batch in SPLIT:
            split = (value.get((f"{kernel}, split", gpu, f"about, batch {batch}")) for gpu in gpus)
            times = ("not split" if time is None else f"{time:.0f}" for time in split)
            body.append([f"{plain(kernel)}, split, {batch} images, about", *times])
    return markdown(["microseconds", *gpus], body)


def plain(kernel: str) -> str:
    return kernel.replace("_kernel", "").replace("_", " ")


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])
