"""What a trace of torch.profiler says of a step: where its time goes, and on a GPU what it launches."""

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
CALLS = ("cuda_runtime", "cuda_driver")
WAIT = re.compile(r"cu(da)?(Stream|Device|Event|Ctx)Synchronize")
Event = dict[str, Any]


def traced(step: Callable[[], None], steps: int, device: torch.device) -> list[Event]:
    """The events of a trace of `steps` steps, which lie in a range "steps", and that with the wait for their end in
    "whole"; one step goes before."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    with torch.profiler.profile(activities=kinds) as profile, torch.profiler.record_function("whole"):
        with torch.profiler.record_function("steps"):
            for _ in range(steps):
                step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


class Trace:
    """The events by kind, and which launch on the host belongs to which work on the device.

    `work` has pairs (launch, work) on the streams that the calling thread uses; DALI has its own.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        self.by_kind: dict[str, list[Event]] = defaultdict(list)
        for event in events:
            self.by_kind[event.get("cat", "")].append(event)
        (whole,) = self.ranges("whole")
        self.caller, self.length = whole["tid"], whole["dur"]
        calls = [e for kind in CALLS for e in self.by_kind[kind] if "correlation" in e["args"]]
        launches = {e["args"]["correlation"]: e for e in calls}
        done = [e for kind in ON_DEVICE for e in self.by_kind[kind]]
        pairs = [(launches[n], e) for e in done if (n := e["args"]["correlation"]) in launches]
        streams = {e["args"]["stream"] for launch, e in pairs if launch["tid"] == self.caller}
        self.work = [(launch, e) for launch, e in pairs if e["args"]["stream"] in streams]

    def ranges(self, name: str) -> list[Event]:
        return [e for e in self.by_kind["user_annotation"] if e["name"] == name]


def shares_of(trace: Trace) -> dict[str, float]:
    """The share of each range in the whole time.

    "lstm backward" lies inside "backward", "lstm" and "backbone" inside "forward"; "rest" is what no range has.
    Without GPU work in the trace, a range has the time that the host spent in it. Otherwise it has the device time of
    what was launched while it was open. The calling thread opens the ranges and autograd launches the backward pass
    from another one, so the moment of a launch tells its range, and its thread does not. The whole, and the wait for
    data, are always the host's time.
    """
    named = {name: trace.ranges(name) for name in RANGES}
    named["lstm backward"] = [e for e in trace.by_kind["cpu_op"] if LSTM_BACKWARD.match(e["name"])]
    spent = {name: sum(e["dur"] for e in own) for name, own in named.items()}
    if trace.work:
        launched = [(launch["ts"], work["dur"]) for launch, work in trace.work]
        for name in named.keys() - {"data"}:
            spent[name] = _launched_within(named[name], launched)
    found = {name: value / trace.length for name, value in spent.items()}
    found["rest"] = max(0.0, 1 - sum(found[n] for n in ("data", "forward", "backward", "optimizer")))
    return found


def counts_of(trace: Trace, steps: int) -> dict[str, float]:
    """Of a step on a GPU: launches (of kernels, copies, fills and graphs), CUDA calls, and waits for the device."""
    (whole,) = trace.ranges("steps")
    calls = [e for kind in CALLS for e in trace.by_kind[kind] if e["ts"] < whole["ts"] + whole["dur"]]
    own = [e for e in calls if e["tid"] == trace.caller]
    launches = {launch["args"]["correlation"] for launch, _ in trace.work}
    return {
        "launches": len(launches) / steps,
        "CUDA calls": len(calls) / steps,
        "synchronisations": sum(bool(WAIT.match(e["name"])) for e in own) / steps,
    }


def kernels_of(trace: Trace, steps: int) -> dict[str, tuple[float, float]]:
    """Device work by name, the longest first: (times a step, microseconds a step)."""
    durations: dict[str, list[float]] = defaultdict(list)
    for _, work in trace.work:
        durations[work["name"]].append(work["dur"])
    rows = {name: (len(own) / steps, sum(own) / steps) for name, own in durations.items()}
    return dict(sorted(rows.items(), key=lambda row: -row[1][1]))


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
