"""The prepared set: one memory-mapped Arrow file per split and a small `set.json`.

A set is a directory. `set.json` names the classes, the source and each split's file with its count, size
and sha256; it is written last and the directory is renamed into place, so a set is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import Meta
from numpy.typing import NDArray

from fastnet.data import headers
from fastnet.data.image import MAX_PIXELS, BadImage, Examiner, check_header
from fastnet.errors import ImageError, InputError, unreadable

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
MAGIC = b"ARROW1\0\0"
MAX_META = 1 << 26  # bytes of set.json
LEAST_ROW = (
    28  # bytes of an image's entries in the columns: fewer per row cannot be, however a file repeats itself
)

Count = Annotated[int, Meta(ge=1)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class SplitMeta(msgspec.Struct):
    """What `set.json` says of a split. `sha256` is of names, labels and images (see `add_image`)."""

    file: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
    count: Count
    bytes: Count
    sha256: Digest


class SourceMeta(msgspec.Struct):
    """Where a set comes from; `official` and `md5` are None where nothing tells."""

    kind: str
    path: str | None
    official: bool | None
    bytes: int | None
    md5: str | None


class FormatMeta(msgspec.Struct):
    """What every version of `set.json` says."""

    format: int


class SetMeta(FormatMeta):
    """The contents of `set.json`."""

    name: str
    fastnet: str
    source: SourceMeta
    hash: Digest
    splits: dict[str, SplitMeta]
    classes: Annotated[list[str], Meta(min_length=1)]
    words: list[str]


@dataclass(frozen=True)
class Split:
    """One split, memory mapped. Images stay encoded, as JPEG or PNG.

    labels: [N] int64, -1 where unlabelled. sizes: [N, 2] int32, height and width as encoded.
    """

    name: str
    path: Path
    digest: str  # sha256 of the file, as set.json had it
    labels: np.ndarray
    sizes: np.ndarray
    table: pa.Table = field(repr=False)
    mapped: np.ndarray = field(repr=False)  # [bytes of the file] uint8
    bounds: np.ndarray = field(repr=False)  # [N, 2] int64, where each image begins and ends in `mapped`

    @staticmethod
    def in_memory(name: str, images: list[bytes], sizes: np.ndarray, names: list[str], path: Path) -> Split:
        """A split without labels of encoded images, with their sizes [N, 2] and names. Errors name `path`."""
        ends = np.cumsum([len(image) for image in images])
        return Split(
            name=name,
            path=path,
            digest="",
            labels=np.full(len(images), -1, np.int64),
            sizes=sizes,
            table=pa.table({"name": names}),
            mapped=np.frombuffer(b"".join(images), np.uint8),
            bounds=np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def names(self) -> list[str]:
        """File names in split order, e.g. "n01443537_0.JPEG", "val_12.JPEG"; "class/file" for class folders."""
        return self.table.column("name").to_pylist()

    def jpeg(self, i: int) -> np.ndarray:
        """The encoded bytes of image `i`: a read-only uint8 view of the mapped file, no copy.

        Raises ImageError, by the image's name, if its header does not give the size in `sizes`: what crops by a
        wrong size reads beyond the image. Each image is checked the first time it is asked for.
        """
        begin, end = self.bounds[i]
        image = self.mapped[begin:end]
        if not self._checked[i]:
            try:
                components = check_header(image.tobytes(), *self.sizes[i].tolist())
            except BadImage as error:
                raise ImageError(f"{self.path}: {self.names[i]} {error}") from error
            self._checked[i] = min(components, 254) + 1
        return image

    def components(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[B] colour components of the images `index` [B]: 1 or 3, 4 of CMYK, 0 of a PNG.

        Checks headers as `jpeg` does, but without the interpreter's lock, for a loader's threads.
        """
        new = index[self._checked[index] == 0]
        if len(new):
            components = np.empty(len(new), np.int32)
            headers.compiled()(self.mapped, self.bounds[new], self.sizes[new], components)
            self._checked[new] = np.minimum(components, 254) + 1
            for i in new[components < 0]:
                self.jpeg(i)
        return self._checked[index] - 1

    def refuse_undecodable(self, index: Iterable[int]) -> None:
        """Raises ImageError for the first of these images that cannot be decoded, since DALI's error names none."""
        examine = Examiner()
        for i in index:
            (found,) = examine([self.jpeg(i).tobytes()])
            if isinstance(found, BadImage):
                raise ImageError(f"{self.path}: {self.names[i]} {found}")

    @cached_property
    def _checked(self) -> NDArray[np.uint8]:
        """[N] 0 for an image whose header was not read yet, else 1 more than its colour components."""
        return np.zeros(len(self), np.uint8)


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
    path = Path(path)
    meta = read_meta(path)
    splits: dict[str, Split] = {
        name: open_split(name, path / entry.file, entry, len(meta.classes))
        for name, entry in meta.splits.items()
    }
    source = msgspec.structs.asdict(meta.source)
    return PreparedSet(path, meta.name, meta.classes, meta.words, splits, source, meta.hash)


