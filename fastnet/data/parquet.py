"""Parquet files as model hubs publish image sets: `image` (a struct with bytes and path, or binary) and `label`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastnet.data.entries import SPLIT_NAMES, Entry, Source, file_md5, readable
from fastnet.data.image import BadImage
from fastnet.errors import InputError

ROWS = 16  # read at a time: what a file repeats is stored once in it, and so may be far larger in memory
LEAST_ROW = 16  # bytes of a file per row, without which it cannot hold images


class Row(NamedTuple):
    """Where an image is, its name, and its class: a name, or a number where the file names no classes."""

    where: tuple[Path, int, int]
    name: str
    label: str | int | None


def parquet_source(path: Path, files: list[Path]) -> Source:
    """The source that Parquet files are, each of the split that its name says.

    Raises InputError for a damaged file, for columns of other types, and for labels out of range.
    """
    listings: dict[str, list[Row]] = {}
    named: dict[bool, Path] = {}
    for file in files:
        listing = listings.setdefault(parquet_split(file), [])
        begin = len(listing)
        classes = _read_listing(file, listing)
        if any(row.label is not None for row in listing[begin:]):
            named[classes is not None] = file
    if len(named) == 2:
        raise InputError(
            f"{named[False]}: its metadata names no classes, but that of {named[True]} does; labels cannot be compared"
        )
    last = max(
        (row.label for rows in listings.values() for row in rows if isinstance(row.label, int)), default=0
    )
    width = len(str(last))
    splits = {
        split: [
            Entry(name, f"class_{label:0{width}d}" if isinstance(label, int) else label, where)
            for where, name, label in rows
        ]
        for split, rows in listings.items()
    }
    size, md5 = sum(file.stat().st_size for file in files), file_md5(files)
    record = {"kind": "parquet", "path": readable(str(path)), "official": None, "bytes": size, "md5": md5}
    return Source(record, splits, ParquetImages().read)


def parquet_split(file: Path) -> str:
    """The split that a file's name begins with, or its folder's: train-00000-of-00001.parquet, test/0.parquet."""
    for text in (file.name.lower(), file.parent.name.lower()):
        if (match := re.match("[a-z]+", text)) and match[0] in SPLIT_NAMES:
            return SPLIT_NAMES[match[0]]
    raise InputError(
        f"{file}: its name begins with none of train, val and test, so its split is unknown; rename it"
    )


def _read_listing(file: Path, listing: list[Row]) -> list[str] | None:
    """Appends the file's rows to the listing of its split; the class names of its metadata."""
    split = parquet_split(file)
    try:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        _check_schema(file, schema, split)
        if parquet.metadata.num_rows * LEAST_ROW > file.stat().st_size:
            raise InputError(
                f"{file}: damaged: it cannot hold {parquet.metadata.num_rows:,} images; get it again"
            )
        classes = hub_classes(file, schema)
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, ["image.path", "label"])
            labels = table.column("label").to_pylist() if "label" in table.column_names else None
            paths = _paths(table)
            for row in range(parquet.metadata.row_group(group).num_rows):
                path = paths[row] if paths else None
                name = Path(path).name if path else f"{split}_{len(listing)}.JPEG"
                number = labels[row] if labels else None
                label = _label(file, number, classes, split)
                listing.append(Row((file, group, row), name, label))
    except InputError:
        raise
    except Exception as error:  # pyarrow raises all kinds of errors on bad data
        raise InputError(f"{file}: not a whole Parquet file: {error}; get it again") from error
    return classes


def _check_schema(file: Path, schema: pa.Schema, split: str) -> None:
    names = schema.names
    if names.count("image") != 1 or names.count("label") > 1 or ("label" not in names and split != "test"):
        raise InputError(
            f"{file}: needs the columns image and label, has {', '.join(names)}; give it each of them once"
        )
    image = schema.field("image").type
    fields = {field.name: field.type for field in image} if pa.types.is_struct(image) else {"bytes": image}
    content, path = fields.get("bytes"), fields.get("path")
    if content is None or not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise InputError(
            f"{file}: the column image is {image}; it must be binary, or a struct with bytes and path"
        )
    if path is not None and not (
        pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path)
    ):
        raise InputError(f"{file}: the paths of its images are {path}; they must be strings")
    if "label" in names and not pa.types.is_integer(schema.field("label").type):
        kind = schema.field("label").type
        raise InputError(f"{file}: the column label is {kind}; it must be integers, the positions of classes")


def hub_classes(file: Path, schema: pa.Schema) -> list[str] | None:
    """The class names that a hub's metadata gives the label column. Raises InputError unless they are distinct."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (TypeError, KeyError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{file}: the class names in its metadata are not a list of strings; get the file again"
        )
    if len(set(names)) < len(names):
        raise InputError(f"{file}: its metadata gives two classes the same name; rename one")
    return names


def _label(file: Path, number: int | None, classes: list[str] | None, split: str) -> str | int | None:
    """The class of a row. Hubs write -1 where there is none."""
    if number is None or (number == -1 and split == "test"):
        return None
    if number < 0:
        raise InputError(f"{file}: it has label {number}; labels count from 0")
    if classes is None:
        return number
    if number >= len(classes):
        raise InputError(
            f"{file}: it has label {number}, but its metadata names {len(classes)} classes; get the file again"
        )
    return classes[number]


def _paths(table: pa.Table) -> list[str | None] | None:
    """The paths of the images; None where there are none."""
    if "image" not in table.column_names:
        return None
    kind = table.schema.field("image").type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return None
    return pc.struct_field(table.column("image"), "path").to_pylist()


class ParquetImages:
    """Reads the images of Parquet files, a few rows at a time, since they are asked for in order."""

    def __init__(self) -> None:
        self.group: tuple[Path, int] | None = None
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.first = 0
        self.images: list[bytes | None] = []

    def read(self, where: tuple[Path, int, int]) -> bytes:
        """The image at `where`: file, row group, row. Raises BadImage if there is none, InputError for a bad file."""
        file, group, row = where
        try:
            if self.group != (file, group) or row < self.first:
                parquet = pq.ParquetFile(file)
                self.batches = parquet.iter_batches(ROWS, row_groups=[group], columns=["image"])
                self.group, self.first, self.images = (file, group), 0, []
            while row >= self.first + len(self.images):
                self.first += len(self.images)
                self.images = _contents(next(self.batches).column("image"))
        except Exception as error:  # pyarrow raises all kinds of errors on bad data
            raise InputError(f"{file}: not a whole Parquet file: {error}; get it again") from error
        image = self.images[row - self.first]
        if not isinstance(image, bytes):
            raise BadImage(f"(row {row} of row group {group} of {file.name}) has no image bytes")
        return image


def _contents(images: Any) -> list[bytes | None]:
    return (pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images).to_pylist()
