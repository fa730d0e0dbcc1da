from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastnet.data.entries import SPLIT_NAMES, Entry, Source, file_md5
from fastnet.errors import InputError


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
