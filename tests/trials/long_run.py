"""Shows that a long run does not grow: python -m tests.trials.long_run [--epochs 200]

Two ranks under torchrun train 200 epochs of a tiny set, with a validation and a checkpoint after each. Resident
memory, open files and threads of each process are read from /proc every epoch, into long_run.csv; long_run.json has
their medians in the second and the last quarter, and the slope of the memory. Takes about 4 minutes on two cores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import about, results_dir, write_csv, write_result
from fastnet.distributed.launch import launch_command
from tests.support.official import jpeg, official_files, write_folder
from tests.support.paths import SCRIPT
from tests.support.runs import events, wait_for_step

FLAGS = "sample --network baseline --image-size 32 --batch-size 32 --threads 1 --log-every 1"
STEPS_PER_EPOCH, RANKS = 4, 2
QUANTITIES = ("rss_mb", "open_files", "threads")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.trials.long_run", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--epochs", type=int, default=200)
    epochs = parser.parse_args().epochs
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        files = official_files(4, 8 * STEPS_PER_EPOCH, 32, 8, lambda i: jpeg(i, size=32))
        source = write_folder(place / "source", files) / "tiny-imagenet-200"
        prepare = [sys.executable, "-m", "fastnet.prepare", str(source), "--out", str(place / "set")]
        subprocess.run(prepare, check=True)
        rows = watch(place, epochs)
        ended = events(place / "run", "epoch")
    assert len(ended) == epochs
    write_csv(results_dir() / "long_run.csv", [{"benchmark": "long_run", **row, **about()} for row in rows])
    growth = {
        process.replace(" ", "_"): grown(rows, process)
        for process in dict.fromkeys(row["process"] for row in rows)
    }
    facts = {"command": f"python -m tests.trials.long_run --epochs {epochs}", "flags": FLAGS}
    print(write_result("long_run", {**facts, "epochs": epochs, "processes": growth}).read_text())


def watch(place: Path, epochs: int) -> list[dict[str, Any]]:
    """Trains, and reads the processes' state after the first step of each epoch, once the last one is saved."""
    flags = [*FLAGS.split(), "--epochs", epochs, "--data", place / "set", "--run-dir", place / "run"]
    line = launch_command(SCRIPT, flags, ranks=RANKS)
    rows = []
    with subprocess.Popen(line, stderr=subprocess.DEVNULL) as agent:
        for epoch in range(1, epochs):
            wait_for_step(agent, place / "run", epoch * STEPS_PER_EPOCH + 1)
            listed = subprocess.run(["pgrep", "-P", str(agent.pid)], stdout=subprocess.PIPE, text=True).stdout
            names = {"torchrun": agent.pid, **{f"rank {i}": int(pid) for i, pid in enumerate(listed.split())}}
            for name, pid in names.items():
                rows.append({"epoch": epoch, "process": name, **state(pid)})
    assert agent.returncode == 0
    return rows


def state(pid: int) -> dict[str, float]:
    proc = Path("/proc") / str(pid)
    status = (proc / "status").read_text()
    found = dict(re.findall(r"^(VmRSS|Threads):\s*(\d+)", status, re.MULTILINE))
    return {
        "rss_mb": int(found["VmRSS"]) / 1024,
        "open_files": len(list((proc / "fd").iterdir())),
        "threads": int(found["Threads"]),
    }


def grown(rows: list[dict[str, Any]], process: str) -> dict[str, Any]:
    """Medians of the second and of the last quarter of the epochs, and the memory's slope over the last half."""
    own = [row for row in rows if row["process"] == process]
    quarter = len(own) // 4
    values: dict[str, Any] = {}
    for key in QUANTITIES:
        series = np.array([row[key] for row in own])
        values[key] = {
            "second_quarter": round(float(np.median(series[quarter : 2 * quarter])), 1),
            "last_quarter": round(float(np.median(series[-quarter:])), 1),
        }
    half = own[len(own) // 2 :]
    slope = np.polyfit([row["epoch"] for row in half], [row["rss_mb"] for row in half], 1)[0]
    values["rss_kb_per_epoch_in_the_last_half"] = round(float(slope) * 1024, 1)
    return values


if __name__ == "__main__":
    main()
