"""Runs docker/slurm.sbatch on a Slurm cluster of two nodes on this machine: python -m tests.trials.slurm

Slurm's own daemons, as Debian builds them, run as two nodes under two names, each with a directory of its own mounted
as its local disk. A small run on the CPU, one rank a node, is submitted several times: undisturbed; with a time limit
that is too short; preempted by a partition of higher priority, with and without a grace period; cancelled and
submitted again. All must end with the same weights and epochs as the undisturbed one. It takes about six minutes,
stops everything it started, and writes slurm.json.

As root: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import write_result
from fastnet.prepare import main as prepare
from tests.support.official import jpeg, official_files, write_folder

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "slurm.sbatch"
NODES = ("n1", "n2")
STEPS_PER_EPOCH, EPOCHS = 24, 12
TRAIN = f"sample --network baseline --image-size 32 --batch-size 16 --epochs {EPOCHS} --threads 1"
REQUEUE_DELAY = 10  # Slurm waits for credentials to expire, by default 120 s, before it starts a job again
PATIENCE = 300

CONFIG = """
ClusterName=try
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={root}/munge.socket,cred_expire={delay}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=grace Nodes=n1,n2 PriorityTier=1 GraceTime=60 Default=YES
PartitionName=abrupt Nodes=n1,n2 PriorityTier=1 GraceTime=0
PartitionName=urgent Nodes=n1,n2 PriorityTier=10
"""


class Cluster:
    """A Slurm cluster of this machine, its daemons children of this process, all its files under `root`."""

    def __init__(self, root: Path, leave: ExitStack) -> None:
        self.root = root
        self.scratch = root / "disk"  # what a node finds there is its own
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        for name in ("state", "disk", *(f"{kind}-{node}" for node in NODES for kind in ("spool", "disk"))):
            (root / name).mkdir()
        (root / "munge.key").write_bytes(os.urandom(1024))
        (root / "munge.key").chmod(0o600)
        (root / "slurm.conf").write_text(
            CONFIG.format(
                root=root,
                host=socket.gethostname().split(".")[0],
                ports=free_ports(3),
                cpus=os.cpu_count(),
                delay=REQUEUE_DELAY,
            ),
            encoding="utf-8",
        )
        files = (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("seed-file", "seed"))
        munge = [f"--{flag}={root}/munge.{name}" for flag, name in files]
        leave.enter_context(self.daemon("munged", "munged", "--foreground", "--force", *munge))
        until((root / "munge.socket").exists, "munged")
        leave.enter_context(self.daemon("slurmctld", "slurmctld", "-D"))
        for node in NODES:
            mount = f"mount --bind {root}/disk-{node} {self.scratch} && exec slurmd -D -N {node}"
            leave.enter_context(self.daemon(f"slurmd-{node}", "unshare", "--mount", "sh", "-c", mount))
        until(lambda: self("sinfo", "--noheader", "--format=%D %t") == "2 idle", "the nodes")
        leave.callback(self.empty)

    def __call__(self, *command: str) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip()

    @contextmanager
    def daemon(self, name: str, *command: str) -> Iterator[None]:
        with (self.root / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            try:
                yield
            finally:
                process.terminate()
                process.wait()

    def empty(self) -> None:
        """Cancels what is left and waits until it is gone: a job outlives its slurmd."""
        self("scancel", "--user=root")
        until(lambda: not self("squeue", "--noheader"), "cancelled jobs")

    def submit(self, options: str, run: Path, data: Path) -> str:
        """Submits the training of `run`; returns the job's number."""
        words = [f"--output={run}.log", "--nodes=2", *options.split(), str(SCRIPT), *TRAIN.split()]
        self.environment |= {
            "FASTNET_DATA": str(data),
            "FASTNET_SCRATCH": str(self.scratch / "fastnet"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        command = ["sbatch", "--parsable", f"--chdir={SCRIPT.parents[1]}", *words, "--run-dir", str(run)]
        return subprocess.check_output(command, env=self.environment, text=True).strip()

    def job(self, number: str, name: str) -> str:
        """The field `name` of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self("scontrol", "show", "job", "--oneliner", number))
        return found[1] if found else ""

    def ended(self, number: str) -> str:
        """Waits for a job's end; returns its state."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        until(lambda: self.job(number, "JobState") in final, f"job {number}")
        return self.job(number, "JobState")


def main() -> None:
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch", "unshare") if not shutil.which(name)
    ]
    if missing or os.geteuid() != 0:
        print(
            f"needs root and {', '.join(missing) or 'nothing else'}: {__doc__.splitlines()[-1]}",
            file=sys.stderr,
        )
        sys.exit(2)
    with tempfile.TemporaryDirectory(prefix="fastnet-slurm-") as folder, ExitStack() as leave:
        root = Path(folder)
        files = official_files(4, 96, 48, 4, lambda i: jpeg(i, size=32))
        prepare([str(write_folder(root / "source", files) / "tiny-imagenet-200"), "--out", str(root / "set")])
        (root / "cluster").mkdir()
        cluster = Cluster(root / "cluster", leave)
        runs = {}
        for name, scenario in SCENARIOS.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            run = root / name
            begun = time.monotonic()
            states = scenario(cluster, run, root / "set")
            runs[name] = {"job_states": states, "seconds": round(time.monotonic() - begun), **seen(run)}
            runs[name]["same_as_uninterrupted"] = same(run, root / "uninterrupted")
            print(json.dumps(runs[name]), file=sys.stderr, flush=True)
        staging = staged(root)
        values = {
            "command": "python -m tests.trials.slurm",
            "system": platform.freedesktop_os_release()["PRETTY_NAME"],
            "slurm": cluster("slurmctld", "-V").split()[-1],
            "munge": cluster("munged", "--version").split()[0].removeprefix("munge-"),
            "nodes": "2 slurmd on this machine, 1 rank each (gloo), staging directories of their own",
            "train": f"train.py {TRAIN}",
            "requeue_delay_s": REQUEUE_DELAY,
            "runs": runs,
            "staging": staging,
        }
    print(write_result("slurm", values))
    problems = [
        name
        for name, run in runs.items()
        if not all(run["same_as_uninterrupted"].values())
        or run["steps_lost"]
        or len(run["stopped_after"]) != (0 if name == "uninterrupted" else 1)
    ]
    if problems or any(count != 1 for count in staging["copied"].values()):
        sys.exit(f"not as it should be: {problems or staging}")


def uninterrupted(cluster: Cluster, run: Path, data: Path) -> list[str]:
    number = cluster.submit("--time=10", run, data)
    return [cluster.ended(number)]


def time_limit(cluster: Cluster, run: Path, data: Path) -> list[str]:
    """Slurm counts limits in minutes and sends the signal up to a minute early: 20 s to 50 s after the start."""
    number = cluster.submit("--time=1 --signal=B:USR1@10", run, data)
    return [cluster.ended(number)]


def preempted(partition: str) -> Callable[[Cluster, Path, Path], list[str]]:
    def scenario(cluster: Cluster, run: Path, data: Path) -> list[str]:
        number = cluster.submit(f"--time=10 --partition={partition}", run, data)
        until(lambda: steps(run) > STEPS_PER_EPOCH, "steps")
        urgent = subprocess.check_output(
            ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"],
            input="#!/bin/sh\n:\n",
            env=cluster.environment,
            text=True,
        ).strip()
        return [f"preemptor {cluster.ended(urgent)}", cluster.ended(number)]

    return scenario


def cancelled(cluster: Cluster, run: Path, data: Path) -> list[str]:
    number = cluster.submit("--time=10", run, data)
    until(lambda: steps(run) > STEPS_PER_EPOCH, "steps")
    cluster("scancel", number)
    states = [cluster.ended(number)]
    until(lambda: not cluster("squeue", "--noheader"), "the cancelled job")
    again = cluster.submit("--time=10", run, data)
    return [*states, cluster.ended(again)]


SCENARIOS: dict[str, Callable[[Cluster, Path, Path], list[str]]] = {
    "uninterrupted": uninterrupted,
    "time_limit": time_limit,
    "preempted_with_grace": preempted("grace"),
    "preempted_without_grace": preempted("abrupt"),
    "cancelled_and_submitted_again": cancelled,
}


def seen(run: Path) -> dict[str, Any]:
    """What the job's log and the run's records say: where it stopped, where it continued, and after how long."""
    log = run.with_name(f"{run.name}.log").read_text(encoding="utf-8")
    sessions = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    stopped = [int(step) for step in re.findall(r"^stopped after step (\d+), all saved", log, re.M)]
    continued = [session["from_step"] for session in sessions[1:]]
    times = [
        (what, datetime.fromisoformat(at)) for at, what in re.findall(r"^(\S+) job \d+[,:] (\w+)", log, re.M)
    ]
    pauses = [
        (later - earlier).total_seconds()
        for (ended, earlier), (_, later) in pairwise(times)
        if ended == "ended"
    ]
    return {
        "starts": len(sessions),
        "stopped_after": stopped,
        "continued_after": continued,
        "steps_lost": sum(stopped) - sum(continued),
        "seconds_out_of_work": pauses,
        "steps": json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"],
    }


def steps(run: Path) -> int:
    """The steps that the run has recorded."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["step"]
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def same(run: Path, other: Path) -> dict[str, bool]:
    """Whether two runs ended with the same bits, and had the same losses and scores in all epochs."""
    first, second = (torch.load(path / "last.pt", weights_only=True) for path in (run, other))
    weights = first["model"].keys() == second["model"].keys() and all(
        torch.equal(first["model"][name], second["model"][name]) for name in second["model"]
    )
    return {"weights": weights, "epochs": epochs(run) == epochs(other) and len(epochs(run)) == EPOCHS}


def epochs(run: Path) -> list[dict[str, Any]]:
    """The run's epochs, without what depends on the clock or the machine's memory."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    keys = ("phase", "epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr")
    records = [json.loads(line) for line in lines]
    return [{key: record[key] for key in keys} for record in records if record["event"] == "epoch"]


def staged(root: Path) -> dict[str, dict[str, int]]:
    """How often each node copied the set, and how often it found it."""
    logs = "".join(path.read_text(encoding="utf-8") for path in root.glob("*.log"))
    return {
        "copied": {node: len(re.findall(rf"^{node}: copied ", logs, re.M)) for node in NODES},
        "found": {node: len(re.findall(rf"^{node}: .* is there$", logs, re.M)) for node in NODES},
    }


def until(true: Callable[[], bool], what: str) -> None:
    """Waits until `true()`; ends the script after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not there after {PATIENCE} s")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


if __name__ == "__main__":
    main()