def read_meta(path: Path) -> SetMeta:
    """The parsed `set.json` of the set at `path`. Raises InputError as `open_set` does."""
    if not path.is_dir():
        raise InputError(f"{path}: no such set; make it with: python -m fastnet.prepare SOURCE --out {path}")
    file = path / "set.json"
    if not file.is_file():
        raise InputError(
            f"{path}: not a prepared set (it has no set.json); make one with: "
            "python -m fastnet.prepare SOURCE --out SET"
        )
    try:
        if file.stat().st_size > MAX_META:
            raise damaged(file, f"it has more than {MAX_META >> 20} MB")
        content = file.read_bytes()
        known = msgspec.json.decode(content, type=FormatMeta)
        if known.format != FORMAT:
            raise InputError(
                f"{path}: a set of format {known.format}, this version reads format {FORMAT}; prepare it again"
            )
        meta = msgspec.json.decode(content, type=SetMeta)
    except OSError as error:
        raise unreadable(error, file) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(file, str(error)) from error
    if not {"train", "val"} <= set(meta.splits) <= set(SPLITS):
        raise damaged(file, f"its splits are {', '.join(meta.splits)}")
    if len(set(meta.classes)) < len(meta.classes) or len(meta.words) != len(meta.classes):
        raise damaged(file, "its classes are not distinct, or not as many as its words")
    return meta


def open_split(name: str, path: Path, entry: SplitMeta, classes: int) -> Split:
    """Maps one split's file and checks it against its entry in `set.json` and against itself."""
    if not path.is_file():
        raise damaged(path, "it is missing")
    size = path.stat().st_size
    if size != entry.bytes:
        raise damaged(path, f"it has {size} bytes, set.json says {entry.bytes}")
    if entry.count * LEAST_ROW > size:
        raise damaged(path, f"it cannot hold {entry.count} images")
    try:
        with pa.memory_map(os.fsencode(path)) as file:
            buffer = file.read_buffer()
        table, bounds = read_table(path, buffer, entry.count)
    except InputError:
        raise
    except PermissionError as error:
        raise unreadable(error, path) from error
    except Exception as error:  # pyarrow raises all kinds of errors on bad data
        raise damaged(path, str(error)) from error
    labels = table.column("label").to_numpy()
    if labels.min() < (-1 if name == "test" else 0) or labels.max() >= classes:
        raise damaged(path, "its labels are out of range")
    sizes = np.stack([table.column(c).to_numpy() for c in ("height", "width")], axis=1)
    if sizes.min() < 1 or sizes.astype(np.int64).prod(axis=1).max() > MAX_PIXELS:
        raise damaged(path, "its image sizes are out of range")
    return Split(name, path, entry.sha256, labels, sizes, table, np.frombuffer(buffer, np.uint8), bounds)


def read_table(path: Path, buffer: pa.Buffer, count: int) -> tuple[pa.Table, np.ndarray]:
    """The columns of a split's file, in which every offset is checked, and the bounds of its images.

    bounds: [N, 2] int64, where each image begins and ends in the file.
    """
    reader = pa.ipc.open_file(buffer)
    if not reader.schema.equals(SCHEMA):
        raise damaged(path, "its columns are not those of a prepared set")
    # One message after the other, since the footer could name one many times, and since buffers that are compressed,
    # as no prepared set's are, must not be unpacked: they may hold any amount of memory.
    messages = pa.ipc.MessageReader.open_stream(buffer.slice(len(MAGIC)))
    messages.read_next_message()  # the schema
    batches: list[pa.RecordBatch] = []
    left = count
    for _ in range(reader.num_record_batches):
        message = messages.read_next_message()
        if is_compressed(message.metadata.to_pybytes()):
            raise damaged(path, "its columns are compressed")
        batch = pa.ipc.read_record_batch(message, SCHEMA)
        batch.validate(full=True)
        left -= len(batch)
        if left < 0 or any(column.null_count for column in batch.columns):
            raise damaged(path, f"it holds more than {count} images, or some without a value in every column")
        batches.append(batch)
    if left:
        raise damaged(path, f"it holds {count - left} images, set.json says {count}")
    bounds = np.concatenate([image_bounds(batch, buffer.address) for batch in batches])
    if bounds.min() < 0 or bounds.max() > buffer.size or (bounds[:, 0] >= bounds[:, 1]).any():
        raise damaged(path, "its image offsets are out of order")
    return pa.Table.from_batches(batches, SCHEMA), bounds


def is_compressed(message: bytes) -> bool:
    """Whether a message of the Arrow IPC format holds a record batch with compressed buffers.

    pyarrow does not tell. In the format's flatbuffers, the header is field 2 of the table Message, and compression
    field 3 of the table RecordBatch (Message.fbs).
    """

    def field(table: int, number: int) -> int | None:
        vtable = table - struct.unpack_from("<i", message, table)[0]
        (length,) = struct.unpack_from("<H", message, vtable)
        if 4 + 2 * number >= length:
            return None
        (offset,) = struct.unpack_from("<H", message, vtable + 4 + 2 * number)
        return table + offset if offset else None

    header = field(struct.unpack_from("<I", message)[0], 2)
    if header is None:
        return False
    return field(header + struct.unpack_from("<I", message, header)[0], 3) is not None


def image_bounds(batch: pa.RecordBatch, base: int) -> np.ndarray:
    """[n, 2] int64: where the batch's images begin and end, counted from the address `base`."""
    column = batch.column("jpeg")
    _, offsets, data = column.buffers()
    at = np.frombuffer(offsets, np.int64)[column.offset :][: len(batch) + 1] + (data.address - base)
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
