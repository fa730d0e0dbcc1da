"""A lock for making a file or folder: when many processes ask for it at once, one makes it and the others wait."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Holds a lock file beside `target`, which the system releases if the process is killed.

    Creates missing parent directories. Raises OSError if the lock file cannot be made; a link in its place is not
    followed. On a file system without locks it warns, and locks nothing.
    """
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path, mode=0o666)  # another user's process may have to wait for it
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for another process that is making {target}", file=sys.stderr, flush=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        reason = f"{target}: this file system has no locks; make sure that only one process makes it"
        print(reason, file=sys.stderr, flush=True)
    try:
        yield
    finally:
        # Safe while the lock is held: filelock takes no lock on a file that has been removed from its folder.
        path.unlink(missing_ok=True)
        lock.release()
