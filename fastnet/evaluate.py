"""Top-1, top-5 and loss of a run on a split of a prepared set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastnet.cli import Parser, run_command
from fastnet.data.prepared import SPLITS
from fastnet.distributed.ranks import single_process
from fastnet.errors import printable
from fastnet.inference.flags import add_evaluation_flags, changed_settings, open_data
from fastnet.inference.runs import check_set, load_runs
from fastnet.inference.scores import as_json, count_hits, labelled_split, logits_of


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.evaluate", description="Top-1, top-5 and loss of a run on a split of a set."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which images")
    add_evaluation_flags(parser)
    args = parser.parse_args(argv)

    runtime = single_process(args.device)
    data = open_data(args.data, args.run)
    split = labelled_split(data, args.split)
    runs = load_runs([args.run], args.checkpoint, runtime, changed_settings(args))
    check_set(data, runs)
    ((name, run),) = runs.items()
    totals = count_hits(logits_of(run, split, args.batch_size, runtime, name), split.labels)
    print(
        f"{printable(name)} ({args.checkpoint}, step {run.step}) on {totals.images} {args.split} images: "
        f"top-1 {totals.top1:.2%} ({totals.correct1}), top-5 {totals.top5:.2%} ({totals.correct5}), "
        f"loss {totals.mean_loss:.4f}"
    )
    return {**as_json(totals), "files": []}


if __name__ == "__main__":
    run_command(main)
