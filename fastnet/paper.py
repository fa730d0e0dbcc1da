"""The whole paper in one command: both networks, their ensemble, predictions, figures and the table of results.

    python -m fastnet.paper --data data/tiny-imagenet --out runs/paper

Stopped, the same command goes on where it was. Flags that this command does not know are train.py's.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from fastnet import ensemble, figures, predict
from fastnet.cli import Parser
from fastnet.cli import run as run_command
from fastnet.config import PRESETS
from fastnet.data import PreparedSet, default_set
from fastnet.files import replaced

# Errors of "Exploring Methods on Tiny ImageNet Problem": test, and validation where the paper gives it.
PAPER = {"baseline": (0.338, None), "lstm": (0.386, 0.3341), "average": (0.329, None)}
TITLES = {"baseline": "baseline", "lstm": "LSTM network", "average": "ensemble"}


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.paper",
        description="Trains the baseline and the LSTM network, averages them, predicts the test split and draws the "
        "figures. Other flags are passed on to train.py (see python -m fastnet.train --help).",
    )
    parser.add_argument(
        "preset", nargs="?", choices=list(PRESETS), help="settings of the runs (default: by the data)"
    )
    parser.add_argument("--data", type=Path, metavar="SET", help="prepared set (default: as the README says)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/paper"), help="where everything goes"
    )
    args, train_flags = parser.parse_known_args(argv)

    data = default_set(args.data)
    preset = args.preset or ("sample" if data.source["kind"] == "sample" else "paper")
    runs = {network: args.out / network for network in ("baseline", "lstm")}
    for network, run in runs.items():
        flags = [preset, "--data", str(data.path), *train_flags, "--network", network, "--run", str(run)]
        if (
            network == "lstm"
            and PRESETS[preset](network).weights == "none"
            and "--weights" not in train_flags
        ):
            # Without ImageNet weights, the frozen phase reads the convolutions that the baseline has learned.
            flags += ["--weights", str(runs["baseline"] / "best.pt")]
        print(f"{TITLES[network]}: train.py {' '.join(flags)}", file=sys.stderr, flush=True)
        if not train(flags)["done"]:
            print(f"{run}: stopped before its end; the same command continues")
            return {"done": False, "files": []}

    given = ["--data", str(data.path)]
    paths = [str(run) for run in runs.values()]
    scores = ensemble.main([*paths, *given, "--out", str(args.out)])
    files = [*scores["files"], *figures.main([*paths, "--out", str(args.out / "figures")])["files"]]
    if "test" in data.splits:
        files += predict.main([*paths, *given, "--out", str(args.out / "predictions.txt")])["files"]
    files += write_results(args.out, data, scores)
    print("files:", *files, sep="\n  ")
    average = {key: scores[key] for key in ("top1", "top5", "loss", "count")}
    return {"done": True, **average, "runs": scores["runs"], "files": files}


def train(flags: list[str]) -> dict[str, Any]:
    """Runs train.py with `flags`, one rank per GPU, and returns its result. A signal reaches it, and it saves.

    Exits with its exit code where it fails: its own line has said why.
    """
    script = str(Path(__file__).with_name("train.py"))
    gpus = torch.cuda.device_count()
    # Behind --, torchrun does not take the script's --run for its own --run-path.
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", "--"]
    command = [sys.executable, *(torchrun if gpus > 1 else []), script, *flags, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, forwarding_signals(process):
        output, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(output.splitlines()[-1])


@contextmanager
def forwarding_signals(process: subprocess.Popen) -> Iterator[None]:
    """SIGTERM and SIGINT go to `process`, which saves and ends; this process lives on to see it."""

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_results(out: Path, data: PreparedSet, scores: dict[str, Any]) -> list[str]:
    """Prints the table of results and writes it as results.md and results.json."""
    rows = {**scores["runs"], "average": scores}
    lines = [
        f"| network | here: val error ({data.name}) | here: top-5 error | paper: val error | paper: test error |",
        "|---|---|---|---|---|",
    ]
    for name, (test, val) in PAPER.items():
        row = rows[name]
        paper_val = f"{val:.4f}" if val else "-"
        lines.append(
            f"| {TITLES[name]} | {1 - row['top1']:.4f} | {1 - row['top5']:.4f} | {paper_val} | {test:.3f} |"
        )
    lines += [
        "",
        f"Errors are shares of the {scores['count']} validation images; the test labels are not public.",
    ]
    print("\n".join(lines))
    table, numbers = out / "results.md", out / "results.json"
    with replaced(table) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with replaced(numbers) as beside:
        kept = {name: {key: rows[name][key] for key in ("top1", "top5", "loss", "count")} for name in rows}
        beside.write_text(
            json.dumps({"data": data.name, "hash": data.hash, **kept}, indent=1) + "\n", encoding="utf-8"
        )
    return [str(table), str(numbers)]


def cli() -> NoReturn:
    run_command(main)


if __name__ == "__main__":
    cli()
