"""What every benchmark shares: how it times, and how it records what the numbers belong to.

Times come in rounds, each of which runs every candidate once, so that other work on the machine affects all of them
alike. On a GPU they are CUDA events on the stream, with the L2 cache flushed before each measurement or left warm.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu import FIELDS, GpuWatch
from fastnet.errors import InputError
from fastnet.provenance import cpu_name, surroundings

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
QUICK = ROOT.parent / "runs" / "benchmarks"  # of --quick: to look at, not to keep
AHEAD = 2_000_000  # cycles, a millisecond
# The GPU's state during the last `alternate`, for the rows that its times go into.
watched: dict[str, str] = {}


def parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=(about or "").split("\n\n")[0]
    )
    made.add_argument(
        "--quick", action="store_true", help="under a minute on two cores; kept in runs/benchmarks"
    )
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="most CPU threads")
    return made


def on_softgpu() -> bool:
    """Whether the GPU is a software one, about whose time nothing can be said."""
    return "softgpu" in sys.modules


def machine() -> str:
    return cpu_name() if on_softgpu() else surroundings()["machine"]


def results_dir(root: Path = RESULTS) -> Path:
    """The directory of this machine's results: processor or GPU, and cores. Raises InputError if it cannot be made."""
    name = f"{machine()} {len(os.sched_getaffinity(0))} cores"
    plain = re.sub(r"\(\w+\)", "", name).lower()
    path = root / re.sub("[^a-z0-9]+", "-", plain).strip("-")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made ({error.strerror}); make its folder writable") from error
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


@cache
def about() -> dict[str, Any]:
    """What does not change during a benchmark: date, machine, versions, git revision; empty for what is not there."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return described(now, {**surroundings(), "machine": machine()})


def described(date: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the `surroundings` of something that ran on `date`, on these cores."""
    versions = known["versions"]
    return {
        "date": date,
        "machine": known["machine"],
        "cpu": known.get("cpu", ""),
        "cores": len(os.sched_getaffinity(0)),
        "git": known["git"],
        "python": versions["python"],
        "torch": versions["torch"],
        "torchvision": versions["torchvision"],
        "triton": versions["triton"],
        "dali": versions["nvidia-dali-cuda120"],
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else "",
    }


