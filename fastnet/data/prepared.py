"""The prepared set: one memory-mapped Arrow file per split and a small `set.json`.

A set is a directory. `set.json` names the classes, the source and each split's file with its count, size
and sha256; it is written last and the directory is renamed into place, so a set is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastnet.errors import InputError

FORMAT = 1
SPLITS = ("train", "val", "test")
SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("jpeg", pa.large_binary(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Split:
    """One split, memory mapped. Images stay encoded, as JPEG or PNG.

    labels: [N] int64, -1 where unlabelled. sizes: [N, 2] int32, height and width as encoded.
    """

    name: str
    path: Path
    labels: np.ndarray
    sizes: np.ndarray
    table: pa.Table = field(repr=False)
    mapped: np.ndarray = field(repr=False)  # [bytes of the file] uint8
    bounds: np.ndarray = field(repr=False)  # [N, 2] int64, where each image begins and ends in `mapped`

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def names(self) -> list[str]:
        """File names in split order, e.g. "n01443537_0.JPEG", "val_12.JPEG"; "class/file" for class folders."""
        return self.table.column("name").to_pylist()

    def jpeg(self, i: int) -> np.ndarray:
        """The encoded bytes of image `i`: a read-only uint8 view of the mapped file, no copy."""
        begin, end = self.bounds[i]
        return self.mapped[begin:end]


@dataclass(frozen=True)
class PreparedSet:
    """A prepared set; `classes` are sorted and a label is an index into them, `words` are readable names.

    source: kind, path, official (None where nothing tells), bytes, md5. hash: sha256 of classes, names,
    labels and images, whatever the source's packaging.
    """

    path: Path
    name: str
    classes: list[str]
    words: list[str]
    splits: dict[str, Split] = field(repr=False)
    source: dict[str, Any]
    hash: str

    def verify(self) -> None:
        """Reads all images. Raises InputError if they are not those that `hash` was taken of."""
        digests = {}
        for name, split in self.splits.items():
            digest = hashlib.sha256()
            for i, label in enumerate(split.labels.tolist()):
                add_image(digest, split.names[i], label, split.jpeg(i).data)
            digests[name] = digest.hexdigest()
        if set_hash(self.classes, digests) != self.hash:
            raise damaged(self.path / "set.json", "the images are not those that its hash was taken of")


def open_set(path: Path) -> PreparedSet:
    """Opens a prepared set without reading its images.

    Raises InputError if there is no set at `path`, it is half there or damaged, or of another format version.
    """
    meta = read_meta(path)
    try:
        splits = {
            name: open_split(name, path / entry["file"], entry, len(meta["classes"]))
            for name, entry in meta["splits"].items()
        }
        return PreparedSet(
            path, meta["name"], meta["classes"], meta["words"], splits, meta["source"], meta["hash"]
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(path / "set.json", f"misses or garbles {error}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """The parsed `set.json` of the set at `path`. Raises InputError as `open_set` does."""
    if not path.is_dir():
        raise InputError(f"{path}: no such set; make it with: python -m fastnet.prepare SOURCE --out {path}")
    try:
        meta = json.loads((path / "set.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: not a prepared set (it has no set.json); make one with: "
            "python -m fastnet.prepare SOURCE --out SET"
        ) from None
    except ValueError as error:
        raise damaged(path / "set.json", str(error)) from error
    if not isinstance(meta, dict) or "format" not in meta:
        raise damaged(path / "set.json", "it names no format")
    if meta["format"] != FORMAT:
        raise InputError(
            f"{path}: a set of format {meta['format']}, this version reads format {FORMAT}; prepare it again"
        )
    return meta


def open_split(name: str, path: Path, entry: dict[str, Any], classes: int) -> Split:
    """Maps one split's file and checks it against its entry in `set.json` and against itself."""
    if not path.is_file():
        raise damaged(path, "it is missing")
    if path.stat().st_size != entry["bytes"]:
        raise damaged(path, f"it has {path.stat().st_size} bytes, set.json says {entry['bytes']}")
    try:
        with pa.memory_map(str(path)) as file:
            buffer = file.read_buffer()
        reader = pa.ipc.open_file(buffer)
        if not reader.schema.equals(SCHEMA):
            raise damaged(path, "its columns are not those of a prepared set")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        table = pa.Table.from_batches(batches, SCHEMA)
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, str(error)) from error
    labels = table.column("label").to_numpy()
    bounds = np.concatenate([image_bounds(batch, buffer.address) for batch in batches])
    if len(labels) != entry["count"]:
        raise damaged(path, f"it holds {len(labels)} images, set.json says {entry['count']}")
    if bounds.min() < 0 or bounds.max() > buffer.size or (bounds[:, 0] >= bounds[:, 1]).any():
        raise damaged(path, "its image offsets are out of order")
    if labels.min() < -1 or labels.max() >= classes:
        raise damaged(path, "its labels are out of range")
    sizes = np.stack([table.column(c).to_numpy() for c in ("height", "width")], axis=1)
    return Split(name, path, labels, sizes, table, np.frombuffer(buffer, np.uint8), bounds)


def image_bounds(batch: pa.RecordBatch, base: int) -> np.ndarray:
    """[n, 2] int64: where the batch's images begin and end, counted from the address `base`."""
    _, offsets, data = batch.column("jpeg").buffers()
    at = np.frombuffer(offsets, np.int64)[: len(batch) + 1] + (data.address - base)
    return np.stack([at[:-1], at[1:]], axis=1)


def add_image(digest: hashlib._Hash, name: str, label: int, image: bytes | memoryview) -> None:
    """Adds one image to its split's digest."""
    digest.update(f"{name}\n{label}\n{len(image)}\n".encode())
    digest.update(image)


def set_hash(classes: list[str], digests: dict[str, str]) -> str:
    """The hash of a set's contents, from its classes and its splits' digests."""
    return hashlib.sha256(json.dumps([classes, digests]).encode()).hexdigest()


def damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path}: damaged: {why}; remove the set {path.parent} and prepare it again")
