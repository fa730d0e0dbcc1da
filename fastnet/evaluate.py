"""A run's results on a split of a prepared set; and what evaluate, ensemble and predict share.

Shapes: R runs, N images of the split, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastnet.cli import Parser, run_command
from fastnet.data.default import default_set
from fastnet.data.prepared import SPLITS
from fastnet.distributed.ranks import solo
from fastnet.inference.runs import check_classes, load_runs
from fastnet.inference.scores import labelled_split, measure, scores_of


def add_flags(parser: Parser) -> None:
    """The flags that evaluate, ensemble and predict have in common."""
    parser.add_argument("--data", metavar="SET", type=Path, help="prepared set; default: as the README says")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="which of a run's two")
    parser.add_argument("--batch-size", metavar="N", type=positive_int, default=128, help="images at once")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.evaluate", description="Top-1, top-5 and loss of a run on a split of a set."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument("--split", choices=SPLITS, default="val", help="which images")
    add_flags(parser)
    args = parser.parse_args(argv)

    data = default_set(args.data)
    split = labelled_split(data, args.split)
    runtime = solo()
    runs = load_runs([args.run], args.checkpoint, runtime)
    ((name, run),) = runs.items()
    check_classes(f"set {data.path}", data.classes, f"run {name}", run.classes)
    result = measure(scores_of(runs, split, args.batch_size, runtime)[0], split.labels)
    print(
        f"{name} ({args.checkpoint}, step {run.step}) on {result.count} {args.split} images: "
        f"top-1 {result.top1:.2%} ({result.correct1}), top-5 {result.top5:.2%} ({result.correct5}), "
        f"loss {result.loss:.4f}"
    )
    return {**result.to_json(), "files": []}


def cli() -> NoReturn:
    run_command(main)


if __name__ == "__main__":
    cli()