class Table:
    """The rows of one benchmark: a long CSV, each row complete in itself."""

    def __init__(self, name: str, *, quick: bool) -> None:
        self.name, self.quick = name, quick
        self.rows: list[dict[str, Any]] = []
        self.path = results_dir(QUICK if quick else RESULTS) / f"{name}.csv"

    def add(
        self,
        case: Mapping[str, Any],
        provider: str,
        quantity: str,
        unit: str,
        samples: np.ndarray | list[float],
        **more: Any,
    ) -> None:
        """Adds a measurement, as quantiles over `samples`, and prints a line."""
        p20, p50, p80 = np.percentile(samples, [20, 50, 80])
        values = {"p20": f"{p20:.5g}", "p50": f"{p50:.5g}", "p80": f"{p80:.5g}", "n": len(samples)}
        self._put(case, provider, quantity, unit, {**values, **more})
        print(f"  {provider:<34}{quantity:<20}{values['p50']:>10} {unit}", flush=True)

    def note(self, case: Mapping[str, Any], provider: str, note: str) -> None:
        """Adds a candidate without a time, and says why."""
        self._put(case, provider, "", "", {"note": note})
        print(f"  {provider:<34}{note}", flush=True)

    def _put(
        self, case: Mapping[str, Any], provider: str, quantity: str, unit: str, values: Mapping[str, Any]
    ) -> None:
        row = {"benchmark": self.name, **case, "provider": provider, "quantity": quantity, "unit": unit}
        load = {"load_1_min": round(os.getloadavg()[0], 2)}
        gpu = dict.fromkeys(FIELDS, "") | (watched if unit else {})
        self.rows.append({**row, **values, **load, **gpu, **about()})

    def write(self) -> Path:
        """Replaces NAME.csv of this machine."""
        write_csv(self.path, self.rows)
        print(self.path)
        return self.path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Laps:
    """Marks moments within one measurement, by CUDA events on a GPU and by the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self("start")

    def __call__(self, name: str) -> None:
        """Marks the end of the lap `name`."""
        moment: Any = time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((name, moment))

    def milliseconds(self) -> dict[str, float]:
        """Each lap, and their sum as "total"."""
        if self.cuda:
            torch.cuda.synchronize()
        laps = {}
        marks = [*self.marks, ("total", self.marks[-1][1])]
        for n, (name, moment) in enumerate(marks[1:], 1):
            before = marks[0 if name == "total" else n - 1][1]
            laps[name] = before.elapsed_time(moment) if self.cuda else (moment - before) * 1e3
        return laps


Candidate = Callable[[Laps], None]
MOST = 1000  # rounds


def alternate(
    candidates: Mapping[str, Candidate],
    device: torch.device,
    *,
    seconds: float,
    least: int = 3,
    before: Callable[[Candidate], object] = lambda candidate: None,
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every lap of every candidate: name -> lap -> one number a round.

    Each candidate runs once unmeasured. Then rounds of all of them follow until `seconds` are over, at least `least`
    and at most `MOST`. The order rotates, so that in as many rounds as there are candidates each has every place once,
    and is then drawn anew. `before` runs ahead of each measurement of a candidate and is not measured. On a GPU a
    measurement begins behind a millisecond of waiting, so that its first kernel does not wait for the host.
    """
    for candidate in candidates.values():
        candidate(Laps(device))
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in candidates}
    names, draws = list(candidates), random.Random(0)
    with GpuWatch() as gpu:
        began = time.perf_counter()
        for done in range(MOST):
            if done >= least and time.perf_counter() - began > seconds:
                break
            turn = done % max(1, len(names))
            if turn == 0:
                draws.shuffle(names)
            for name in names[turn:] + names[:turn]:
                if device.type == "cuda":
                    torch.cuda.synchronize()
                before(candidates[name])
                if device.type == "cuda":
                    torch.cuda._sleep(AHEAD)
                laps = Laps(device)
                candidates[name](laps)
                for lap, value in laps.milliseconds().items():
                    taken[name].setdefault(lap, []).append(value)
    watched.clear()
    watched.update(gpu.state)
    return taken


def flushed(device: torch.device) -> Callable[[Candidate], object]:
    """For `alternate`: overwrites more than any L2 cache holds."""
    buffer = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    return lambda candidate: buffer.zero_()


def warm(candidate: Candidate) -> None:
    """For `alternate`: the candidate's own data are in the caches, and not those of the one before it."""
    candidate(Laps(torch.device("cpu")))


class Captured:
    """A candidate as one CUDA graph, whose replay is the lap; `peak_mb` is what its capture took."""

    def __init__(self, candidate: Callable[[], None]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                candidate()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()

        def capture() -> None:
            with torch.cuda.graph(self.graph):
                candidate()

        self.peak_mb = _peak_mb(capture)

    def __call__(self, laps: Laps) -> None:
        self.graph.replay()
        laps("replay")


def peak_mb(candidate: Candidate, device: torch.device) -> float | str:
    """The allocator's peak on a GPU while `candidate` runs, above what was allocated before, in 2^20 bytes.

    A CUDA graph's memory is allocated at its capture; a replay allocates none.
    """
    if device.type != "cuda":
        return ""
    if isinstance(candidate, Captured):
        return candidate.peak_mb
    return _peak_mb(lambda: candidate(Laps(device)))


def _peak_mb(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def mark_ratios(rows: list[dict[str, Any]], baseline: str, keys: tuple[str, ...]) -> None:
    """Adds `ratio` to each measurement: how many times faster than `baseline` in the same case, by the medians."""
    base = {
        tuple(r[k] for k in keys): float(r["p50"]) for r in rows if r["provider"] == baseline and r.get("p50")
    }
    for row in rows:
        other = base.get(tuple(row[k] for k in keys))
        if row.get("p50") and other:
            own = float(row["p50"])
            row["ratio"] = f"{own / other if row['unit'] == 'images/s' else other / own:.3f}"
