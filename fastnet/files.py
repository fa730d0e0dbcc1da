"""Output files that are there whole or not at all, and short names of runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastnet.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on leaving without an error it takes the place of `path`.

    Makes the directories above. Raises InputError where the place cannot be written; a full disk stays an
    OSError, which every command reports itself. Nothing half-written is left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
    finally:
        if beside.parent.is_dir():
            beside.unlink(missing_ok=True)


def short_names(runs: Sequence[Path]) -> list[str]:
    """The directories' own names, or the whole paths where these would not tell the runs apart."""
    names = [path.resolve().name for path in runs]
    return names if len(set(names)) == len(names) else [str(path) for path in runs]
