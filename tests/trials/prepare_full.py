"""Holds preparing Tiny ImageNet at full size to two minutes and 1 GB: python -m tests.trials.prepare_full [SOURCE]

Without SOURCE it generates a zip in the official layout (100,000 training, 10,000 validation and 10,000 test JPEGs of
about 2 KB, no two alike). It prepares that with the command that users run, and writes its time, peak memory, hash and
number of grey images to prepare_full.json, those of a given source to prepare_source.json.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL

from benchmarks.harness import write_result
from fastnet.data.prepared import Split, open_set
from tests.support.official import jpeg, official_files, write_zip

CLASSES, TRAIN, VAL, TEST = 200, 500, 10_000, 10_000
COMMAND = """
import sys
from pathlib import Path
from fastnet.prepare import main
main(sys.argv[1:])
print(Path("/proc/self/status").read_text())
"""
MOST_SECONDS, MOST_BYTES = 120, 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = [Path(argument) for argument in sys.argv[1:2]]
        source = given[0] if given else generated(Path(folder) / "tiny-imagenet-200.zip")
        seconds, peak = measured(source, Path(folder) / "set")
        prepared = open_set(Path(folder) / "set")
        count = {name: len(split) for name, split in prepared.splits.items()}
        grey = {name: grey_images(split) for name, split in prepared.splits.items()}
    values = {
        "pillow": PIL.__version__,
        "source": prepared.source["kind"],
        "images": count,
        "grey": grey,
        "hash": prepared.hash,
        "zip_bytes": prepared.source["bytes"],
        "seconds": round(seconds, 1),
        "images_per_s": round(sum(count.values()) / seconds),
        "peak_rss_mb": round(peak / 1e6),
        "bounds": {"seconds": MOST_SECONDS, "peak_rss_mb": MOST_BYTES / 1e6},
    }
    path = write_result("prepare_source" if given else "prepare_full", values)
    print(path.read_text(), path, sep="")
    if seconds > MOST_SECONDS or peak > MOST_BYTES:
        sys.exit("over the bounds")


def generated(archive: Path) -> Path:
    print("generating the zip: some minutes", file=sys.stderr, flush=True)
    files = official_files(CLASSES, TRAIN, VAL, TEST, lambda i: jpeg(i, grey=i % 55 == 0, quality=85))
    return write_zip(archive, files)


def grey_images(split: Split) -> int:
    """JPEGs of one colour component."""
    return int((split.components(np.arange(len(split))) == 1).sum())


def measured(source: Path, out: Path) -> tuple[float, int]:
    """(seconds, peak resident bytes) of the command, which is one process with threads.

    The process reads its own peak: what the system reports to a parent includes the parent's memory.
    """
    line = [sys.executable, "-c", COMMAND, str(source), "--out", str(out)]
    started = time.perf_counter()
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - started
    peak = re.search(r"VmHWM:\s*(\d+) kB", done.stdout)
    assert peak is not None
    return seconds, int(peak[1]) * 1024


if __name__ == "__main__":
    main()
