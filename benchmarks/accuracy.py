"""What accuracy do the networks and the switches reach?

    python -m benchmarks.accuracy EXPERIMENT --data SET --weights FILE --precision bf16

Trains the runs of an experiment (accuracy_runs.py) by train.py, one after another, in runs/accuracy/. A command that
was stopped continues when it is given again, and what is done stays. Writes accuracy-EXPERIMENT.csv, a row for each
run and for each average of runs, with flags, hours, set and machine, and the curves where there are few.

All scores are those of the last epoch on the val split: none is the best of several looks at it.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from benchmarks import harness
from benchmarks.accuracy_runs import EXPERIMENTS, Experiment, Run
from fastnet import ensemble, evaluate, figures
from fastnet.cli import run_command
from fastnet.data.prepared import PreparedSet, open_set
from fastnet.errors import InputError
from fastnet.reporting.curves import read_curves
from fastnet.training.events import EpochEvent, read_events
from fastnet.training.manifest import read_manifest

OUT = harness.ROOT.parent / "runs" / "accuracy"


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    experiment = EXPERIMENTS[args.experiment]
    data = open_set(args.data)
    if len(data.classes) < experiment.classes:
        raise InputError(
            f"{args.data}: has {len(data.classes)} classes, of which {args.experiment} takes {experiment.classes}; "
            "give a larger set"
        )
    if experiment.classes:
        data = subset(data, experiment.classes)
    folder = OUT / f"{args.experiment}-{data.hash[:12]}"
    given = {"weights": args.weights, "precision": args.precision}
    rows = []
    for seed in range(experiment.seeds):
        for run in experiment.runs_of(seed):
            if run.trained:
                run_dir = folder / f"{run.trained}-{seed}"
                rows.append(evaluated(args.experiment, run, seed, run_dir, data))
            else:
                run_dir = train(run, experiment, seed, folder, data, given)
                rows.append(row(args.experiment, run, seed, run_dir, data))
            write(args.experiment, rows)  # after each, as a run may take hours
        for members in experiment.averages:
            runs = [str(folder / f"{name}-{seed}") for name in members]
            rows.append(average(args.experiment, members, seed, runs, data))
            write(args.experiment, rows)
    print(table(rows))
    if experiment.curves:
        names = [run.name for run in experiment.runs if not (run.trained or run.tuning)]
        curves = [read_curves(folder / f"{name}-0", name) for name in names]
        figure = figures.draw(curves)
        mark(figure.axes[len(curves) :], experiment.elsewhere)
        for path in figures.save(figure, folder):
            shutil.copy(path, harness.results_dir() / f"accuracy-{args.experiment}{path.suffix}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description="Trains the runs of an experiment and records what accuracy they reach.",
        epilog="\n".join(f"{name}: {what.about}" for name, what in EXPERIMENTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, required=True, metavar="SET", help="prepared set")
    parser.add_argument("--weights", metavar="FILE", help="weights to start from, as train.py takes them")
    parser.add_argument(
        "--precision",
        default="auto",
        help="as train.py takes it: on a CPU with AMX, bf16 saves most of the time",
    )
    args = parser.parse_args(argv)
    experiment = EXPERIMENTS[args.experiment]
    if args.weights is None and any("{weights}" in experiment.flags_of(run) for run in experiment.runs):
        raise InputError(f"--weights: {args.experiment} starts from pretrained weights; name their file")
    return args


def subset(data: PreparedSet, classes: int) -> PreparedSet:
    """The set of every n-th class alone, in runs/accuracy/, so that `classes` of them are left."""
    path = OUT / f"{classes}-classes-of-{data.hash[:12]}"
    if not path.exists():
        images = path.with_name(path.name + "-images")
        kept = range(0, len(data.classes), len(data.classes) // classes)[:classes]
        for name in ("train", "val"):
            split = data.splits[name]
            for i, label in enumerate(split.labels.tolist()):
                if label in kept:
                    file = images / name / data.classes[label] / f"{i}.JPEG"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(split.jpeg(i).tobytes())
        command = [sys.executable, "-m", "fastnet.prepare", str(images), "--out", str(path)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        shutil.rmtree(images)
    return open_set(path)


def train(
    run: Run, experiment: Experiment, seed: int, folder: Path, data: PreparedSet, given: dict[str, str | None]
) -> Path:
    """Trains a run to its end, from where it was, and returns its directory."""
    run_dir = folder / f"{run.name}-{seed}"
    start = folder / f"{run.start}-{seed}" / "last.pt"
    flags = [word.format(**given, start=start) for word in shlex.split(experiment.flags_of(run))]
    words = [*flags, "--data", str(data.path), "--seed", str(seed), "--run-dir", str(run_dir)]
    print(f"{run.name}, seed {seed}: train.py {shlex.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "fastnet.train", *words], stdout=sys.stderr, check=False)
    if done.returncode or not read_manifest(run_dir).sessions[-1].get("done"):
        sys.exit(done.returncode or f"{run_dir}: stopped; the same command continues")
    return run_dir


def row(name: str, run: Run, seed: int, run_dir: Path, data: PreparedSet) -> dict[str, Any]:
    """What a run reached in its last epoch, in how many hours of training steps, and what it ran on."""
    manifest = read_manifest(run_dir)
    session = manifest.sessions[-1]
    epochs = [event for event in read_events(run_dir / "metrics.jsonl") if isinstance(event, EpochEvent)]
    last = epochs[-1]
    flags = EXPERIMENTS[name].flags_of(run)
    return {
        "experiment": name,
        "run": run.name,
        "seed": seed,
        "top1": f"{last.val_top1:.4f}",
        "top5": f"{last.val_top5:.4f}",
        "loss": f"{last.val_loss:.4f}",
        "images": last.val_count,
        "epochs": len(epochs),
        "hours": f"{hours(epochs, manifest.config['batch_size']):.3f}",
        "flags": flags.format(
            weights="FILE", precision=manifest.config["precision"], start=f"{run.start}/last.pt"
        ),
        **of_set(data),
        **harness.described(session["started"], session),
    }


def evaluated(name: str, run: Run, seed: int, run_dir: Path, data: PreparedSet) -> dict[str, Any]:
    """What a trained run reaches with the weights of its last epoch, evaluated with the flags of `run`."""
    words = shlex.split(run.flags)
    scores = evaluate.main([str(run_dir), "--data", str(data.path), "--checkpoint", "last", *words])
    return scored(name, run.name, seed, scores, data, flags=run.flags)


def average(
    name: str, members: Sequence[str], seed: int, runs: Sequence[str], data: PreparedSet
) -> dict[str, Any]:
    """What the averaged scores of runs reach with the weights of their last epochs."""
    scores = ensemble.main([*runs, "--data", str(data.path), "--checkpoint", "last"])
    return scored(name, "average of " + " and ".join(members), seed, scores, data)


def scored(
    name: str, run: str, seed: int, scores: dict[str, Any], data: PreparedSet, flags: str = ""
) -> dict[str, Any]:
    """A row of what evaluate or ensemble found just now."""
    return {
        "experiment": name,
        "run": run,
        "seed": seed,
        **{key: f"{scores[key]:.4f}" for key in ("top1", "top5", "loss")},
        "images": scores["count"],
        "flags": flags,
        **of_set(data),
        **harness.about(),
    }


def mark(axes: Sequence[Axes], elsewhere: Sequence[tuple[str, float]]) -> None:
    """Adds what others have reached to plots of the top-1."""
    for axis in axes:
        for name, top1 in elsewhere:
            axis.axhline(top1, color="0.6", linewidth=0.8)
            place = axis.get_yaxis_transform()  # x from 0 to 1
            axis.text(0.02, top1, f"{name}: {top1:.1%}", transform=place, va="bottom", fontsize=8)
            axis.set_ylim(top=max(axis.get_ylim()[1], 1.1 * top1))


def of_set(data: PreparedSet) -> dict[str, Any]:
    return {"set": data.hash[:12], "classes": len(data.classes)}


def hours(epochs: Sequence[EpochEvent], batch_size: int) -> float:
    """Of training steps. An epoch of several sessions counts at the pace of its last one, all that is known."""
    ends = itertools.pairwise([0, *(epoch.step for epoch in epochs)])
    timed = [
        (after - before, epoch.images_per_s) for (before, after), epoch in zip(ends, epochs, strict=True)
    ]
    return sum(steps * batch_size / pace for steps, pace in timed if pace) / 3600


def write(name: str, rows: list[dict[str, Any]]) -> None:
    path = harness.results_dir() / f"accuracy-{name}.csv"
    harness.write_csv(path, rows)
    print(f"{path}: {len(rows)} rows", flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: each run's top-1 and top-5, and its distance from the first run, over the seeds."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    of = {run: [row for row in rows if row["run"] == run] for run in runs}
    first = {row["seed"]: float(row["top1"]) for row in of[runs[0]]}
    lines = [f"| run | top-1 | top-5 | top-1 less that of {runs[0]}, by seed |", "|---|---|---|---|"]
    for run in runs:
        top1, top5 = ([float(row[key]) for row in of[run]] for key in ("top1", "top5"))
        apart = ", ".join(f"{100 * (float(row['top1']) - first[row['seed']]):+.1f}" for row in of[run])
        lines.append(f"| {run} | {spread(top1)} | {spread(top5)} | {apart} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    run_command(main)
