"""Draws the figures of the benchmarks, as PNG and SVG, from their CSVs alone.

    python -m benchmarks.plot [--quick] [DIRECTORY ...]     default: every directory of benchmarks/results

Bars are medians; the thin line on a bar spans the 20th to the 80th percentile. Bars differ in grey and hatching, not in
colour.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import QUICK, RESULTS, read_csv
from benchmarks.lstm_providers import BASELINE
from benchmarks.step import KEPT

Row = dict[str, str]
DECODER = "JPEG decoding alone"
FILLS: tuple[dict[str, Any], ...] = (
    {"facecolor": "0.0"},
    {"facecolor": "1.0"},
    {"facecolor": "0.6"},
    {"facecolor": "1.0", "hatch": "////"},
    {"facecolor": "0.85"},
    {"facecolor": "1.0", "hatch": "...."},
    {"facecolor": "0.35"},
    {"facecolor": "1.0", "hatch": "xxxx"},
    {"facecolor": "0.85", "hatch": "\\\\\\\\"},
    {"facecolor": "0.6", "hatch": "||||"},
    {"facecolor": "1.0", "hatch": "----"},
)
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}


def grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    series: dict[str, list[tuple[float, float, float] | None]],
    names: Sequence[str],
) -> None:
    """Bars side by side in each group: `series` has (p20, p50, p80) by group; `names` fixes the fills' order."""
    width = 0.84 / max(1, len(series))
    for n, (name, values) in enumerate(series.items()):
        fill = FILLS[list(names).index(name) % len(FILLS)]
        at = [g - 0.42 + (n + 0.5) * width for g in range(len(groups))]
        there = [(x, v) for x, v in zip(at, values, strict=True) if v is not None]
        if not there:
            continue
        heights = [v[1] for _, v in there]
        spread = [[v[1] - v[0] for _, v in there], [v[2] - v[1] for _, v in there]]
        places = [x for x, _ in there]
        axes.bar(places, heights, width, label=name, edgecolor="0", linewidth=0.6, **fill)
        # A white line under the black one shows it on black bars.
        axes.errorbar(places, heights, spread, fmt="none", ecolor="1", elinewidth=2.0)
        axes.errorbar(places, heights, spread, fmt="none", ecolor="0.2", elinewidth=0.8)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)


def timed(row: Row) -> tuple[float, float, float]:
    return float(row["p20"]), float(row["p50"]), float(row["p80"])


def provenance(row: Row) -> str:
    if row["benchmark"] == "model":
        return f"triton {row['triton']}; revision {row['git']}"
    return f"{row['machine']}, {row['cores']} cores; torch {row['torch']}; revision {row['git']}; {row['date'][:10]}"


def finish(figure: Figure, rows: list[Row], title: str) -> Figure:
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.supxlabel(provenance(rows[0]), fontsize=6, color="0.35", x=0.01, ha="left")
    return figure


def legend_beside(figure: Figure, axes: Sequence[Axes]) -> None:
    shown: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(list(shown.values()), list(shown), loc="outside right upper", frameon=False, fontsize=7)


def draw_lstm(rows: list[Row]) -> Figure:
    """How many times faster than nn.LSTM in a loop, forward and backward together, case by case."""
    rows = [
        r for r in rows if r["part"] == "whole" and r["quantity"] == "total" and r["l2"] in ("", "flushed")
    ]
    label = lambda r: (
        f"{r['stages'].replace(',', '+')}\n{r['image_size']} px, T={r['seq_len']}\n{r['batch']} images"
        + ("" if r["dtype"] == "float32" else f"\n{r['dtype']}")
    )
    groups = list(dict.fromkeys(map(label, rows)))
    base = {label(r): float(r["p50"]) for r in rows if r["provider"] == BASELINE}
    names = list(dict.fromkeys(r["provider"] for r in rows))
    series: dict[str, list[tuple[float, float, float] | None]] = {n: [None] * len(groups) for n in names}
    for r in rows:
        p20, p50, p80 = timed(r)
        own = base[label(r)]
        series[r["provider"]][groups.index(label(r))] = (own / p80, own / p50, own / p20)
    figure = Figure(figsize=(max(6.5, 1.2 * len(groups) + 2.2), 3.2), layout="constrained")
    axes = figure.subplots()
    grouped_bars(axes, groups, series, names)
    axes.axhline(1, color="0", linewidth=0.8, linestyle=":")
    axes.set_ylabel(f"times as fast as {BASELINE}")
    legend_beside(figure, [axes])
    return finish(figure, rows, "Channel-group LSTMs, forward and backward")


