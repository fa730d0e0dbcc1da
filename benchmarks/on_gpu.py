"""All that a first hour on a GPU should answer, in under ten minutes: python -m benchmarks.on_gpu, or make gpu

The tests that need a GPU, the three benchmarks at their quick sizes, a short profile, and their figures. Each has a
limit of its own and the next one runs whatever became of it. Results go to benchmarks/results/DEVICE/: the CSVs, what
the tests said (gpu-tests.txt), and gpu.json with each part's exit code and seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import QUICK, RESULTS, results_dir, write_result
from fastnet.cli import Parser, run_command
from fastnet.errors import InputError

# What runs, and the seconds it may take: under ten minutes in all.
PARTS: dict[str, tuple[list[str], float]] = {
    "tests": (["pytest", "-m", "gpu", "-v", "-n", "4"], 150),  # most of it is compiling
    "lstm": (["benchmarks.lstm", "--quick"], 150),
    "pipeline": (["benchmarks.pipeline", "--quick"], 60),
    "step": (["benchmarks.step", "--quick"], 150),
    "kernels": (["benchmarks.kernels", "--quick"], 60),
}
PATIENCE = 5.0  # seconds


def main(argv: Sequence[str]) -> dict[str, Any]:
    Parser(prog="python -m benchmarks.on_gpu", description=(__doc__ or "").split("\n\n")[0]).parse_args(argv)
    if not torch.cuda.is_available():
        raise InputError(
            "benchmarks.on_gpu: needs a GPU; without one, make bench runs the benchmarks on the CPU"
        )
    quick, results = results_dir(QUICK), results_dir(RESULTS)
    for old in quick.glob("*.csv"):
        old.unlink()
    outcome = run_parts(PARTS, quick)
    for path in (*quick.glob("*.csv"), quick / "gpu-tests.txt"):
        shutil.copy(path, results)
    subprocess.run([sys.executable, "-m", "benchmarks.plot", str(results)], check=False)
    path = write_result("gpu", {"command": "make gpu", "parts": outcome})
    print(path.read_text(encoding="utf-8"), path, sep="")
    failed = [name for name, part in outcome.items() if part["exit_code"] != 0]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    return outcome


def run_parts(parts: Mapping[str, tuple[list[str], float]], logs: Path) -> dict[str, Any]:
    """Runs `python -m` each part, whatever became of the one before; exit code None is for one cut off at its limit.

    What a part prints goes to gpu-PART.txt in `logs`. At its limit it is interrupted first, so that it can say what it
    has, and killed after `PATIENCE`.
    """
    outcome: dict[str, Any] = {}
    for name, (words, seconds) in parts.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.monotonic()
        code: int | None = None
        line = [sys.executable, "-m", *words]
        with (
            (logs / f"gpu-{name}.txt").open("wb") as log,
            subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True) as process,
        ):
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with the workers that it has started
        outcome[name] = {"exit_code": code, "seconds": round(time.monotonic() - began, 1)}
    return outcome


if __name__ == "__main__":
    run_command(main)
