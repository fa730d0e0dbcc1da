"""Predictions without labels: the test split's file for the Tiny ImageNet server, or a folder of images.

Shapes: R runs, N images, K classes.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
from torch import Tensor

from fastnet.cli import Parser, run_command
from fastnet.data.default import default_set
from fastnet.data.entries import Entry, natural
from fastnet.data.image import image_size
from fastnet.data.prepared import Split
from fastnet.data.sources import folder_files
from fastnet.distributed.ranks import single_process
from fastnet.errors import InputError
from fastnet.files import atomic_write
from fastnet.inference.flags import add_inference_flags
from fastnet.inference.runs import TrainedRun, check_classes, load_runs
from fastnet.inference.scores import all_logits, average_scores

SUFFIXES = (".jpg", ".jpeg", ".png")


def folder_split(folder: Path) -> Split:
    """The JPEG and PNG files below a folder as a split without labels, in natural order, held in memory.

    Raises InputError if there is no folder, no image in it, or a bad one, by name.
    """
    if not folder.is_dir():
        raise InputError(f"--images {folder}: no such folder")
    names = [name for name in folder_files(folder) if name.lower().endswith(SUFFIXES)]
    if not names:
        raise InputError(f"--images {folder}: no {', '.join(SUFFIXES)} file in it")
    images = [(folder / name).read_bytes() for name in names]
    sizes = [
        image_size(image, Entry(name, None, name), str(folder))
        for name, image in zip(names, images, strict=True)
    ]
    ends = np.cumsum([len(image) for image in images])
    return Split(
        name="images",
        path=folder,
        labels=np.full(len(names), -1, np.int64),
        sizes=np.array(sizes, np.int32),
        table=pa.table({"name": names}),
        mapped=np.frombuffer(b"".join(images), np.uint8),
        bounds=np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1),
    )


def server_lines(names: Sequence[str], scores: Tensor, classes: Sequence[str]) -> list[str]:
    """ "test_0.JPEG n01443537" for every image, in the natural order of the names: test_2 before test_10.

    scores [N, K], in the order of `names`.
    """
    best = scores.argmax(dim=1).tolist()
    order = sorted(range(len(names)), key=lambda i: natural(names[i]))
    return [f"{names[i]} {classes[best[i]]}" for i in order]


def best_five(
    names: Sequence[str], scores: Tensor, run: TrainedRun
) -> list[tuple[str, int, str, str, float]]:
    """(image, rank from 1, class, its readable name, probability), five for each image or one for each class.

    scores [N, K], in the order of `names`.
    """
    values, indices = scores.topk(min(5, scores.shape[1]), dim=1)  # [N, 5]
    return [
        (name, rank, run.classes[k], run.words[k], p)
        for name, ks, ps in zip(names, indices.tolist(), values.tolist(), strict=True)
        for rank, (k, p) in enumerate(zip(ks, ps, strict=True), start=1)
    ]


def text_table(rows: Sequence[tuple[str, int, str, str, float]]) -> str:
    """`best_five` as aligned text, a line per image."""
    image_width = max(len(row[0]) for row in rows)
    word_width = max(len(row[3]) for row in rows)
    lines: list[str] = []
    for image, rank, _, word, probability in rows:
        if rank == 1:
            lines.append(f"{image:{image_width}}")
        lines[-1] += f"  {probability:6.1%} {word:{word_width}}"
    return "\n".join(line.rstrip() for line in lines)


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.predict",
        description="Classes of unlabelled images by one run, or by the average of several: of a set's test "
        "split, in the Tiny ImageNet server's format, or of a folder of images, as a table.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directories of runs")
    parser.add_argument(
        "--images", metavar="FOLDER", type=Path, help="classify these images instead of a set's"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="file to write; a CSV table with --images")
    add_inference_flags(parser)
    args = parser.parse_args(argv)
    if not args.images and not args.out:
        raise InputError("--out: missing; name the file for the test split's predictions")
    if args.images and args.data:
        raise InputError("--images and --data: give one of them; a folder of images is not part of a set")

    runtime = single_process(args.device)
    runs = load_runs(args.runs, args.checkpoint, runtime)
    first_name, first = next(iter(runs.items()))
    if args.images:
        split = folder_split(args.images)
    else:
        data = default_set(args.data)
        check_classes(f"set {data.path}", data.classes, f"run {first_name}", first.classes)
        if "test" not in data.splits:
            raise InputError(f"{data.path}: has no test split; use another --data, or --images FOLDER")
        split = data.splits["test"]
    scores = average_scores(all_logits(runs, split, args.batch_size, runtime))  # [N, K]

    if args.images:
        rows = best_five(split.names, scores, first)
        print(text_table(rows))
        if args.out:
            with atomic_write(args.out) as beside, beside.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("image", "rank", "class", "name", "probability"))
                writer.writerows((*row[:-1], f"{row[-1]:.6f}") for row in rows)
    else:
        lines = server_lines(split.names, scores, first.classes)
        with atomic_write(args.out) as beside:
            beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        print(f"{args.out}: {len(lines)} lines in natural order of the names: {lines[0]} to {lines[-1]}")
    return {"count": len(split), "files": [str(args.out)] if args.out else []}


def cli() -> NoReturn:
    run_command(main)


if __name__ == "__main__":
    cli()
