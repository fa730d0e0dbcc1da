"""The report as one HTML page that needs no other file: what page.html shows, gathered from the runs.

Shapes: R runs, N images, K classes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastnet.data.prepared import PreparedSet, Split
from fastnet.metrics import Totals
from fastnet.reporting.curves import Curves
from fastnet.reporting.mistakes import (
    Mistake,
    class_results,
    confused_pairs,
    confusion_matrix,
    surest_mistakes,
)
from fastnet.reporting.pictures import confusion_png, curve_charts, speed_charts, thumbnail
from fastnet.reporting.published import PAPER
from fastnet.training.events import EpochEvent
from fastnet.training.manifest import Manifest

PAIRS, MISTAKES = 20, 24  # shown of each run
NAMED_CLASSES = 40  # up to so many, the confusion matrix has room for their names
TICKS = 10  # about so many numbers are beside a larger one


@dataclass(frozen=True)
class RunResult:
    """A run and its logits [N, K] float32 on the validation split; `checkpoint` and `step` say of which weights."""

    name: str
    network: str
    checkpoint: str
    step: int
    curves: Curves
    manifest: Manifest
    logits: np.ndarray
    totals: Totals


def render(data: PreparedSet, split: Split, runs: Sequence[RunResult], average: Totals | None) -> str:
    """The page. `average` is the result of the runs' ensemble, where there is more than one."""
    environment = Environment(
        loader=PackageLoader("fastnet.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration}
    script = files("fastnet.reporting").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    points = [point for run in runs for point in (*run.curves.training, *run.curves.validation)]
    # Axes that all runs share, so that their charts compare.
    tops = (
        1.05 * max(loss for _, loss, _ in points) or 1.0,
        min(1.0, 1.05 * max(top1 for _, _, top1 in points)) or 1.0,
    )
    return environment.get_template("page.html").render(
        data=data,
        count=len(split),
        results=result_rows(runs, average),
        runs=[run_section(data, split, run, tops) for run in runs],
        settings=side_by_side([facts(run.manifest.config) for run in runs]),
        sets=side_by_side([facts(run.manifest.data) for run in runs]),
        script=Markup(script),
        script_digest=digest,
    )


def result_rows(runs: Sequence[RunResult], average: Totals | None) -> list[dict[str, Any]]:
    """The table of results: the runs, their average, and what the paper says of the same network."""
    rows: list[dict[str, Any]] = [
        {"name": run.name, "totals": run.totals, "paper": PAPER.get(run.network), "linked": True}
        for run in runs
    ]
    if average is not None:
        papers_own = sorted(run.network for run in runs) == ["baseline", "lstm"]
        rows.append(
            {
                "name": "average of their scores",
                "totals": average,
                "paper": PAPER["average"] if papers_own else None,
                "linked": False,
            }
        )
    return rows


def run_section(data: PreparedSet, split: Split, run: RunResult, tops: tuple[float, float]) -> dict[str, Any]:
    """What the page says of one run."""
    matrix = confusion_matrix(run.logits, split.labels)  # [K, K]
    epochs = run.curves.epochs
    return {
        "name": run.name,
        "network": run.network,
        "checkpoint": run.checkpoint,
        "step": run.step,
        "totals": run.totals,
        "other_set": run.manifest.data.get("hash") != data.hash,
        "charts": {**curve_charts(run.curves, tops), **speed_charts(epochs, run.name)},
        "epochs": epochs,
        "split": run.curves.split,
        "validated_on": run.curves.validated_on,
        "speed": speed(epochs),
        "classes": class_results(matrix),
        "pairs": confused_pairs(matrix, PAIRS),
        "matrix": matrix_view(matrix, data.words),
        "mistakes": mistakes_view(split, surest_mistakes(run.logits, split.labels, MISTAKES)),
        "starts": run.manifest.sessions,
        "sessions": side_by_side([facts(session) for session in run.manifest.sessions]),
    }


def mistakes_view(split: Split, mistakes: Sequence[Mistake]) -> list[dict[str, Any]]:
    """The mistakes with their images. Raises InputError for an image that cannot be decoded."""
    views = []
    for mistake in mistakes:
        name = split.names[mistake.image]
        src = thumbnail(split.jpeg(mistake.image).tobytes(), f"{split.path}: {name}")
        views.append({"mistake": mistake, "name": name, "src": src})
    return views


def speed(epochs: Sequence[EpochEvent]) -> dict[str, float | None]:
    """Over all epochs: seconds of training, median images/s, and the share of the time that was spent waiting."""
    timed = [(e.seconds, e.data_wait) for e in epochs if e.seconds is not None and e.data_wait is not None]
    seconds = sum(seconds for seconds, _ in timed)
    rates = [e.images_per_s for e in epochs if e.images_per_s is not None]
    return {
        "seconds": seconds if timed else None,
        "images_per_s": statistics.median(rates) if rates else None,
        "data_wait": sum(s * wait for s, wait in timed) / seconds if seconds else None,
    }


def matrix_view(matrix: np.ndarray, words: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix as a picture, with the names or numbers beside it and the counts behind it.

    Sizes are in units of the picture; the counts are triples (row, column, images).
    """
    size = len(matrix)
    named = size <= NAMED_CLASSES
    every = 1 if named else -(-size // TICKS)
    side = 720
    rows, columns = np.nonzero(matrix)
    return {
        "src": confusion_png(matrix),
        "side": side,
        "margin": 150 if named else 40,
        "ticks": [
            {"at": (k + 0.5) * side / size, "text": words[k] if named else str(k + 1)}
            for k in range(0, size, every)
        ],
        "named": named,
        "counts": np.stack([rows, columns, matrix[rows, columns]], axis=1).tolist(),
    }


def facts(values: dict[str, Any]) -> dict[str, str]:
    """Settings as text by name; those within another are named after both, as in "augment.flip"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": content for inner, content in value.items()}
        else:
            flat[key] = value
    return {key: as_text(value) for key, value in flat.items()}


def as_text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def side_by_side(columns: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """A row for each name that occurs, with each column's value, and whether the columns differ in it."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in names:
        cells = [column.get(name, "-") for column in columns]
        rows.append({"name": name, "cells": cells, "differs": len(set(cells)) > 1})
    return rows


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def duration(seconds: float) -> str:
    """Such as "42 s", "3 min 20 s" or "5 h 7 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
