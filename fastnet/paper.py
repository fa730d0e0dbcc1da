"""The whole paper in one command: both networks, their ensemble, predictions, figures, results and a report.

    python -m fastnet.paper --data data/tiny-imagenet --out runs/paper

Given again, the same command continues where it was stopped. The flags of train.py hold for both networks.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fastnet import ensemble, figures, predict, report
from fastnet.cli import SettingsParser, as_arguments, directory, run_command
from fastnet.config import PRESETS, choose_preset
from fastnet.data.default import default_set
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.launch import launch_command
from fastnet.errors import InputError, printable
from fastnet.files import atomic_write
from fastnet.reporting.published import PAPER
from fastnet.settings import file_settings, settings_of

TITLES = {"baseline": "baseline", "lstm": "LSTM network", "average": "ensemble"}


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = SettingsParser(
        prog="python -m fastnet.paper",
        description="Trains the baseline and the LSTM network, averages them, predicts the test split, draws the "
        "figures and writes a report. The flags of train.py hold for both networks; --head-epochs for the LSTM network "
        "alone, since the paper's baseline has no frozen phase.",
    )
    parser.add_argument(
        "--out", type=directory, metavar="DIR", default=Path("runs/paper"), help="where everything goes"
    )
    given = parser.parse(argv)
    if "network" in given:
        raise InputError("--network: this command trains both; leave the flag out, or use fastnet.train")
    named = {**file_settings(given), **given}
    if named.get("head_epochs"):
        print(
            "--head-epochs: for the LSTM network; the paper's baseline has no frozen phase", file=sys.stderr
        )

    out, data = given["out"], default_set(given["data"])
    device = named.get("device", "auto")
    runs = {network: out / network for network in ("baseline", "lstm")}
    for network, line in command_lines(given, data, runs).items():
        print(f"{TITLES[network]}: train.py {' '.join(line)}", file=sys.stderr, flush=True)
        if not train(line, ranks=1 if device == "cpu" else torch.cuda.device_count()):
            print(f"{runs[network]}: stopped; the same command continues")
            return {"done": False, "files": []}

    on_data = ["--data", str(data.path), "--device", device]
    paths = [str(run) for run in runs.values()]
    scores = ensemble.main([*paths, *on_data, "--out", str(out)])
    files = [*scores["files"], *figures.main([*paths, "--out", str(out / "figures")])["files"]]
    if "test" in data.splits:
        files += predict.main([*paths, *on_data, "--out", str(out / "predictions.txt")])["files"]
    page = report.main([*paths, *on_data, "--out", str(out / "report.html")])["files"]
    files = [*page, *files, *write_results(out, data, scores, named.get("holdout", 0.0))]
    print("files:", *files, sep="\n  ")
    average = {key: scores[key] for key in ("top1", "top5", "loss", "count")}
    return {"done": True, **average, "runs": scores["runs"], "files": files}


def command_lines(given: dict[str, Any], data: PreparedSet, runs: dict[str, Path]) -> dict[str, list[str]]:
    """What train.py is given for each network. Bad settings of the second are refused before the first has trained."""
    named, kind = {**file_settings(given), **given}, data.source["kind"]
    preset = choose_preset(given["preset"], kind)
    lines = {}
    for network, run_dir in runs.items():
        flags = dict(given)
        if network == "baseline":
            flags["head_epochs"] = 0
            if named.get("freeze", "none") == "none":
                flags["cache_features"] = 0
        elif named.get("weights_partial") or (
            "weights" not in named and PRESETS[preset](network).weights == "none"
        ):
            # Without all of ImageNet's weights, the frozen phase uses the convolutions that the baseline has learned.
            if named.get("weights_partial"):
                flags["weights_partial"] = False
            flags["weights"] = str(runs["baseline"] / "best.pt")
        settings_of({**flags, "preset": preset, "network": network}, kind)
        line = [preset, "--data", str(data.path), "--network", network, "--run-dir", str(run_dir)]
        line += [*as_arguments(flags), *(["--config", str(given["config"])] if given["config"] else [])]
        lines[network] = line
    return lines


def train(flags: list[str], ranks: int) -> bool:
    """Runs train.py with `flags`. Passes a signal on to it, so that it saves and ends.

    Returns False after a signal. If train.py fails, exits with its exit code; its own line has said why.
    """
    command = launch_command(Path(__file__).with_name("train.py"), flags, ranks=ranks)
    process: subprocess.Popen | None = None
    signalled = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal signalled
        signalled = True
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with subprocess.Popen(command, stdout=sys.stderr) as process:
            if signalled:
                process.terminate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if process.returncode == 2:  # also where a signal's checkpoint could not be written
        sys.exit(2)
    if signalled:
        return False
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        sys.exit(f"train.py was ended by {name}, as for want of memory; the same command continues")
    if process.returncode:
        sys.exit(process.returncode)
    return True


def write_results(out: Path, data: PreparedSet, scores: dict[str, Any], holdout: float) -> list[str]:
    """Prints the table of results and writes it as results.md and results.json."""
    decided = f"{100 * holdout:g}% of the training images, held out" if holdout else "the same images"
    of_runs = scores["runs"].values()  # whose names are others where a run directory is a link
    rows = {**dict(zip(("baseline", "lstm"), of_runs, strict=True)), "average": scores}
    name = printable(data.name)
    lines = [
        f"| network | here: val error ({name}) | here: top-5 error | paper: val error | paper: test error |",
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
        f"Errors are fractions of the {scores['count']} validation images. The end of the frozen phase and the best "
        f"epoch were decided on {decided}. The test labels are not public.",
    ]
    print("\n".join(lines))
    table, numbers = out / "results.md", out / "results.json"
    with atomic_write(table) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with atomic_write(numbers) as beside:
        kept = {name: {key: rows[name][key] for key in ("top1", "top5", "loss", "count")} for name in rows}
        beside.write_text(
            json.dumps({"data": data.name, "hash": data.hash, "holdout": holdout, **kept}, indent=1) + "\n",
            encoding="utf-8",
        )
    return [str(table), str(numbers)]


if __name__ == "__main__":
    run_command(main)
