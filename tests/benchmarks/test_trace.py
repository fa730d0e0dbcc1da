"""What the trace of a step says, from made-up traces: there is no GPU here to record one."""

from __future__ import annotations

import pytest

from benchmarks.trace import Event, Trace, counts_of, kernels_of, shares_of

CALLER, AUTOGRAD, DALI = 1, 2, 3  # threads
COMPUTE, INPUT = 7, 13  # streams


def span(name: str, start: float, end: float, kind: str = "user_annotation", thread: int = CALLER) -> Event:
    return {"cat": kind, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": {}}


def launch(
    number: int, moment: float, thread: int, stream: int, duration: float, name: str = "slow"
) -> list[Event]:
    """A kernel's launch on the host, and its run on the device, much later."""
    host = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": moment, "dur": 1.0, "tid": thread}
    device = {"cat": "kernel", "name": name, "ts": 500 + moment, "dur": duration, "tid": stream}
    return [
        {**host, "args": {"correlation": number}},
        {**device, "args": {"correlation": number, "stream": stream}},
    ]


@pytest.fixture
def trace() -> Trace:
    """Autograd launches from its own thread, DALI on its own stream, and the device has annotations as well."""
    rnn = "autograd::engine::evaluate_function: _CudnnRnnBackward0"
    return Trace(
        [
            span("whole", 0, 1000),
            span("steps", 0, 225),
            span("data", 0, 50),
            span("forward", 50, 100),
            span("lstm", 80, 90),
            span("backward", 100, 200),
            span("optimizer", 200, 220),
            span("forward", 600, 900, kind="gpu_user_annotation"),
            span(rnn, 150, 170, kind="cpu_op", thread=AUTOGRAD),
            *launch(1, 60, CALLER, COMPUTE, 100),
            *launch(2, 85, CALLER, COMPUTE, 40, "quick"),
            *launch(3, 120, AUTOGRAD, COMPUTE, 200),
            *launch(4, 160, AUTOGRAD, COMPUTE, 80),
            *launch(5, 210, CALLER, COMPUTE, 30, "quick"),
            *launch(6, 130, DALI, INPUT, 300),
            span("cudaStreamSynchronize", 215, 218, kind="cuda_runtime"),
            span("cudaStreamSynchronize", 140, 190, kind="cuda_runtime", thread=DALI),
            span("cudaDeviceSynchronize", 230, 990, kind="cuda_runtime"),
        ]
    )


def test_shares_on_a_gpu(trace: Trace) -> None:
    assert shares_of(trace) == pytest.approx(
        {
            "data": 0.05,
            "forward": 0.14,
            "backbone": 0,
            "lstm": 0.04,
            "backward": 0.28,
            "lstm backward": 0.08,
            "optimizer": 0.03,
            "rest": 0.5,
        }
    )


def test_counts_and_kernels_on_a_gpu(trace: Trace) -> None:
    """Two steps: the wait after the last one, and another thread's, are not theirs."""
    assert counts_of(trace, 2) == {"launches": 2.5, "CUDA calls": 4, "synchronisations": 0.5}
    assert kernels_of(trace, 2) == {"slow": (1.5, 190), "quick": (1, 35)}
