"""Which ranks write to the same disk."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from fastnet.distributed.ranks import Runtime
from fastnet.errors import refused
from fastnet.files import PARTIAL


def ranks_sharing(folder: Path, runtime: Runtime) -> list[int]:
    """The ranks that see what this one writes into `folder`, itself among them: on one host all, on several hosts those
    of this one alone where its disk is its own.

    Collective. Makes the folder; raises InputError where a rank cannot write to it.
    """
    marks = [folder / f".mark.{name}{PARTIAL}" for name in runtime.gather(secrets.token_hex(8))]
    own = marks[runtime.rank]
    try:
        with runtime.agree():  # ends when all marks are there
            try:
                folder.mkdir(parents=True, exist_ok=True)
                own.touch()
            except OSError as error:
                raise refused(error, folder) from error
        sharing = [rank for rank, mark in enumerate(marks) if mark.exists()]
        runtime.gather(None)  # until all have looked
    finally:
        with suppress(OSError):  # it may not be there
            own.unlink()
    return sharing
