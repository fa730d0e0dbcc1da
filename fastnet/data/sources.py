"""Where a set comes from: every packaging of Tiny ImageNet, and of any classes of images, as one `Source`."""

from __future__ import annotations

import os
import random
import stat
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastnet.data import sample
from fastnet.data.entries import OFFICIAL_MD5, OFFICIAL_SIZE, Entry, Source, Tree, file_md5, natural, readable
from fastnet.data.image import BadImage
from fastnet.data.layouts import parent_folders, tree_source
from fastnet.data.parquet import parquet_source
from fastnet.errors import InputError, unreadable

LOCAL_HEADER = 30  # bytes before a zip member, at least


def find_source(path: Path) -> Source:
    """Tells by its content what `path` is. Raises InputError if it is none of the known kinds."""
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; name the set's folder, zip or Parquet files")
        if path.is_dir():
            tree = folder_tree(path)
            if parquet := [name for name in tree.files if name.endswith(".parquet")]:
                return parquet_source(path, [path / name for name in parquet])
            record = {
                "kind": "folder",
                "path": readable(str(path)),
                "official": None,
                "bytes": None,
                "md5": None,
            }
            return tree_source(tree, record)
        if not path.is_file():
            raise InputError(f"{path}: is neither a file nor a folder; name one of them")
        if path.suffix == ".parquet":
            return parquet_source(path, [path])
        return tree_source(open_zip(path), zip_record(path))
    except OSError as error:
        raise unreadable(error, error.filename or path) from error


def folder_tree(path: Path) -> Tree:
    """What is below a folder, links to folders included. Files are in natural order.

    Raises InputError for a folder that is there twice (which a link to a folder above it would be), for one that
    cannot be read, and for what is neither file nor folder.
    """

    def fail(error: OSError) -> None:
        raise error

    def read(name: str, limit: int) -> bytes:
        try:
            with (path / name).open("rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from error
        return within(content, limit)

    files: list[str] = []
    folders: set[str] = set()
    seen: dict[tuple[int, int], str] = {}
    for folder, inner, names in os.walk(path, followlinks=True, onerror=fail):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        status = Path(folder).stat()
        other = seen.setdefault((status.st_dev, status.st_ino), folder)
        if other != folder:
            raise InputError(f"{folder}: is the same folder as {other}; remove the link")
        below = "" if folder == str(path) else os.path.relpath(folder, path) + "/"
        folders.update(below + name for name in inner)
        for name in names:
            if name.startswith("."):
                continue
            if not (Path(folder) / name).is_file():
                raise InputError(
                    f"{folder}/{name}: is not a file (but a broken link, a pipe or the like); remove it"
                )
            files.append(below + name)
    return Tree(path, sorted(files, key=natural), folders, read)


def folder_files(path: Path) -> list[str]:
    """All files below a folder but hidden ones, in natural order. Raises InputError as `folder_tree` does."""
    try:
        return folder_tree(path).files
    except OSError as error:
        raise unreadable(error, error.filename or path) from error


def open_zip(path: Path) -> Tree:
    """A zip's files without extracting them.

    Raises InputError for a damaged zip, names that would leave a folder, links, overlapping or repeated members,
    and other compression than deflate.
    """
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # zipfile raises all kinds of errors on bad data
        raise InputError(
            f"{path}: not a whole zip ({error}); it may be truncated: get it again, or name a folder or Parquet"
        ) from error
    members: dict[str, zipfile.ZipInfo] = {}
    folders: set[str] = set()
    for info in archive.infolist():
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise InputError(
                f"{path}: refused: it names {info.filename!r}, outside the archive; pack it again"
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(f"{path}: refused: {info.filename!r} is a link; pack it again")
        is_folder = not parts[-1]
        parts = [part for part in parts if part not in ("", ".")]  # as in "./train/"
        if not parts or parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
            continue
        name = "/".join(parts)
        if is_folder:
            folders.add(name)
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{path}: {info.filename!r} is compressed by another method than deflate; zip it again"
            )
        elif name in members:
            raise InputError(f"{path}: refused: it holds {name!r} more than once; pack it again")
        else:
            members[name] = info
    refuse_overlaps(path, archive)

    def read(name: str, limit: int) -> bytes:
        try:
            with archive.open(members[name]) as file:
                content = file.read(limit + 1)
        except Exception as error:
            raise BadImage(f"cannot be read ({error}); get the zip again") from error
        return within(content, limit)

    files = sorted(members, key=natural)
    return Tree(path, files, folders | parent_folders(files), read)


def refuse_overlaps(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises InputError if members share bytes, so that a small zip could hold any amount of data."""
    members = sorted(archive.infolist(), key=lambda info: info.header_offset)
    for info, following in pairwise(members):
        if info.header_offset + LOCAL_HEADER + info.compress_size > following.header_offset:
            raise InputError(
                f"{path}: refused: {info.filename!r} and {following.filename!r} overlap; get it again"
            )


def within(content: bytes, limit: int) -> bytes:
    if len(content) > limit:
        raise BadImage(f"has more than {limit >> 20} MB; make it smaller")
    return content


def zip_record(path: Path) -> dict[str, Any]:
    size, md5 = path.stat().st_size, file_md5([path])
    official = size == OFFICIAL_SIZE and md5 == OFFICIAL_MD5
    return {"kind": "zip", "path": readable(str(path)), "official": official, "bytes": size, "md5": md5}


def sample_source() -> Source:
    """The generated sample; its md5 is that of the code that draws it."""
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
