"""Ranks without a launcher, so that a test sees each one's own end."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence


def start_ranks(
    commands: Sequence[Sequence[str]], *, hosts: int = 1, **more: str
) -> list[subprocess.Popen[str]]:
    """A rank for each command, with `more` in the environment; as though on so many hosts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GROUP_WORLD_SIZE": str(hosts),
        "OMP_NUM_THREADS": "1",
        **more,
    }
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
