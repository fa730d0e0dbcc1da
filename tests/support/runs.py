"""What tests and benchmarks ask of a run directory: how far it is, and whether two runs ended alike."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastnet.training.checkpoint import MAY_CHANGE, load

# What of a record depends on the moment.
TIMES = ("images_per_s", "step_ms_p50", "step_ms_p95", "data_wait", "peak_mem_mb", "seconds")


def events(run: Path, kind: str = "") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the moment."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return [line for line in kept if kind in ("", line["event"])]


def assert_same_end(one: Path, other: Path) -> None:
    """Equal to the bit: model, optimiser, position, and every line of the records."""
    assert events(one) == events(other)
    a, b = (vars(load(run / "last.pt")) for run in (one, other))
    for content in (a, b):
        content["position"] = replace(
            content["position"], metrics_bytes=0
        )  # lines hold times, and so differ in length
        content["config"] = {k: v for k, v in content["config"].to_json().items() if k not in MAY_CHANGE}
    assert_equal(a, b)
    assert_equal(load(one / "best.pt").model, load(other / "best.pt").model)


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Returns once metrics.jsonl speaks of `step` or a later one, or the process has ended."""
    path = run / "metrics.jsonl"
    while True:
        text = path.read_text() if path.exists() else ""
        if any(int(found) >= step for found in re.findall(r'"step": (\d+)', text)):
            return
        try:
            process.wait(timeout=0.02)
            return
        except subprocess.TimeoutExpired:
            pass


def children(pid: int) -> list[int]:
    """The processes that `pid` has started, oldest first: torchrun's ranks."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in listed.stdout.split()]
