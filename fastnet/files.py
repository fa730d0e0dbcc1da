"""Output files that are there whole or not at all, and short names for run directories."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fastnet.errors import InputError, refused

PARTIAL = ".partial"
STALE = 3600.0  # seconds; a process that still writes a file does so many times within them


@contextmanager
def atomic_write(path: Path, *, full: str = "") -> Iterator[Path]:
    """Yields a temporary path beside `path`; leaving the block without an error renames it to `path`.

    Creates missing parent directories. Raises InputError as `check_place`, and if the place cannot be written or the
    disk is full (`full` then ends the message, see `errors.refused`). Nothing half-written stays behind.
    """
    beside: Path | None = None
    try:
        check_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under a name that nobody can foresee, so that it cannot be a link that someone else put there.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        beside = Path(name)
        os.fchmod(handle, 0o666 & ~_umask())
        os.close(handle)
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())  # or a crash of the machine could leave an empty file under the name
        beside.replace(path)
    except OSError as error:
        raise refused(error, path, full=full) from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raises InputError if a folder, a device or a pipe is at `path`, which no file may replace, or if nothing can be
    written beside it."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no file, but a folder, device or pipe; choose another place")
    parent = next(above for above in path.absolute().parents if above.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = errno.EACCES if parent.is_dir() else errno.ENOTDIR
        raise InputError(f"{path}: cannot be written ({os.strerror(reason)}: {parent}); choose another place")


def remove_leftovers(folder: Path, name: str = "*", *, older: float = 0.0) -> None:
    """Removes what killed processes left of writing `name`, and was not written to for `older` seconds, as far as
    they can be removed. 0 is only for who knows that no other process writes there."""
    for left in folder.glob(f".{name}.*{PARTIAL}"):
        with suppress(OSError):  # another process was quicker, or it has to stay
            if time.time() - left.stat().st_mtime >= older:
                left.unlink()


def _umask() -> int:
    """The permissions that this process takes away from files it makes. Linux tells without changing them."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)


def refuse_link(path: Path) -> None:
    """Raises InputError if `path` is a symbolic link: writing would change a file elsewhere."""
    if path.is_symlink():
        raise InputError(f"{path}: is a symbolic link, which is not written through; remove it")


def short_names(runs: Sequence[Path]) -> list[str]:
    """The directories' own names, or their whole paths where the names alone are not distinct."""
    names = [Path(os.path.realpath(path)).name for path in runs]
    return names if len(set(names)) == len(names) else [str(path) for path in runs]
