"""A host is cut off in mid-epoch, and the other one finishes the run. Every case: python -m tests.trials.hosts."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.hosts import Hosts, ip
from tests.support.runs import events, wait_for_step
from tests.support.tiny import STEPS, TINY

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture
def two_hosts(tmp_path: Path) -> Hosts:
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    hosts = Hosts(2, tmp_path)
    try:
        ip("netns", "add", hosts.name)
        ip("netns", "delete", hosts.name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot make network namespaces here: {error.stderr.strip()}")
    return hosts


def test_a_host_that_is_cut_off_leaves_the_run_to_the_other(
    two_hosts: Hosts, tiny_set: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [*TINY, "--timeout", 5, "--checkpoint-every", 3, "--data", tiny_set, "--run-dir", run]
    with two_hosts as hosts:
        hosts.start(0, 1, "job", *flags)
        hosts.start(1, 1, "job", *flags)
        wait_for_step(hosts.agents[0], run, 4)
        hosts.cut_off(1)
        code = hosts.agents[0].wait(timeout=150)
        said = hosts.said(0)
    assert code == 0, said
    lost = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lost) == 1 and "rank 0: another rank is gone or did not answer within --timeout 5 s" in lost[0]
    sessions = json.loads((run / "manifest.json").read_text())["sessions"]
    assert [session["ranks"] for session in sessions] == [2, 1]
    assert sessions[1]["from_step"] in (3, 5, 6, 9, 10)
    assert [event["step"] for event in events(run, "step")] == list(range(2, STEPS + 1, 2))
    assert [epoch["train_count"] for epoch in events(run, "epoch")] == [40] * 4
