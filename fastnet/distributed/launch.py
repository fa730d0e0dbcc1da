"""The command line that starts a script on several ranks of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def launch_command(
    script: Path, arguments: Sequence[object], *, ranks: int, options: Sequence[str] = ("--standalone",)
) -> list[str]:
    """`python script arguments` for one rank, else the same under torchrun with its `options`."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", *options, f"--nproc_per_node={ranks}"]
    return [*command, str(script), *map(str, arguments)]
