"""One HTML page about runs: results, curves, speed, mistakes, settings. It needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastnet.cli import Parser, run_command
from fastnet.distributed.ranks import single_process
from fastnet.files import atomic_write, check_place
from fastnet.inference.flags import add_inference_flags, open_data
from fastnet.inference.runs import check_set, load_runs
from fastnet.inference.scores import (
    all_logits,
    as_json,
    average_scores,
    count_hits,
    count_score_hits,
    labelled_split,
)
from fastnet.reporting.curves import read_curves
from fastnet.reporting.page import RunResult, render
from fastnet.training.manifest import read_manifest


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.report",
        description="Writes one HTML page about runs: results beside each other and the paper, curves, where time "
        "went, accuracy by class, mistakes, settings and versions.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="the page, such as report.html"
    )
    add_inference_flags(parser)
    args = parser.parse_args(argv)
    check_place(args.out)

    runtime = single_process(args.device)
    data = open_data(args.data, args.runs[0])
    split = labelled_split(data, "val")
    runs = load_runs(args.runs, args.checkpoint, runtime)
    check_set(data, runs)
    records = [
        (read_curves(path, name), read_manifest(path)) for name, path in zip(runs, args.runs, strict=True)
    ]

    logits = all_logits(runs, split, args.batch_size, runtime)  # [R, N, K]
    results = [
        RunResult(
            name=name,
            network=run.config.network,
            checkpoint=args.checkpoint,
            step=run.step,
            curves=curves,
            manifest=manifest,
            logits=of_run.numpy(),
            totals=count_hits(of_run, split.labels),
        )
        for (name, run), (curves, manifest), of_run in zip(runs.items(), records, logits, strict=True)
    ]
    average = count_score_hits(average_scores(logits), split.labels) if len(runs) > 1 else None
    with atomic_write(args.out) as beside:
        # A run's directory may have a name that is no text; such bytes become references that browsers show as unknown.
        beside.write_bytes(render(data, split, results, average).encode("utf-8", "xmlcharrefreplace"))
    print(f"report: {args.out}")
    return {"runs": {result.name: as_json(result.totals) for result in results}, "files": [str(args.out)]}


if __name__ == "__main__":
    run_command(main)