def draw_pipeline(rows: list[Row]) -> Figure:
    """Images a second by threads, a panel for each size; the decoder's own rate, far above, in its title."""
    rows = [r for r in rows if r["p50"]]
    limits = [r for r in rows if r["provider"] == DECODER]
    rows = [r for r in rows if r["provider"] != DECODER]
    sizes = list(dict.fromkeys(r["image_size"] for r in rows))
    names = list(dict.fromkeys(r["provider"] for r in rows))
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        own = [r for r in rows if r["image_size"] == size]
        threads = list(dict.fromkeys(r["threads"] for r in own))
        series: dict[str, list[tuple[float, float, float] | None]] = {n: [None] * len(threads) for n in names}
        for r in own:
            series[r["provider"]][threads.index(r["threads"])] = timed(r)
        grouped_bars(axes, [f"{n} thread{'s' * (n != '1')}" for n in threads], series, names)
        limit = max((float(r["p50"]) for r in limits if r["image_size"] == size), default=0.0)
        axes.set_title(f"{size} px (decoding alone: {limit:,.0f})", fontsize=9)
        axes.set_ylabel("images/s")
    legend_beside(figure, list(panels))
    return finish(figure, rows, "Training images from 64 px JPEGs: crop, flip, normalise")


def draw_step(rows: list[Row]) -> Figure:
    """Images a second of whole steps, and where an epoch's step spends its time."""
    # Kept features would leave the other bars no height.
    steps = [r for r in rows if r["quantity"] == "step" and r["provider"] != KEPT]
    label = lambda r: f"{r['network']}\n{'head only' if r['phase'] == 'head' else 'all'}"
    names = list(dict.fromkeys(r["provider"] for r in steps))
    sizes = list(dict.fromkeys(r["image_size"] for r in steps))
    figure = Figure(figsize=(7.2, 2.6 * len(sizes) + 1.0), layout="constrained")
    grid = figure.subplots(len(sizes), 2, squeeze=False)
    for (left, right), size in zip(grid, sizes, strict=True):
        own = [r for r in steps if r["image_size"] == size]
        groups = list(dict.fromkeys(map(label, own)))
        series: dict[str, list[tuple[float, float, float] | None]] = {n: [None] * len(groups) for n in names}
        for r in own:
            series[r["provider"]][groups.index(label(r))] = timed(r)
        grouped_bars(left, groups, series, names)
        left.set_ylabel("images/s")
        left.set_title(f"{size} px, batch {own[0]['batch']}", fontsize=9)
        left.margins(y=0.45)  # room for the legend above the bars
        left.legend(frameon=False, fontsize=6)
        stacked_shares(right, groups, [r for r in rows if r["image_size"] == size], label)
    return finish(figure, rows, "A training step: pace, and where its time goes")


def stacked_shares(axes: Axes, groups: list[str], rows: list[Row], label: Callable[[Row], str]) -> None:
    share = {
        (label(r), r["quantity"].removeprefix("share ")): float(r["p50"])
        for r in rows
        if r["quantity"].startswith("share ")
    }
    for at, group in enumerate(groups):
        get = lambda name, group=group: share.get((group, name), 0.0)
        parts = {
            "data": get("data"),
            "forward, LSTMs": get("lstm"),
            "forward, rest": get("forward") - get("lstm"),
            "backward, LSTMs": get("lstm backward"),
            "backward, rest": get("backward") - get("lstm backward"),
            "optimizer": get("optimizer"),
            "other": get("rest"),
        }
        bottom = 0.0
        for n, (name, value) in enumerate(parts.items()):
            value = max(0.0, value)
            axes.bar(
                at,
                value,
                0.6,
                bottom,
                label=name if at == 0 else None,
                edgecolor="0",
                linewidth=0.6,
                **FILLS[n],
            )
            bottom += value
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("share of a step")
    axes.set_ylim(0, 1.02)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.legend(frameon=False, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)


