"""Writes a prepared set: every image of a source is decoded once, and nothing half-done is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastnet import __version__
from fastnet.data.entries import Entry, Source, readable
from fastnet.data.image import BadImage, Examiner
from fastnet.data.lock import exclusive
from fastnet.data.prepared import FORMAT, SCHEMA, SPLITS, PreparedSet, add_image, open_set, set_hash
from fastnet.data.sources import sample_source
from fastnet.errors import InputError, refused
from fastnet.progress import Progress

BATCH_BYTES = 4 << 20  # a record batch's share of memory while it is being written
CHUNK = 32  # images that a thread examines at a time
CHUNK_BYTES = 8 << 20
NAMED_AT_MOST = 10  # bad images that an error message names


def prepare_sample(out: Path) -> PreparedSet:
    """Makes the generated sample set at `out`, or opens the one that exists. Many processes may ask at once."""
    return prepare(sample_source(), out)[0]


def prepare(source: Source, out: Path, val_fraction: float = 0.1) -> tuple[PreparedSet, bool]:
    """Makes a set of `source` at `out`: (the set, whether it was made now and did not exist already).

    Raises InputError for bad images, for splits that do not belong together, if the disk is full, or if something
    else exists at `out`.
    """
    splits, classes = checked_splits(source, val_fraction)
    given, out = out, out.resolve()
    try:
        with exclusive(out):
            made = make_set(source, splits, classes, out)
    except OSError as error:
        hint = "nothing was kept; free some space and run the same command again"
        raise refused(error, error.filename or out, full=hint) from error
    return open_set(given), made


def make_set(source: Source, splits: dict[str, list[Entry]], classes: list[str], out: Path) -> bool:
    """Writes the set to a folder beside `out` and renames it; whether it did, since the set may be there already."""
    there = standing_set(out)
    md5 = source.record["md5"]
    if there and md5 and md5 == there.source["md5"] and "val" in source.splits:
        return False
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():
        # A run that was killed left it: nobody else writes it while this one holds the lock.
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        contents = write_set(partial, source, splits, classes, out.name)
        if there is None:
            partial.rename(out)
            flush_to_disk(out.parent)
        elif there.hash != contents:
            raise InputError(
                f"{out}: holds another set (of {there.source['path'] or there.source['kind']}); "
                "remove it or choose another --out"
            )
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return there is None


def checked_splits(source: Source, val_fraction: float) -> tuple[dict[str, list[Entry]], list[str]]:
    """The splits to write, with a val split taken from train if the source has none, and the sorted classes."""
    place = source.place
    splits = {
        name: [
            entry._replace(name=readable(entry.name), label=entry.label and readable(entry.label))
            for entry in source.splits[name]
        ]
        for name in SPLITS
        if source.splits.get(name)
    }
    if "train" not in splits:
        raise InputError(f"{place}: no training images in it; put them into train/, a folder for each class")
    for name in splits:
        for entry in splits[name]:
            if entry.label is None and name != "test":
                raise InputError(f"{place}: {entry.name} in {name} has no label; give it one, or remove it")
    if "val" not in splits:
        splits["train"], splits["val"] = without_val(splits["train"], val_fraction, place)
    classes = {entry.label for entry in splits["train"] if entry.label is not None}
    for name, entries in splits.items():
        for entry in entries:
            if entry.label is not None and entry.label not in classes:
                raise InputError(
                    f"{place}: {entry.name} in {name} is of class {entry.label}, which train lacks; "
                    "remove it, or add training images"
                )
    return splits, sorted(classes)


def without_val(train: list[Entry], fraction: float, place: str) -> tuple[list[Entry], list[Entry]]:
    """Takes `fraction` of each class out of `train`. An image's side depends on the names in its class alone."""
    by_class: dict[str | None, list[Entry]] = {}
    for entry in train:
        by_class.setdefault(entry.label, []).append(entry)
    chosen: set[Any] = set()
    for label, entries in by_class.items():
        if len(entries) < 2:
            raise InputError(
                f"{place}: class {label} has one image, too few to take a val split from; add one"
            )
        ranked = sorted(entries, key=lambda entry: hashlib.sha256(entry.name.encode()).digest())
        count = min(max(1, round(fraction * len(entries))), len(entries) - 1)
        chosen.update(entry.where for entry in ranked[:count])
    return [e for e in train if e.where not in chosen], [e for e in train if e.where in chosen]


