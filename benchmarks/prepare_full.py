"""Proves that Tiny ImageNet at full size prepares in two minutes and 1 GB: python -m benchmarks.prepare_full

Generates a zip in the official layout (100,000 training, 10,000 val and 10,000 test JPEGs of about 2 KB, no two
alike), prepares it with the command that users run, and writes time and peak memory with the machine's name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import PIL
import pyarrow

import fastnet
from tests.official import jpeg, official_files, write_zip

CLASSES, TRAIN, VAL, TEST = 200, 500, 10_000, 10_000
SECONDS, BYTES = 120, 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of preparing Tiny ImageNet at full size.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where results are kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "tiny-imagenet-200.zip"
        print("generating the zip: some minutes", file=sys.stderr)
        write_zip(
            archive,
            official_files(CLASSES, TRAIN, VAL, TEST, lambda i: jpeg(i, grey=i % 55 == 0, quality=85)),
        )
        size = archive.stat().st_size
        seconds, peak, result = measured(archive, Path(folder) / "set")
    machine = cpu_model()
    cores = len(os.sched_getaffinity(0))
    row = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cpu": machine, "cores": cores, "load_15_min": round(os.getloadavg()[2], 2)},
        "versions": {
            "fastnet": fastnet.__version__,
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "pyarrow": pyarrow.__version__,
            "numpy": numpy.__version__,
        },
        "source": {"images": result["count"], "zip_bytes": size},
        "seconds": round(seconds, 1),
        "images_per_s": round(sum(result["count"].values()) / seconds),
        "peak_rss_mb": round(peak / 1e6),
        "bounds": {"seconds": SECONDS, "peak_rss_mb": BYTES / 1e6},
    }
    name = re.sub("[^a-z0-9]+", "-", f"{machine} {cores} cores".lower()).strip("-")
    target = args.out / name / "prepare_full.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1), target, sep="\n")
    if seconds > SECONDS or peak > BYTES:
        sys.exit("over the bounds")


def measured(archive: Path, out: Path) -> tuple[float, int, dict[str, Any]]:
    """(seconds, peak resident bytes, the command's result). The command is one process; its work is in threads."""
    started = time.perf_counter()
    line = [sys.executable, "-m", "fastnet.prepare", str(archive), "--out", str(out), "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"preparing failed with code {process.returncode}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024, json.loads(output.splitlines()[-1])


def cpu_model() -> str:
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return re.sub(r"\(\w+\)", "", found[1]) if found else platform.processor()


if __name__ == "__main__":
    main()
