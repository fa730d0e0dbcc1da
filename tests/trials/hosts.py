"""Shows that a run survives the loss of a host: python -m tests.trials.hosts

Two or three hosts are network namespaces of this machine (tests/support/hosts.py), joined by real TCP and gloo; each
has a torchrun and one rank. In the middle of an epoch one of them is killed, frozen, told to stop (SIGTERM), or cut
off from the network. Each scenario is a row of hosts.json: after how many seconds the other ranks ended, and how the
run ended. Takes about 10 minutes on two cores, and root; needs iproute2.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import write_result
from fastnet.distributed.launch import launch_command
from tests.support.hosts import HEARTBEAT, Hosts
from tests.support.paths import SCRIPT
from tests.support.runs import assert_same_end, events, wait_for_step

TIMEOUT, INTERVAL, STEPS, FAULT_AT = 10, 5, 74, 20
FLAGS = (
    "sample --network lstm --image-size 32 --batch-size 64 --head-epochs 1 --epochs 1 --threads 1 --log-every 1 "
    f"--checkpoint-every {INTERVAL} --timeout {TIMEOUT}"
).split()
# The longest that anything here may take: torchrun's own waits, and a whole run on busy cores.
PATIENCE = 300


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = place / "sample"
        subprocess.run([sys.executable, "-m", "fastnet.prepare", "sample", "--out", str(data)], check=True)
        whole: dict[int, Path] = {}
        for count in (2, 3):
            whole[count] = place / f"one-host-{count}"
            one_host(count, data, whole[count])
            rows.append(undisturbed(count, data, place / f"hosts-{count}", whole[count]))
            for fault in ("kill", "freeze", "cut_off", "terminate"):
                rows.append(one_fewer(fault, count, data, place / f"{fault}-{count}", whole[count]))
        rows.append(host_returns(3, data, place / "returns", whole[3]))
        for fault in ("kill", "freeze", "cut_off"):
            rows.append(rendezvous_lost(fault, 2, data, place / f"{fault}-first", whole[2]))
    facts = {
        "command": "python -m tests.trials.hosts",
        "flags": " ".join(FLAGS),
        "timeout_s": TIMEOUT,
        "checkpoint_every_steps": INTERVAL,
        "fault_after_step": FAULT_AT,
        "rows": rows,
    }
    print(write_result("hosts", facts).read_text())


def one_host(ranks: int, data: Path, run: Path) -> None:
    flags = [*FLAGS, "--data", data, "--run-dir", run]
    subprocess.run(launch_command(SCRIPT, flags, ranks=ranks), check=True)


def undisturbed(count: int, data: Path, run: Path, whole: Path) -> dict[str, Any]:
    """As many hosts as the reference has ranks: the run ends with the same bits."""
    run.mkdir()
    with Hosts(count, run) as hosts:
        start_all(hosts, data, run)
        wait_all(hosts, range(count))
    assert_same_end(run, whole)
    return {"hosts": count, "fault": "none", "same_as_one_host": True}


def one_fewer(fault: str, count: int, data: Path, run: Path, whole: Path) -> dict[str, Any]:
    """The last host is lost: the other ranks end in time, torchrun starts them again, and they finish without it."""
    run.mkdir()
    others = range(count - 1)
    with Hosts(count, run) as hosts:
        start_all(hosts, data, run)
        wait_for_step(hosts.agents[0], run, FAULT_AT)
        began = time.monotonic()
        getattr(hosts, fault)(count - 1)
        waits = [ended(hosts, host, began) for host in others]
        wait_all(hosts, others)
        lines = [said for host in others for said in error_lines(hosts, host)]
    return {
        "hosts": count,
        "fault": f"{fault} host {count}",
        "others_ended_after_s": waits,
        "error_lines_of_others": len(lines),
        **ending(run, whole),
    }


def host_returns(count: int, data: Path, run: Path, whole: Path) -> dict[str, Any]:
    """The last host is killed and started again, as a cluster would: the run ends with the same bits."""
    run.mkdir()
    with Hosts(count, run) as hosts:
        start_all(hosts, data, run, least=count)
        wait_for_step(hosts.agents[0], run, FAULT_AT)
        began = time.monotonic()
        hosts.kill(count - 1)
        hosts.agents[count - 1].wait()
        waits = [ended(hosts, host, began) for host in range(count - 1)]
        # Until torchrun has missed the lost host's heartbeats, it would count the old and the new one as two.
        time.sleep(4 * HEARTBEAT)
        start(hosts, count - 1, data, run, count)
        wait_all(hosts, range(count))
    assert_same_end(run, whole)
    row = {"hosts": count, "fault": f"kill host {count}, start it again", "others_ended_after_s": waits}
    return {**row, **ending(run, whole), "same_as_one_host": True}


def rendezvous_lost(fault: str, count: int, data: Path, run: Path, whole: Path) -> dict[str, Any]:
    """The first host is lost, and torchrun's rendezvous with it: all ranks end, and the same command continues.

    If that host stops answering while its connections stay open, torchrun 2.14 on the others waits for its store
    forever and ignores SIGTERM (TCPStore waits for the answer to its cancelled wait). Once the ranks have ended it has
    to be killed, as a scheduler does with the job of a node that is down.
    """
    run.mkdir()
    took: dict[str, Any] = {}
    with Hosts(count, run) as hosts:
        start_all(hosts, data, run)
        wait_for_step(hosts.agents[1], run, FAULT_AT)
        began = time.monotonic()
        getattr(hosts, fault)(0)
        if fault != "kill":
            took["others_ended_after_s"] = [ended(hosts, host, began) for host in range(1, count)]
            took["torchrun"] = "killed"
        else:
            for host in range(1, count):
                hosts.agents[host].wait(timeout=PATIENCE)
            took["torchrun_ended_after_s"] = round(time.monotonic() - began, 1)
    with Hosts(count, run) as hosts:
        start_all(hosts, data, run)
        wait_all(hosts, range(count))
    assert_same_end(run, whole)
    row = {"hosts": count, "fault": f"{fault} host 1 (rendezvous)", **took}
    return {**row, **ending(run, whole), "same_as_one_host": True}


def start_all(hosts: Hosts, data: Path, run: Path, least: int = 1) -> None:
    for host in range(hosts.count):
        start(hosts, host, data, run, least)


def start(hosts: Hosts, host: int, data: Path, run: Path, least: int) -> None:
    hosts.start(host, least, f"job-{run.name}", *FLAGS, "--data", data, "--run-dir", run)


def error_lines(hosts: Hosts, host: int) -> list[str]:
    what = "is gone or did not answer|since another host was asked to"
    return re.findall(f"^error: rank .*(?:{what}).*", hosts.said(host), re.MULTILINE)


def ended(hosts: Hosts, host: int, began: float) -> float:
    """Seconds from `began` until the rank on `host` said why it ended."""
    while not error_lines(hosts, host):
        if time.monotonic() - began > PATIENCE or hosts.agents[host].poll() is not None:
            raise RuntimeError(f"host {host + 1} did not notice:\n{hosts.said(host)}")
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def wait_all(hosts: Hosts, which: range) -> None:
    for host in which:
        if hosts.agents[host].wait(timeout=PATIENCE):
            raise RuntimeError(f"host {host + 1} failed:\n{hosts.said(host)}")


def ending(run: Path, whole: Path) -> dict[str, Any]:
    """How the run ended, beside the run that was not disturbed."""
    epochs, undisturbed_epochs = events(run, "epoch"), events(whole, "epoch")
    steps = [event["step"] for event in events(run, "step")]
    assert steps == list(range(1, STEPS + 1)), steps
    sessions = json.loads((run / "manifest.json").read_text())["sessions"]
    return {
        "ranks": [session["ranks"] for session in sessions],
        "continued_after_step": [session["from_step"] for session in sessions[1:]],
        "images_counted_per_epoch": [epoch["train_count"] for epoch in epochs],
        "images_per_epoch": [epoch["train_count"] for epoch in undisturbed_epochs],
        "train_loss": [epoch["train_loss"] for epoch in epochs],
        "train_loss_undisturbed": [epoch["train_loss"] for epoch in undisturbed_epochs],
    }


if __name__ == "__main__":
    main()