def standing_set(out: Path) -> PreparedSet | None:
    """The set that exists at `out`, its images checked against its hash; None if there is nothing.

    Raises InputError if something else is there, or if the set is damaged.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "set.json").is_file():
        raise InputError(f"{out}: exists and is no prepared set; remove it or choose another --out")
    there = open_set(out)
    there.verify()
    return there


def write_set(
    out: Path, source: Source, splits: dict[str, list[Entry]], classes: list[str], name: str
) -> str:
    """Writes every split's file and then set.json into the directory `out`; the hash of the contents.

    Raises InputError if images are bad: it names the first ten and gives their number.
    """
    bad = BadImages(source.place)
    with Progress("preparing", sum(map(len, splits.values())), "images") as progress:
        files = {
            split: write_split(out / f"{split}.arrow", source, entries, classes, bad, progress)
            for split, entries in splits.items()
        }
    bad.refuse()
    contents = set_hash(classes, {split: file["sha256"] for split, file in files.items()})
    meta = {
        "format": FORMAT,
        "name": readable(name),
        "fastnet": __version__,
        "source": source.record,
        "hash": contents,
        "splits": files,
        "classes": classes,
        "words": [readable(source.words.get(label, label)) for label in classes],
    }
    (out / "set.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    flush_to_disk(out / "set.json")
    return contents


class BadImages:
    """Collects what is wrong with images, so that one attempt tells of all."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.count = 0
        self.first: list[str] = []

    def add(self, name: str, error: BadImage) -> None:
        self.count += 1
        if self.count <= NAMED_AT_MOST:
            self.first.append(f"{name} {error}")

    def refuse(self) -> None:
        """Raises InputError if there are any."""
        if self.count == 1:
            raise InputError(f"{self.place}: {self.first[0]}")
        if self.count:
            more = f"; and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
            raise InputError(f"{self.place}: {self.count:,} bad images: {'; '.join(self.first)}{more}")


def write_split(
    path: Path, source: Source, entries: list[Entry], classes: list[str], bad: BadImages, progress: Progress
) -> dict[str, Any]:
    """Writes one split's file without the bad images; its entry in set.json."""
    label_of = {label: i for i, label in enumerate(classes)}
    digest = hashlib.sha256()
    rows: list[tuple[str, bytes, int, int, int]] = []
    held = 0
    with pa.OSFile(os.fsencode(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for entry, image, size in examined(entries, source):
            progress.add()
            if isinstance(size, BadImage):
                bad.add(entry.where if isinstance(entry.where, str) else entry.name, size)
                continue
            label = -1 if entry.label is None else label_of[entry.label]
            add_image(digest, entry.name, label, image)
            rows.append((entry.name, image, label, *size))
            held += len(image)
            if held >= BATCH_BYTES:
                writer.write_batch(record_batch(rows))
                rows, held = [], 0
        if rows:
            writer.write_batch(record_batch(rows))
    flush_to_disk(path)
    return {
        "file": path.name,
        "count": len(entries),
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }


def record_batch(rows: list[tuple[str, bytes, int, int, int]]) -> pa.RecordBatch:
    columns = zip(zip(*rows, strict=True), SCHEMA, strict=True)
    return pa.record_batch([pa.array(values, field.type) for values, field in columns], schema=SCHEMA)


Examined = tuple[Entry, bytes, tuple[int, int] | BadImage]


def examined(entries: Iterable[Entry], source: Source) -> Iterator[Examined]:
    """Reads the images in order, and decodes them in threads (the decoders free the interpreter meanwhile)."""
    own = threading.local()

    def examine(chunk: list[tuple[Entry, bytes | BadImage]]) -> list[Examined]:
        if not hasattr(own, "examiner"):
            own.examiner = Examiner()
        sizes = iter(own.examiner([image for _, image in chunk if isinstance(image, bytes)]))
        return [
            (entry, image, next(sizes)) if isinstance(image, bytes) else (entry, b"", image)
            for entry, image in chunk
        ]

    threads = min(8, len(os.sched_getaffinity(0)))
    waiting: deque[Future[list[Examined]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for chunk in chunks_read(entries, source):
            waiting.append(pool.submit(examine, chunk))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        for done in waiting:
            yield from done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def chunks_read(entries: Iterable[Entry], source: Source) -> Iterator[list[tuple[Entry, bytes | BadImage]]]:
    """The images as they are read, in lists of at most CHUNK, shorter where they are large."""
    chunk: list[tuple[Entry, bytes | BadImage]] = []
    held = 0
    for entry in entries:
        image: bytes | BadImage
        try:
            image = source.read(entry.where)
            held += len(image)
        except BadImage as error:
            image = error
        chunk.append((entry, image))
        if len(chunk) == CHUNK or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
