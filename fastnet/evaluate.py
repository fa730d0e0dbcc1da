"""A run's results on a split of a prepared set; and what evaluate, ensemble and predict share.

Shapes: R runs, N images of the split, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastnet.checkpoint import Run, load_run
from fastnet.cli import InputError, Parser
from fastnet.cli import run as run_command
from fastnet.data import SPLITS, PreparedSet, Split, default_set
from fastnet.engine import predict
from fastnet.files import short_names
from fastnet.pipeline import EvalStream, Spec, resolve_decode
from fastnet.runtime import Runtime, solo, threads_per_rank


@dataclass(frozen=True)
class Measures:
    """Scores against labels: how many images, how many right, and the mean cross-entropy in nats."""

    count: int
    correct1: int
    correct5: int
    loss: float

    @property
    def top1(self) -> float:
        return self.correct1 / self.count

    @property
    def top5(self) -> float:
        return self.correct5 / self.count

    def to_json(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, **asdict(self)}


def measure(scores: Tensor, labels: np.ndarray) -> Measures:
    """Counts how often the label comes first, and among the first five, by descending score.

    scores [N, K] float32 probabilities, labels [N] int64. Among equal scores the lower class comes first, as
    `argmax` has it: no count depends on how a sort breaks ties.
    """
    target = torch.tensor(labels)[:, None]  # [N, 1]
    own = scores.gather(1, target)  # [N, 1]
    lower = torch.arange(scores.shape[1]) < target  # [N, K]
    rank = ((scores > own) | ((scores == own) & lower)).sum(dim=1)  # [N]
    # What underflowed to 0 counts as the smallest normal number, so that one image cannot make the mean infinite.
    loss = -own.double().clamp_min(torch.finfo(torch.float32).tiny).log()  # [N, 1]
    return Measures(len(labels), int((rank < 1).sum()), int((rank < 5).sum()), float(loss.mean()))


def load_runs(paths: Sequence[Path], which: str, runtime: Runtime) -> dict[str, Run]:
    """Runs of one class list, by short names. Raises InputError for one that cannot be used, differs or repeats."""
    names = short_names(paths)
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: the run is named twice; name each once")
    runs = {name: load_run(path, runtime, which) for name, path in zip(names, paths, strict=True)}
    for name, run in runs.items():
        check_classes(f"run {name}", run.classes, f"run {names[0]}", runs[names[0]].classes)
    return runs


def check_classes(one: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Raises InputError unless both have the same classes in the same order, since a label is a position in them."""
    if list(classes) != list(others):
        odd = sorted(set(classes) ^ set(others))
        what = f"{len(classes)} and {len(others)}, {odd[0]} in one alone" if odd else "in another order"
        raise InputError(f"{one}: its classes are not those of {other} ({what}); use what belongs together")


def labelled_split(data: PreparedSet, name: str) -> Split:
    """The split by name. Raises InputError where the set lacks it, or it lacks labels."""
    if name not in data.splits:
        raise InputError(f"{data.path}: has no {name} split; choose one of {', '.join(data.splits)}")
    split = data.splits[name]
    if (split.labels < 0).any():
        raise InputError(f"{data.path}: its {name} split has no labels; python -m fastnet.predict needs none")
    return split


def scores_of(runs: dict[str, Run], split: Split, batch_size: int, runtime: Runtime) -> Tensor:
    """Softmax scores [R, N, K] float32 on the CPU, in the split's order.

    Raises InputError for a network whose scores are not finite.
    """
    every = []
    for name, run in runs.items():
        spec = Spec(
            image_size=run.config.image_size,
            device=runtime.device,
            dtype=runtime.image_dtype,
            decode=resolve_decode("auto", runtime.device),
            threads=threads_per_rank(),
            eval_crop=run.config.eval_crop,
        )
        with closing(EvalStream(split, spec, batch_size=batch_size)) as stream:
            batches = tqdm(stream, desc=name, unit="batch", leave=False, disable=None)
            scores = predict(run.model, batches, len(split), runtime)  # [N, K]
        if not scores.isfinite().all():
            raise InputError(
                f"{name}: its network gives scores that are not finite; use another --checkpoint"
            )
        every.append(scores)
    return torch.stack(every)


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