def draw_model(rows: list[Row]) -> Figure:
    """Lower bounds by kernel on GPUs that are not here."""
    bounds = [r for r in rows if r["quantity"] == "at least, batch 256" and r["kernel"] != "all"]
    gpus = list(dict.fromkeys(r["where"] for r in bounds))
    kernels = list(dict.fromkeys(r["kernel"] for r in bounds))
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[tuple[float, float, float] | None]] = {n: [None] * len(kernels) for n in gpus}
    for r in bounds:
        value = float(r["value"])
        series[r["where"]][kernels.index(r["kernel"])] = (value, value, value)
    grouped_bars(axes, [k.removesuffix("_kernel").replace("_", "\n") for k in kernels], series, gpus)
    axes.set_ylabel("microseconds, at least")
    axes.legend(frameon=False)
    return finish(figure, rows, "MODELLED, not measured: bounds of the fused kernels, 256 images, bf16")


def draw_scaling(rows: list[Row]) -> Figure:
    """Modelled efficiency of the LSTM network's training over the number of GPUs."""
    rows = [r for r in rows if r["network"] == "lstm"]
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    scalings = list(dict.fromkeys(r["scaling"] for r in rows))
    panels = figure.subplots(1, len(scalings), sharey=True)
    for axes, scaling in zip(panels, scalings, strict=True):
        for cluster, style in zip(
            dict.fromkeys(r["cluster_name"] for r in rows), ("-", "--", ":"), strict=True
        ):
            own = [r for r in rows if r["scaling"] == scaling and r["cluster_name"] == cluster]
            gpus = [int(r["gpus"]) for r in own]
            axes.plot(gpus, [float(r["efficiency"]) for r in own], style, color="0", lw=1, label=cluster)
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            [8, 16, 32, 64, 128, 256, 512, 1024], ["8", "16", "32", "64", "128", "256", "512", "1024"]
        )
        axes.set_ylim(0, 1.02)
        axes.set_title(scaling, fontsize=8)
        axes.set_xlabel("GPUs, 8 a node")
    panels[0].set_ylabel("images/s, of GPUs x one GPU's rate")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=7)
    figure.suptitle("Modelled, not measured: training past one machine", x=0.01, ha="left", fontsize=10)
    return figure


def draw_long_run(rows: list[Row]) -> Figure:
    """Memory, open files and threads of each process over the epochs of a long run."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    quantities = {"rss_mb": "resident MB", "open_files": "open files", "threads": "threads"}
    panels = figure.subplots(1, 3)
    for axes, (key, label) in zip(panels, quantities.items(), strict=True):
        for process, style in zip(dict.fromkeys(r["process"] for r in rows), ("-", "--", ":"), strict=False):
            own = [r for r in rows if r["process"] == process]
            axes.plot(
                [int(r["epoch"]) for r in own],
                [float(r[key]) for r in own],
                style,
                color="0",
                lw=1,
                label=process,
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
    legend_beside(figure, panels)
    return finish(figure, rows, "A run of many epochs: memory, open files and threads of each process")


DRAW: dict[str, Callable[[list[Row]], Figure]] = {
    "lstm": draw_lstm,
    "pipeline": draw_pipeline,
    "step": draw_step,
    "model": draw_model,
    "long_run": draw_long_run,
    "scaling": draw_scaling,
}


def draw_all(folder: Path) -> list[Path]:
    """Draws what the CSVs in `folder` hold; returns the files."""
    written = []
    with rc_context(STYLE | {"svg.hashsalt": "fastnet"}):
        for name, draw in DRAW.items():
            if not (folder / f"{name}.csv").exists():
                continue
            figure = draw(read_csv(folder / f"{name}.csv"))
            for kind, about in (("png", {}), ("svg", {"Date": None})):
                path = folder / f"{name}.{kind}"
                figure.savefig(path, dpi=160, metadata=about)
                written.append(path)
    return written


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="what --quick runs left in runs/benchmarks")
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIRECTORY")
    args = parser.parse_args(argv)
    for folder in args.folders or sorted((QUICK if args.quick else RESULTS).glob("*")):
        for path in draw_all(folder):
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
