"""Trains one network, or continues a run that was stopped.

torchrun --nproc_per_node=8 fastnet/train.py
python -m fastnet.train sample --network lstm --run-dir runs/lstm
"""

from __future__ import annotations

import os
import sys

# As a script, Python puts fastnet/ first on the path; the package is found from the directory above.
if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(sys.path[0])

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from fastnet.cli import SettingsParser, directory, run_command
from fastnet.config import Config
from fastnet.data.default import default_set
from fastnet.distributed.device import make_deterministic
from fastnet.distributed.lock import run_lock
from fastnet.distributed.memory import memory_for
from fastnet.distributed.ranks import Runtime, agreed_precision, joined
from fastnet.settings import as_toml, meeting_of, settings_of
from fastnet.training.setup import check_alike
from fastnet.training.trainer import Trainer

REMEDY = (
    "use --decode gpu where the set was decoded into GPU memory, or, in another --run-dir, --accumulate auto or a "
    "larger number, a smaller --batch-size or --image-size, or more GPUs; the last checkpoint is as it was"
)


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = SettingsParser(prog="train.py", description="Trains one network, or continues a stopped run.")
    parser.add_argument(
        "--run-dir", type=directory, metavar="DIR", help="run directory; default: runs/NETWORK"
    )
    parser.add_argument("--run", type=_renamed, help=argparse.SUPPRESS)
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the settings as TOML, for --config, and do not train",
    )
    given = parser.parse(argv)
    if given["print_config"]:
        config = settings_of(given, default_set(given["data"]).source["kind"])
        print(as_toml(config), end="")
        return {"config": config.to_json()}

    with joined(*meeting_of(given)) as runtime:
        with runtime.agree():
            data = default_set(given["data"])
            config = settings_of(given, data.source["kind"])
            if config.deterministic:
                make_deterministic()
        check_alike(config, data, runtime)
        runtime.amp = agreed_precision(config.precision, runtime)
        run_dir = given["run_dir"] or Path("runs") / config.network
        with (
            run_lock(run_dir, runtime) as lock,
            memory_for(_at_once(config, runtime), runtime.device, REMEDY),
        ):
            result = Trainer(config, data, run_dir, runtime, lock).fit()
    if "top1" in result and runtime.is_main:
        split = "holdout" if config.holdout and not result["done"] else "val"
        print(
            f"{result['run']}: step {result['step']}, {split} top-1 {result['top1']:.4f}, top-5 {result['top5']:.4f}, "
            f"loss {result['loss']:.4f} on {result['count']} images"
        )
    return result


def _at_once(config: Config, runtime: Runtime) -> str:
    auto = config.accumulate == "auto"
    images = (replace(config, accumulate=1) if auto else config).micro_batch(runtime.world_size)
    how = "in the parts of --accumulate auto" if auto else "at once"
    return f"rank {runtime.rank}: {images} images at {config.image_size} px {how}"


def _renamed(value: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"this flag is now called --run-dir; give --run-dir {value}")


if __name__ == "__main__":
    run_command(main)
