"""Downloads the official Tiny ImageNet zip. A download that broke off is continued."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from fastnet.data.entries import OFFICIAL_MD5, OFFICIAL_SIZE, file_md5
from fastnet.data.lock import exclusive
from fastnet.errors import InputError, is_disk_full, refused
from fastnet.progress import Progress

ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
SILENCE = 60  # seconds without a byte after which the server counts as gone


def download(
    target: Path, address: str = ADDRESS, size: int = OFFICIAL_SIZE, md5: str = OFFICIAL_MD5
) -> Path:
    """Fetches `address` to `target` unless it is there already; continues what an earlier call left unfinished.

    Until it is whole, the file is `<target>.part`. Raises InputError if the server cannot be reached, stops
    sending, or sends a file of another size or md5, and if the file cannot be written.
    """
    if target.exists():
        print(f"{target}: already there, not downloaded again")
        return target
    part = target.with_name(target.name + ".part")
    try:
        with exclusive(part):  # another process may be at it
            return target if target.exists() else _download(target, part, address, size, md5)
    except OSError as error:
        raise refused(error, part) from error


def _download(target: Path, part: Path, address: str, size: int, md5: str) -> Path:
    part.touch()
    try:
        if part.stat().st_size < size:
            fetch(part, address, size)
    except (http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and is_disk_full(error):
            raise refused(error, part) from error
        raise InputError(
            f"{address}: {error}, after {part.stat().st_size:,} of {size:,} bytes; "
            "run the same command again to continue"
        ) from error
    found = (part.stat().st_size, file_md5([part]))
    if found[0] < size:
        raise InputError(
            f"{address}: the server stopped after {found[0]:,} of {size:,} bytes; "
            "run the same command again to continue"
        )
    if found != (size, md5):
        part.unlink()
        raise InputError(
            f"{address}: sent {found[0]:,} bytes with md5 {found[1]}, expected {size:,} with md5 {md5}; "
            "the file was removed, run the same command again"
        )
    part.rename(target)
    return target


def fetch(part: Path, address: str, size: int) -> None:
    """Appends the missing rest to `part`, or starts over if the server does not support ranges."""
    have = part.stat().st_size
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=SILENCE) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        with (
            part.open("ab" if resumed else "wb") as file,
            Progress("downloading", size, "bytes", done=have if resumed else 0) as progress,
        ):
            while block := response.read(1 << 18):
                file.write(block)
                progress.add(len(block))
