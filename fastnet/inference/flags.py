"""The flags that evaluate, ensemble and predict have in common."""

from __future__ import annotations

from pathlib import Path

from fastnet.cli import Parser, positive_int


def add_inference_flags(parser: Parser) -> None:
    parser.add_argument(
        "--data",
        metavar="SET",
        type=Path,
        help="prepared set; default: $FASTNET_DATA, else data/tiny-imagenet, else the generated sample set",
    )
    parser.add_argument(
        "--checkpoint", choices=("best", "last"), default="best", help="which of a run's checkpoints"
    )
    parser.add_argument("--batch-size", metavar="N", type=positive_int, default=128, help="images at a time")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="where the networks run"
    )
