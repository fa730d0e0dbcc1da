"""What a source of images is: a complete listing, and a way to read one image."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

OFFICIAL_SIZE = 248_100_043
OFFICIAL_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Entry(NamedTuple):
    """One image: its name in the set, its class (None where unlabelled), and what `Source.read` takes."""

    name: str
    label: str | None
    where: Any


@dataclass
class Source:
    """Where a set comes from. `read` raises BadImage for an image that cannot be read."""

    record: dict[str, Any]  # kind, path, official, bytes, md5
    splits: dict[str, list[Entry]]
    read: Callable[[Any], bytes]
    words: dict[str, str] = field(default_factory=dict)  # class -> readable name, where there is one
    left_out: list[str] = field(default_factory=list)  # files that no image is expected in, by their names

    @property
    def place(self) -> str:
        """What error messages call the source."""
        return self.record["path"] or self.record["kind"]


class Tree(NamedTuple):
    """The files of a folder or a zip, and all folders in it, as paths below it. Hidden ones are left out.

    `read(name, limit)` raises BadImage for a file that is damaged or has more than `limit` bytes.
    """

    path: Path
    files: list[str]
    folders: set[str]
    read: Callable[[str, int], bytes]


def file_md5(paths: Iterable[Path]) -> str:
    """md5 of the files' contents, one after the other."""
    digest = hashlib.md5(usedforsecurity=False)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def natural(name: str) -> tuple[list[tuple[int, str, str]], str]:
    """Sort key that puts val_2 before val_10; two names that differ in leading zeros have an order too."""
    parts = ((digits.lstrip("0"), text) for digits, text in re.findall(r"(\d+)|(\D+)", name))
    return [(len(digits), digits, text) for digits, text in parts], name


def readable(name: str) -> str:
    r"""A file name as text that can be stored as UTF-8: bytes that are not become escapes, as in "caf\xe9.jpg"."""
    if name.isascii():
        return name
    try:
        raw = name.encode("utf-8", "surrogateescape")  # how Python holds the bytes of a file name
    except UnicodeEncodeError:
        raw = name.encode("utf-8", "surrogatepass")
    return raw.decode("utf-8", "backslashreplace")


def is_image_name(name: str) -> bool:
    """Whether a file is expected to hold an image: its suffix is that of an image format, or it has none."""
    suffix = Path(name).suffix.lower()
    return not suffix or suffix in Image.registered_extensions()
