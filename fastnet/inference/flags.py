"""What the command lines of evaluate, ensemble, predict, export and report have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastnet.cli import Parser, positive_int
from fastnet.data.default import default_set
from fastnet.data.prepared import PreparedSet
from fastnet.errors import InputError
from fastnet.inference.runs import check_run
from fastnet.training.manifest import read_manifest


def add_run_flags(parser: Parser) -> None:
    parser.add_argument(
        "--data",
        metavar="SET",
        type=Path,
        help="prepared set; default: the one that the run was trained on",
    )
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="which of a run's checkpoints"
    )


def add_inference_flags(parser: Parser) -> None:
    add_run_flags(parser)
    parser.add_argument("--batch-size", metavar="N", type=positive_int, default=128, help="images at a time")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="where the networks run"
    )


def add_evaluation_flags(parser: Parser) -> None:
    """Those of `add_inference_flags`, and how the images are looked at."""
    add_inference_flags(parser)
    parser.add_argument(
        "--eval-crop",
        metavar="X",
        type=float,
        help="side of the centre crop, as a fraction of the resized image's; default: that of the training",
    )
    parser.add_argument(
        "--flip-average",
        action=argparse.BooleanOptionalAction,
        help="average the logits of each image and its mirror image, or do not; default: as in the training",
    )


def changed_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the training that the flags of `add_evaluation_flags` replace."""
    changes = {"eval_crop": args.eval_crop, "flip_average": args.flip_average}
    return {name: value for name, value in changes.items() if value is not None}


def open_data(choice: Path | None, run_dir: Path) -> PreparedSet:
    """The set of --data, else the one that the run was trained on. Raises InputError if that is no longer there, or
    another one in its place, whose val split may have images that the run was trained on."""
    if choice is not None:
        return default_set(choice)
    check_run(run_dir)
    recorded = read_manifest(run_dir).data
    path = Path(str(recorded.get("path")))
    if not path.exists():
        raise InputError(f"{run_dir}: was trained on {path}, which is not there; give the set with --data")
    data = default_set(path, why=f"that of {run_dir}")
    if data.hash != recorded.get("hash"):
        raise InputError(
            f"{run_dir}: was trained on another set than the one that is at {path} now; give a set with --data"
        )
    return data
