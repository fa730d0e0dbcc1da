"""Where a set comes from: every packaging of Tiny ImageNet (and of any classes of images) as one `Source`.

A source is a listing, complete and checked before the first image is read, and a way to read one image.
"""

from __future__ import annotations

import random
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

from fastnet.data import sample
from fastnet.data.entries import OFFICIAL_MD5, OFFICIAL_SIZE, Entry, Source, Tree, file_md5, natural
from fastnet.data.layouts import class_folders, official_layout
from fastnet.data.parquet import parquet_source
from fastnet.errors import InputError


def find_source(path: Path) -> Source:
    """Tells by its content what `path` is. Raises InputError if it is none of the known kinds."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        tree = Tree(path, folder_files(path), lambda name: (path / name).read_bytes())
        if parquet := [name for name in tree.files if name.endswith(".parquet")]:
            return parquet_source(path, [path / name for name in parquet])
        record = {"kind": "folder", "path": str(path), "official": None, "bytes": None, "md5": None}
        return tree_source(tree, record)
    if path.suffix == ".parquet":
        return parquet_source(path, [path])
    return tree_source(open_zip(path), zip_record(path))


def tree_source(tree: Tree, record: dict[str, Any]) -> Source:
    roots = [name.removesuffix("wnids.txt") for name in tree.files if Path(name).name == "wnids.txt"]
    if len(roots) > 1:
        raise InputError(f"{tree.path}: more than one wnids.txt: {', '.join(roots)}; name one folder")
    return official_layout(tree, roots[0], record) if roots else class_folders(tree, record)


def folder_files(path: Path) -> list[str]:
    """All files below a folder but hidden ones, in natural order."""
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return sorted((str(f) for f in files if not any(part.startswith(".") for part in f.parts)), key=natural)


def open_zip(path: Path) -> Tree:
    """A zip's files without extracting them. Names that would leave a folder, and links, are refused."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path}: not a whole zip ({error}); it may be truncated: get it again, or name a folder or Parquet"
        ) from error
    files = []
    for info in archive.infolist():
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise InputError(f"{path}: refused: it names {info.filename!r}, outside the archive")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(f"{path}: refused: {info.filename!r} is a link")
        if not info.is_dir() and parts[0] != "__MACOSX" and not any(part.startswith(".") for part in parts):
            files.append(info.filename)

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            ValueError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise InputError(f"{path}: cannot read {name}: {error}; get the zip again") from error

    return Tree(path, sorted(files, key=natural), read)


def zip_record(path: Path) -> dict[str, Any]:
    size, md5 = path.stat().st_size, file_md5([path])
    official = size == OFFICIAL_SIZE and md5 == OFFICIAL_MD5
    return {"kind": "zip", "path": str(path), "official": official, "bytes": size, "md5": md5}


def sample_source() -> Source:
    """The embedded sample; its md5 is that of the code that draws it."""
    md5 = file_md5([Path(sample.__file__)])
    record = {"kind": "sample", "path": None, "official": None, "bytes": None, "md5": md5}
    splits: dict[str, list[Entry]] = {}
    wnids = list(sample.class_names())
    for split, count in sample.COUNTS.items():
        order = [(label, i) for label in range(len(wnids)) for i in range(count)]
        if split != "train":
            random.Random(split).shuffle(order)
        splits[split] = [
            Entry(
                f"{wnids[label]}_{i}.JPEG" if split == "train" else f"{split}_{number}.JPEG",
                None if split == "test" else wnids[label],
                (split, i, label),
            )
            for number, (label, i) in enumerate(order)
        ]
    return Source(record, splits, lambda where: sample.draw(*where), sample.class_names())
