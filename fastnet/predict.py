"""Predictions without labels: the test split's file for the Tiny ImageNet server, or any image files.

Shapes: R runs, N images, K classes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastnet.cli import Parser, directory, run_command
from fastnet.data.entries import natural
from fastnet.distributed.ranks import single_process
from fastnet.errors import InputError, printable
from fastnet.files import atomic_write, check_place
from fastnet.inference.flags import add_evaluation_flags, changed_settings, open_data
from fastnet.inference.images import find_images, images_as_split
from fastnet.inference.runs import TrainedRun, check_set, load_runs
from fastnet.inference.scores import all_logits, average_scores


class Guess(NamedTuple):
    """One of the five best classes of an image; `rank` counts from 1, `name` is the readable one."""

    image: str
    rank: int
    label: str
    name: str
    probability: float


def server_lines(names: Sequence[str], scores: Tensor, classes: Sequence[str]) -> list[str]:
    """ "test_0.JPEG n01443537" for every image, in the natural order of the names: test_2 before test_10.

    scores [N, K], in the order of `names`.
    """
    best = scores.argmax(dim=1).tolist()
    order = sorted(range(len(names)), key=lambda i: natural(names[i]))
    return [f"{names[i]} {classes[best[i]]}" for i in order]


def best_five(names: Sequence[str], scores: Tensor, run: TrainedRun) -> list[Guess]:
    """Five guesses for each image, or one for each class where there are fewer.

    scores [N, K], in the order of `names`.
    """
    values, indices = scores.topk(min(5, scores.shape[1]), dim=1)  # [N, 5]
    return [
        Guess(name, rank, run.classes[k], run.words[k], p)
        for name, ks, ps in zip(names, indices.tolist(), values.tolist(), strict=True)
        for rank, (k, p) in enumerate(zip(ks, ps, strict=True), start=1)
    ]


def text_table(guesses: Sequence[Guess]) -> str:
    """The guesses as aligned text, a line per image."""
    guesses = [guess._replace(image=printable(guess.image), name=printable(guess.name)) for guess in guesses]
    image_width = max(len(guess.image) for guess in guesses)
    name_width = max(len(guess.name) for guess in guesses)
    lines: list[str] = []
    for guess in guesses:
        if guess.rank == 1:
            lines.append(f"{guess.image:{image_width}}")
        lines[-1] += f"  {guess.probability:6.1%} {guess.name:{name_width}}"
    return "\n".join(line.rstrip() for line in lines)


def write_guesses(path: Path, guesses: Sequence[Guess]) -> None:
    """Writes a CSV table, or for a path that ends in .jsonl one JSON object per image."""
    with atomic_write(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            images: list[dict[str, Any]] = []
            for guess in guesses:
                if guess.rank == 1:
                    images.append({"image": guess.image, "classes": []})
                kept = {"class": guess.label, "name": guess.name, "probability": round(guess.probability, 6)}
                images[-1]["classes"].append(kept)
            file.writelines(json.dumps(image) + "\n" for image in images)
        else:
            writer = csv.writer(file)
            writer.writerow(("image", "rank", "class", "name", "probability"))
            writer.writerows((*guess[:-1], f"{guess.probability:.6f}") for guess in guesses)


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.predict",
        description="Classes of unlabelled images by one run, or by the average of several: of a set's test split, in "
        "the Tiny ImageNet server's format, or of image files, as a table.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directories of runs")
    parser.add_argument(
        "--images",
        metavar="PATH",
        nargs="+",
        type=directory,
        help="classify these files, the images below these folders, or those that standard input lists (-)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="file to write; with --images a CSV table, or JSON lines if it ends in .jsonl",
    )
    add_evaluation_flags(parser)
    args = parser.parse_args(argv)
    if not args.images and not args.out:
        raise InputError("--out: missing; name the file for the test split's predictions")
    if args.images and args.data:
        raise InputError("--images and --data: give one of them; image files are not part of a set")
    if args.out:
        check_place(args.out)

    runtime = single_process(args.device)
    runs = load_runs(args.runs, args.checkpoint, runtime, changed_settings(args))
    run = next(iter(runs.values()))
    if args.images:
        one_folder = args.images[0] if len(args.images) == 1 and args.images[0].is_dir() else None
        split = images_as_split(find_images(args.images), one_folder)
    else:
        data = open_data(args.data, args.runs[0])
        check_set(data, runs)
        if "test" not in data.splits:
            raise InputError(f"{data.path}: has no test split; use another --data, or --images")
        split = data.splits["test"]
    scores = average_scores(all_logits(runs, split, args.batch_size, runtime))  # [N, K]

    if args.images:
        guesses = best_five(split.names, scores, run)
        if args.out:
            write_guesses(args.out, guesses)
        print(text_table(guesses))
    else:
        lines = server_lines(split.names, scores, run.classes)
        with atomic_write(args.out) as beside:
            beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        first, last = printable(lines[0]), printable(lines[-1])
        print(f"{args.out}: {len(lines)} lines in natural order of the names: {first} to {last}")
    return {"count": len(split), "files": [str(args.out)] if args.out else []}


if __name__ == "__main__":
    run_command(main)
