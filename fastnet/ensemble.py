"""Averages the scores of several runs on one split, and shows the results of each run and of the average.

Shapes: R runs, N images of the split, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastnet.cli import Parser, directory, run_command
from fastnet.data.prepared import SPLITS
from fastnet.distributed.ranks import single_process
from fastnet.errors import InputError, printable
from fastnet.files import atomic_write, check_place
from fastnet.inference.flags import add_evaluation_flags, changed_settings, open_data
from fastnet.inference.runs import check_set, load_runs
from fastnet.inference.scores import (
    all_logits,
    as_json,
    average_scores,
    count_hits,
    count_score_hits,
    labelled_split,
)
from fastnet.metrics import Totals

SCORES = "scores.npz"


def table(rows: Sequence[tuple[str, Totals]]) -> str:
    """The results as aligned text, a line per name. The error is 1 - top-1, which is what the paper reports."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}    top-1    top-5   error    loss"]
    for name, row in rows:
        lines.append(
            f"{name:{width}}  {row.top1:7.2%}  {row.top5:7.2%}  {1 - row.top1:.4f}  {row.mean_loss:6.4f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.ensemble",
        description="Averages the softmax scores of several runs on a set. Prints the results of each run and of the "
        "average.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directories of two or more runs")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which images")
    parser.add_argument(
        "--out", metavar="DIR", type=directory, help="folder in which to save all scores, as scores.npz"
    )
    add_evaluation_flags(parser)
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise InputError(f"{args.runs[0]}: an ensemble takes two or more runs; name another")
    if args.out:
        check_place(args.out / SCORES)

    runtime = single_process(args.device)
    data = open_data(args.data, args.runs[0])
    split = labelled_split(data, args.split)
    runs = load_runs(args.runs, args.checkpoint, runtime, changed_settings(args))
    check_set(data, runs)
    logits = all_logits(runs, split, args.batch_size, runtime)  # [R, N, K]
    average = average_scores(logits)  # [N, K]

    each = {name: count_hits(of_run, split.labels) for name, of_run in zip(runs, logits, strict=True)}
    together = count_score_hits(average, split.labels)
    print(f"{together.images} {args.split} images")
    print(table([*((printable(name), row) for name, row in each.items()), ("average", together)]))
    files = []
    if args.out:
        path = args.out / SCORES
        with atomic_write(path) as beside, beside.open("wb") as file:
            np.savez(
                file,
                names=np.array(split.names),
                labels=split.labels,
                classes=np.array(data.classes),
                runs=np.array(list(runs)),
                scores=logits.softmax(dim=2).numpy(),
                average=average.numpy(),
            )
        print(f"scores: {path}")
        files = [str(path)]
    return {
        **as_json(together),
        "runs": {name: as_json(row) for name, row in each.items()},
        "files": files,
    }


if __name__ == "__main__":
    run_command(main)
