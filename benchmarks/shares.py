"""Where the time of a step goes, from a trace of torch.profiler."""

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

RANGES = ("data", "forward", "backbone", "lstm", "backward", "optimizer")
LSTM_BACKWARD = re.compile(r"autograd::engine::evaluate_function: .*(rnn|lstm)", re.IGNORECASE)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
Event = dict[str, Any]


def shares(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, float]:
    """The share of each range in the time of `steps` steps, and on a GPU what they launch and wait for.

    "lstm backward" lies inside "backward", "lstm" and "backbone" inside "forward"; "rest" is what no range has.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    with torch.profiler.profile(activities=kinds) as profile, torch.profiler.record_function("whole"):
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return shares_of(events)


def shares_of(events: Iterable[Event]) -> dict[str, float]:
    """The shares in a trace's events.

    Without GPU work in it, a range has the time that the host spent in it. Otherwise it has the device time of what
    was launched while the range was open, on the streams that the calling thread uses; DALI has its own. The calling
    thread opens the ranges, and autograd launches the backward pass from another one, so the moment of a launch tells
    its range and its thread does not. The whole, and the wait for data, are always the host's time.
    """
    by_kind: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_kind[event.get("cat", "")].append(event)
    named = {
        name: [e for e in by_kind["user_annotation"] if e["name"] == name] for name in (*RANGES, "whole")
    }
    named["lstm backward"] = [e for e in by_kind["cpu_op"] if LSTM_BACKWARD.match(e["name"])]
    spent = {name: sum(e["dur"] for e in own) for name, own in named.items()}
    work = [e for kind in ON_DEVICE for e in by_kind[kind]]
    if work:
        launched = [e for kind in LAUNCHES for e in by_kind[kind] if "correlation" in e.get("args", {})]
        by_number = {e["args"]["correlation"]: e for e in launched}
        pairs = [
            (by_number[e["args"]["correlation"]], e) for e in work if e["args"]["correlation"] in by_number
        ]
        caller = named["whole"][0]["tid"]
        streams = {e["args"]["stream"] for launch, e in pairs if launch["tid"] == caller}
        durations = [(launch["ts"], e["dur"]) for launch, e in pairs if e["args"]["stream"] in streams]
        for name in named.keys() - {"data", "whole"}:
            spent[name] = _launched_within(named[name], durations)
    whole = spent.pop("whole")
    found = {name: value / whole for name, value in spent.items()}
    found["rest"] = max(0.0, 1 - sum(found[n] for n in ("data", "forward", "backward", "optimizer")))
    return found


def _launched_within(ranges: list[Event], launches: list[tuple[float, float]]) -> float:
    """The time of the (moment, time) pairs whose moment lies in one of the ranges, which do not overlap."""
    ordered = sorted((e["ts"], e["ts"] + e["dur"]) for e in ranges)
    starts = [start for start, _ in ordered]
    inside = 0.0
    for moment, duration in launches:
        at = bisect_right(starts, moment) - 1
        if at >= 0 and moment <= ordered[at][1]:
            inside += duration
    return inside
