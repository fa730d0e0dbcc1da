from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

OFFICIAL_SIZE = 248_100_043
OFFICIAL_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Entry(NamedTuple):
    """One image: its name in the set, its class (None where unlabelled), and what `read` takes."""

    name: str
    label: str | None
    where: Any


@dataclass
class Source:
    record: dict[str, Any]  # kind, path, official, bytes, md5
    splits: dict[str, list[Entry]]
    read: Callable[[Any], bytes]
    words: dict[str, str] = field(default_factory=dict)  # class -> readable name, where there is one


class Tree(NamedTuple):
    """Files of a folder or a zip, by their paths below it."""

    path: Path
    files: list[str]
    read: Callable[[str], bytes]


def file_md5(paths: Iterable[Path]) -> str:
    """md5 of the files' contents, one after the other."""
    digest = hashlib.md5(usedforsecurity=False)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which val_2 comes before val_10."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d+)|(\D+)", name)]
