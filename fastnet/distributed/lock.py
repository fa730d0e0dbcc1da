from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError


class RunLock:
    """A run directory held by one process through a lock on a file in it, which dies with the process.

    A rank 0 that torchrun starts anew takes the run over from the one before it of the same job (`--rdzv-id`), which
    may hang on a host that is cut off or frozen; that one can save no more.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / ".lock"
        self.job = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's own name for "not given"
        held = self._locked()
        self.held = self._taken_over() if held is None else held

    def _locked(self) -> int | None:
        held = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            reason = f"{self.path}: no locks on this file system; see to it that only one job trains there"
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
def claimed(run: Path, runtime: Runtime) -> Iterator[RunLock | None]:
    """Makes the directory `run` and holds it for this process; removes what a killed one left half written.

    Yields rank 0's claim, None on other ranks. Raises InputError, on every rank, if the directory cannot be made or
    another job trains there.
    """
    claim = runtime.together(lambda: _claim(run) if runtime.is_main else None)
    try:
        yield claim
    finally:
        if claim is not None:
            claim.release()


def _claim(run: Path) -> RunLock:
    try:
        run.mkdir(parents=True, exist_ok=True)
        claim = RunLock(run)
    except OSError as error:
        raise InputError(
            f"--run-dir {run}: cannot be made ({error.strerror}); choose another place"
        ) from error
    for path in [*run.glob(".*.pt.*"), *run.glob(".manifest.json.*")]:
        path.unlink(missing_ok=True)
    return claim
