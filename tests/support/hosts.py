"""Several hosts on one machine: network namespaces with their own addresses, joined by a bridge.

Each host runs torchrun with one rank, as `torchrun --nnodes 1:N` on a cluster. All share the file system, as a
cluster's hosts share the run directory.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import IO

from fastnet.distributed.launch import launch_command
from tests.support.paths import SCRIPT

PORT = 29400
# Seconds: a host is given up after three heartbeats, and a new round waits as long for hosts that may still come.
HEARTBEAT, LAST_CALL = 2, 6

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "eth0",
    # Otherwise torchrun 2.14 keeps the first round's store: a host that joins later waits for it in vain.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def ip(*words: object) -> str:
    """Runs iproute2's `ip`. Raises CalledProcessError, with what it said, where that is not allowed or possible."""
    line = ["ip", *map(str, words)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


class Hosts:
    """`count` hosts, the first of which runs torchrun's rendezvous. Leaving ends all that runs on them."""

    def __init__(self, count: int, logs: Path) -> None:
        self.count, self.logs = count, logs
        self.name = f"fastnet{os.getpid()}"
        self.agents: dict[int, subprocess.Popen[str]] = {}
        self.files: list[IO[str]] = []

    def __enter__(self) -> Hosts:
        try:
            ip("netns", "add", self.name)
            ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.name, "link", "set", "bridge", "up")
            for host in range(self.count):
                space = self.space(host)
                ip("netns", "add", space)
                ip("-n", space, "link", "set", "lo", "up")
                ip(
                    "-n",
                    self.name,
                    "link",
                    "add",
                    f"to{host}",
                    "type",
                    "veth",
                    "peer",
                    "eth0",
                    "netns",
                    space,
                )
                ip("-n", self.name, "link", "set", f"to{host}", "master", "bridge", "up")
                ip("-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
                ip("-n", space, "link", "set", "eth0", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for host in range(self.count):
            self.kill(host)
        for agent in self.agents.values():
            agent.wait()
        for file in self.files:
            file.close()
        for space in [self.name, *map(self.space, range(self.count))]:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)

    def space(self, host: int) -> str:
        return f"{self.name}-{host}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def start(self, host: int, least: int, job: str, *flags: object, restarts: int = 3) -> None:
        """Starts torchrun on `host`: train.py with `flags`, on `least` to `count` hosts."""
        torchrun = [
            *("--nnodes", f"{least}:{self.count}", "--max-restarts", str(restarts)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.address(0)}:{PORT}", "--rdzv-id", job),
            # These hosts share one name, by which torchrun would otherwise tell where the rendezvous is.
            *(
                "--rdzv-conf",
                f"is_host={int(host == 0)},keep_alive_interval={HEARTBEAT},last_call_timeout={LAST_CALL}",
            ),
            *("--local-addr", self.address(host)),
        ]
        line = launch_command(SCRIPT, flags, ranks=1, options=torchrun)
        file = (self.logs / f"host{host}.log").open("a")
        self.files.append(file)
        self.agents[host] = subprocess.Popen(
            ["ip", "netns", "exec", self.space(host), *line],
            stdout=file,
            stderr=file,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

    def said(self, host: int) -> str:
        """All that the host's torchrun and rank have printed."""
        return (self.logs / f"host{host}.log").read_text()

    def _signal(self, host: int, number: signal.Signals) -> None:
        listed = subprocess.run(["ip", "netns", "pids", self.space(host)], check=False, capture_output=True)
        for pid in map(int, listed.stdout.split()):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self, host: int) -> None:
        self._signal(host, signal.SIGKILL)

    def terminate(self, host: int) -> None:
        """SIGTERM to the host's torchrun, which passes it on to its rank."""
        self.agents[host].terminate()

    def freeze(self, host: int) -> None:
        self._signal(host, signal.SIGSTOP)

    def cut_off(self, host: int) -> None:
        """Pulls the host's cable: no packet comes or goes, and nobody is told."""
        ip("-n", self.name, "link", "set", f"to{host}", "down")
