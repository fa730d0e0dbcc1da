"""The lock that keeps two jobs out of one run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.files import remove_leftovers

A_LOOK = 0.1  # seconds, in which `fastnet runs` has long let go of a lock that it tried


class RunLock:
    """A lock on the file `.lock` of a run directory, which ends with the process that holds it.

    The file holds the id of the torchrun job (`--rdzv-id`). A rank 0 that torchrun restarts takes the lock over
    from its predecessor in the same job, which may hang on a host that is frozen or cut off and then cannot save any
    more. The filelock library does not serve here: it empties the file before it knows that it holds the lock.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"
        self.job = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's own name for "not given"
        held = self._locked()
        if held is None:
            time.sleep(A_LOOK)
            held = self._locked()
        self.held = self._taken_over() if held is None else held

    def _locked(self) -> int | None:
        """The open lock file, or None if another process holds it."""
        held = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            reason = f"{self.path}: this file system has no locks; make sure that only one job trains there"
            print(reason, file=sys.stderr, flush=True)
        os.ftruncate(held, 0)
        os.write(held, self.job.encode())
        return held

    def _taken_over(self) -> int:
        holder = self.path.read_text(encoding="utf-8")
        if self.job == "none" or holder != self.job:
            raise InputError(
                f"{self.path.parent}: another process is training there; wait for it, or give another --run-dir"
            )
        self.path.unlink()
        held = self._locked()
        assert held is not None, "nobody else knows the new file"
        return held

    def check(self) -> None:
        """Raises InputError if another process has taken the run over."""
        if not self.path.exists() or not os.path.samestat(os.fstat(self.held), self.path.stat()):
            raise InputError(
                f"{self.path.parent}: taken over by a restart of this job; nothing more is saved here"
            )

    def release(self) -> None:
        os.close(self.held)


@contextmanager
def run_lock(run_dir: Path, runtime: Runtime) -> Iterator[RunLock | None]:
    """Makes the directory `run_dir` and holds its lock; removes what a killed process left half-written in it.

    Yields rank 0's lock, None on other ranks. Raises InputError, on every rank, if the directory cannot be made or
    another job trains there.
    """
    lock = None
    with runtime.agree():
        if runtime.is_main:
            lock = _prepare(run_dir)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _prepare(run_dir: Path) -> RunLock:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run_dir)
    except OSError as error:
        raise InputError(
            f"--run-dir {run_dir}: cannot be used ({error.strerror}); choose another place"
        ) from error
    remove_leftovers(run_dir)
    return lock
