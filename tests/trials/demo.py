"""Runs the commands of `make demo` and keeps their time, table and figures: python -m tests.trials.demo"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import results_dir, write_result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "sample", Path(folder) / "demo"
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fastnet.prepare", "sample", "--out", str(data)], check=True)
        subprocess.run(
            [sys.executable, "-m", "fastnet.paper", "--data", str(data), "--out", str(out)], check=True
        )
        seconds = time.perf_counter() - started
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        print(
            write_result("demo", {"command": "make demo", "seconds": round(seconds, 1), "results": results})
        )
        for figure in (out / "figures").iterdir():
            shutil.copy(figure, results_dir() / f"demo-{figure.name}")


if __name__ == "__main__":
    main()
