"""A lock for making a file or folder: when many processes ask for it at once, one makes it and the others wait."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Holds a lock file beside `target`, which the system releases if the process is killed.

    Creates missing parent directories. Raises OSError if the lock file cannot be made; a link in its place is not
    followed.
    """
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for another process that is making {target}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        # Safe while the lock is held: filelock takes no lock on a file that has been removed from its folder.
        path.unlink(missing_ok=True)
        lock.release()
