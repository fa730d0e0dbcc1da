"""Output files that are there whole or not at all, and short names for run directories."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastnet.errors import refused


@contextmanager
def atomic_write(path: Path, *, full: str = "") -> Iterator[Path]:
    """Yields a temporary path beside `path`; leaving the block without an error renames it to `path`.

    Creates missing parent directories. Raises InputError if the place cannot be written or the disk is full (`full`
    then ends the message, see `errors.refused`). Nothing half-written stays behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except OSError as error:
        raise refused(error, path, full=full) from error
    finally:
        if beside.parent.is_dir():
            beside.unlink(missing_ok=True)


def short_names(runs: Sequence[Path]) -> list[str]:
    """The directories' own names, or their whole paths where the names alone are not distinct."""
    names = [path.resolve().name for path in runs]
    return names if len(set(names)) == len(names) else [str(path) for path in runs]
