"""Downloads the official Tiny ImageNet zip, resumably."""

from __future__ import annotations

import errno
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from fastnet.data.entries import OFFICIAL_MD5, OFFICIAL_SIZE, file_md5
from fastnet.errors import InputError
from fastnet.progress import Progress

ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
SILENCE = 60  # seconds without a byte after which the server counts as gone


def download(
    target: Path, address: str = ADDRESS, size: int = OFFICIAL_SIZE, md5: str = OFFICIAL_MD5
) -> Path:
    """Fetches `address` to `target` unless it is there; goes on where an earlier call was cut off.

    What is unfinished is `<target>.part`. Raises InputError if the server cannot be reached, breaks off, or
    sends a file of another size or md5.
    """
    if target.exists():
        print(f"{target}: is there, not downloaded again")
        return target
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    try:
        if part.stat().st_size < size:
            fetch(part, address, size)
    except (http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{address}: {error}, after {part.stat().st_size:,} of {size:,} bytes; the same command goes on from there"
        ) from error
    found = (part.stat().st_size, file_md5([part]))
    if found[0] < size:
        raise InputError(
            f"{address}: broke off after {found[0]:,} of {size:,} bytes; the same command goes on from there"
        )
    if found != (size, md5):
        part.unlink()
        raise InputError(
            f"{address}: sent {found[0]:,} bytes of md5 {found[1]}, not {size:,} of md5 {md5}; removed, try again"
        )
    part.rename(target)
    return target


def fetch(part: Path, address: str, size: int) -> None:
    """Appends to `part` what it lacks, or all of it if the server does not know ranges."""
    have = part.stat().st_size
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=SILENCE) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        with part.open("ab" if resumed else "wb") as file, Progress(size, "bytes") as progress:
            progress.add(have if resumed else 0)
            while block := response.read(1 << 18):
                file.write(block)
                progress.add(len(block))
