"""The errors that end a command with one line instead of a traceback (see `cli.run_command`)."""

from __future__ import annotations

import errno
import sys
from pathlib import Path


class InputError(Exception):
    """Bad input. The message is one line that names what is wrong and what to do.

    `told_by` says which ranks print it: "run" rank 0 for all, "host" the first one of each host, "rank" the one that
    raises it. Before the ranks meet, no host knows of the others'.
    """

    told_by = "host"


class ImageError(InputError):
    """An image that cannot be read. Of several ranks, only the one that reads it knows."""

    told_by = "rank"


class MemoryFullError(InputError):
    """The memory of a rank's device does not hold what it was to do; where several ranks fail so, the first one to
    notice says it for all (`told` is True for the others)."""

    told_by = "rank"
    told = False


class LostError(Exception):
    """Other ranks are gone, or another host was told to stop. One line; every rank prints its own."""


def is_disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refused(error: OSError, path: Path | str, *, full: str = "") -> InputError:
    """A file or folder that cannot be written, as an `InputError`.

    `full` says what became of the work on a full disk, and what to do.
    """
    if is_disk_full(error):
        return InputError(
            f"{path}: no space left on the disk; {full or 'free some space and run the same command again'}"
        )
    return InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place")


def unreadable(error: OSError, path: Path | str) -> InputError:
    """A file that cannot be read, as an `InputError`."""
    return InputError(
        f"{path}: cannot be read ({error.strerror or error}); check the file and its permissions"
    )


def told(error: OSError, place: str) -> InputError | None:
    """The one line of an error that a user can do something about: a full disk, a path that the system refuses; None
    of others. `place` stands for a file whose name is not known."""
    if is_disk_full(error):
        return refused(error, error.filename or place)
    if error.filename and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG):
        return InputError(
            f"{error.filename}: cannot be used ({error.strerror}); check its name and permissions, or use another"
        )
    return None


def printable(text: str) -> str:
    r"""The text with what a terminal should not get, or cannot show, as escapes such as \x1b.

    A file name may hold control characters and bytes that are no text.
    """
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # None: stdout is closed
    return escaped.encode(encoding, "backslashreplace").decode(encoding)
