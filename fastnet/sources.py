"""Where a set comes from: every packaging of Tiny ImageNet (and of any classes of images) as one `Source`.

A source is a listing, complete and checked before the first image is read, and a way to read one image.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastnet import sample
from fastnet.cli import InputError

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


# --- folders and zips


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


# --- the official layout


def official_layout(tree: Tree, root: str, record: dict[str, Any]) -> Source:
    """train/<wnid>/images/*, flat val/images/* with val_annotations.txt, flat test/images/*."""
    present = set(tree.files)

    def lines(name: str) -> list[str]:
        if root + name not in present:
            raise InputError(f"{tree.path}: {root}{name} is missing")
        return tree.read(root + name).decode("utf-8", "replace").splitlines()

    wnids = sorted({line.strip() for line in lines("wnids.txt")} - {""})
    inside = re.compile(re.escape(root) + r"(train/([^/]+)|val|test)/images/([^/]+)")
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": []}
    for file in tree.files:
        if match := inside.fullmatch(file):
            splits[match[1].split("/")[0]].append(Entry(match[3], match[2], file))

    trained = {entry.label for entry in splits["train"]}
    if missing := [wnid for wnid in wnids if wnid not in trained]:
        raise InputError(f"{tree.path}: class {missing[0]} of wnids.txt has no images in {root}train")
    if unknown := sorted(str(label) for label in trained.difference(wnids)):
        raise InputError(f"{tree.path}: {root}train has class {unknown[0]}, which wnids.txt lacks")

    labels = {}
    val = {entry.name for entry in splits["val"]}
    for number, line in enumerate(lines("val/val_annotations.txt"), 1):
        name, _, rest = line.partition("\t")
        if not line.strip():
            continue
        if name not in val:
            raise InputError(
                f"{tree.path}: {root}val/val_annotations.txt line {number} names {name!r}, not in val/images"
            )
        labels[name] = rest.split("\t")[0].strip()
    for entry in splits["val"]:
        if entry.name not in labels:
            raise InputError(f"{tree.path}: {entry.where} has no line in {root}val/val_annotations.txt")
    splits["val"] = [entry._replace(label=labels[entry.name]) for entry in splits["val"]]

    pairs = (line.partition("\t") for line in (lines("words.txt") if root + "words.txt" in present else []))
    words = {wnid: meaning.split(",")[0].strip() for wnid, _, meaning in pairs if wnid in trained}
    return Source(record, splits, tree.read, words)


# --- class folders


def class_folders(tree: Tree, record: dict[str, Any]) -> Source:
    """<class>/..., or train/<class>/..., val/<class>/..., test/<class>/... or test/* (unlabelled)."""
    tops = {file.split("/")[0] for file in tree.files}
    prefix = f"{tops.pop()}/" if len(tops) == 1 and not tops & set(SPLIT_NAMES) else ""
    if prefix and not any(file.removeprefix(prefix).count("/") for file in tree.files):
        prefix = ""  # a single class, not a folder around the classes
    files = [file.removeprefix(prefix) for file in tree.files]
    splitted = any(file.startswith("train/") for file in files)
    splits: dict[str, list[Entry]] = {"train": []}
    for file, where in zip(files, tree.files, strict=True):
        if not splitted:
            split, inner = "train", file
        elif (top := file.split("/")[0]) in SPLIT_NAMES:
            split, inner = SPLIT_NAMES[top], file.partition("/")[2]
        else:
            raise InputError(f"{tree.path}: {where} is in none of train/, val/ and test/")
        label = inner.split("/")[0] if "/" in inner else None
        if label is None and split != "test":
            raise InputError(
                f"{tree.path}: {where} is in no class folder; known are the zip or folder of Tiny ImageNet, "
                "Parquet files, and a folder of class folders"
            )
        splits.setdefault(split, []).append(Entry(inner, label, where))
    return Source({**record, "kind": f"class folders ({record['kind']})"}, splits, tree.read)


# --- Parquet


def parquet_source(path: Path, files: list[Path]) -> Source:
    """The form of model hubs: `image` (struct with bytes and path, or binary) and `label` (an index)."""
    listings: dict[str, list[tuple[str, int | None, Any]]] = {}
    names: list[str] | None = None
    for file in files:
        split = parquet_split(file)
        listing = listings.setdefault(split, [])
        try:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            if "image" not in schema.names or ("label" not in schema.names and split != "test"):
                raise InputError(f"{file}: needs the columns image and label, has {', '.join(schema.names)}")
            names = names or hub_classes(schema)
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, ["image.path", "label"])
                paths, labels = image_field(table, "path"), column(table, "label")
                for row in range(parquet.metadata.row_group(group).num_rows):
                    name = Path(paths[row]).name if paths and paths[row] else f"{split}_{len(listing)}.JPEG"
                    label = labels[row] if labels and labels[row] not in (None, -1) else None
                    listing.append((name, label, (file, group, row)))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: not a whole Parquet file: {error}") from error
    last = max(
        (label for listing in listings.values() for _, label, _ in listing if label is not None), default=0
    )
    classes = names or [f"class_{i:0{len(str(last))}d}" for i in range(last + 1)]
    if last >= len(classes):
        raise InputError(f"{path}: it has label {last}, but its metadata names {len(classes)} classes")
    splits = {
        split: [
            Entry(name, None if label is None else classes[label], where) for name, label, where in listing
        ]
        for split, listing in listings.items()
    }
    size, md5 = sum(file.stat().st_size for file in files), file_md5(files)
    record = {"kind": "parquet", "path": str(path), "official": None, "bytes": size, "md5": md5}
    return Source(record, splits, read_parquet)


def parquet_split(file: Path) -> str:
    """The split that a file's name begins with, or its folder's: train-00000-of-00001.parquet, test/0.parquet."""
    for text in (file.name, file.parent.name):
        if (match := re.match("[a-z]+", text)) and match[0] in SPLIT_NAMES:
            return SPLIT_NAMES[match[0]]
    raise InputError(f"{file}: its name begins with none of train, val and test, so its split is unknown")


def hub_classes(schema: pa.Schema) -> list[str] | None:
    """The class names that a hub's metadata gives the label column."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (TypeError, KeyError, ValueError):
        return None


def column(table: pa.Table, name: str) -> list[Any] | None:
    return table.column(name).to_pylist() if name in table.column_names else None


def image_field(table: pa.Table, name: str) -> list[Any] | None:
    """One field of the image structs; None where images are no structs or have no such field."""
    if "image" not in table.column_names:
        return None
    kind = table.schema.field("image").type
    if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
        return None
    return pc.struct_field(table.column("image"), name).to_pylist()


@lru_cache(maxsize=1)
def group_images(file: Path, group: int) -> list[bytes | None]:
    """The images of one row group; kept until another is asked for, as images are read in order."""
    table = pq.ParquetFile(file).read_row_group(group, ["image"])
    return image_field(table, "bytes") or column(table, "image") or []


def read_parquet(where: tuple[Path, int, int]) -> bytes:
    file, group, row = where
    image = group_images(file, group)[row]
    if not isinstance(image, bytes):
        raise InputError(f"{file}: row {row} of row group {group} has no image bytes")
    return image


# --- the sample


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
