"""The command line that starts a script on several ranks of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def launch_command(
    script: str | Path, arguments: Sequence[object], *, ranks: int, options: Sequence[str] = ()
) -> list[str]:
    """`python script arguments` for one rank, else the same under torchrun on this machine.

    With `options` of torchrun's own it is torchrun for any number of ranks, and `--standalone` is up to them. After a
    signal the ranks have two minutes, as validation may have to end before they save.
    """
    command = [sys.executable]
    if ranks > 1 or options:
        torchrun = options or ["--standalone"]
        command += [
            "-m",
            "torch.distributed.run",
            *torchrun,
            f"--nproc-per-node={ranks}",
            "--shutdown-timeout=120",
        ]
    return [*command, str(script), *map(str, arguments)]
