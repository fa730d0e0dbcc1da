"""What every benchmark shares: the machine's name, where its results go, and what they record."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastnet.record import surroundings

RESULTS = Path(__file__).resolve().parent / "results"


def results_dir() -> Path:
    """The directory of this machine's results: processor or GPU, and cores."""
    name = f"{surroundings()['machine']} {len(os.sched_getaffinity(0))} cores"
    plain = re.sub(r"\(\w+\)", "", name).lower()
    path = RESULTS / re.sub("[^a-z0-9]+", "-", plain).strip("-")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_result(name: str, values: dict[str, Any]) -> Path:
    """Writes `values`, with date, machine, versions and git revision, as NAME.json of this machine."""
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "load_15_min": round(os.getloadavg()[2], 2),
        **surroundings(),
    }
    path = results_dir() / f"{name}.json"
    path.write_text(json.dumps({**about, **values}, indent=1) + "\n", encoding="utf-8")
    return path
