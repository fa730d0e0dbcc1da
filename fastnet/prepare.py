"""Prepares a set: python -m fastnet.prepare SOURCE --out SET.

Reads any source once, decodes every image once (a bad one is refused by name here, since it would stop the
training pipeline later), and writes one Arrow file per split. All is written to a folder beside the target,
which is renamed when it is whole: a failed or killed run leaves nothing that opens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from fastnet import __version__
from fastnet.cli import InputError, Parser, run
from fastnet.data import FORMAT, SCHEMA, SPLITS, PreparedSet, add_image, open_set, set_hash
from fastnet.download import download
from fastnet.progress import Progress
from fastnet.sources import Entry, Source, find_source, sample_source

BATCH_BYTES = 4 << 20  # a record batch's share of memory while it is being written
CHUNK = 32  # images that a thread checks at a time
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(prog="python -m fastnet.prepare", description="Prepare a set of images for training.")
    parser.add_argument(
        "source",
        help="the Tiny ImageNet zip or its extracted folder, a Parquet file or a folder of them, a folder of class "
        "folders, 'sample' (the embedded sample), or 'download' (fetch the official zip beside SET first)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="SET", help="the directory to make")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="share of each class that becomes val if SOURCE has no val",
    )
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise InputError(f"--val-fraction {args.val_fraction}: must lie between 0 and 1")
    started = time.monotonic()
    with file_errors(args.out):
        if args.source == "sample":
            source = sample_source()
        elif args.source == "download":
            source = find_source(download(args.out.parent / "tiny-imagenet-200.zip"))
        else:
            source = find_source(Path(args.source))
    prepared, made = prepare(source, args.out, args.val_fraction)
    report(prepared, made, time.monotonic() - started)
    return {
        "set": str(prepared.path),
        "made": made,
        "source": prepared.source,
        "classes": len(prepared.classes),
        "count": {name: len(split) for name, split in prepared.splits.items()},
        "files": [str(prepared.path / "set.json"), *(str(split.path) for split in prepared.splits.values())],
        "hash": prepared.hash,
    }


def report(prepared: PreparedSet, made: bool, seconds: float) -> None:
    source = prepared.source
    official = {True: "the official Tiny ImageNet zip", False: "not the official Tiny ImageNet zip"}
    known = [official[source["official"]]] if source["official"] is not None else []
    known += [f"{source['bytes']:,} bytes"] if source["bytes"] else []
    known += [f"md5 {source['md5']}"] if source["bytes"] else []
    print(f"source: {source['kind']}{' ' + source['path'] if source['path'] else ''}", *known, sep=", ")
    counts = ", ".join(f"{len(split):,} {name}" for name, split in prepared.splits.items())
    done = f"prepared in {seconds:.1f} s" if made else "was there already, with the same content"
    print(f"{prepared.path}: {len(prepared.classes)} classes, {counts}; {done}", flush=True)


def prepare_sample(out: Path) -> PreparedSet:
    """Makes the embedded sample at `out`, or opens the one that is there. Many processes may ask at once."""
    return prepare(sample_source(), out)[0]


def prepare(source: Source, out: Path, val_fraction: float = 0.1) -> tuple[PreparedSet, bool]:
    """Makes the set `out` of `source`: (the set, whether it was made now rather than there already).

    Raises InputError for bad images, splits that do not fit, a full disk, or anything else being at `out`.
    """
    splits, classes = checked_splits(source, val_fraction)
    given, out = out, out.resolve()
    with file_errors(out), exclusive(out):
        there = standing_set(out)
        md5 = source.record["md5"]
        if there and md5 and md5 == there.source["md5"] and "val" in source.splits:
            return open_set(given), False
        partial = out.with_name(f".{out.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)  # of a run that was killed: who holds the lock knows that nobody writes it
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
    return open_set(given), there is None


def checked_splits(source: Source, val_fraction: float) -> tuple[dict[str, list[Entry]], list[str]]:
    """The splits to write, with a val split taken from train if the source has none, and the sorted classes."""
    place = source.record["path"] or source.record["kind"]
    splits = {name: source.splits[name] for name in SPLITS if source.splits.get(name)}
    if "train" not in splits:
        raise InputError(f"{place}: no training images in it")
    if "val" not in splits:
        splits["train"], splits["val"] = without_val(splits["train"], val_fraction, place)
    classes = {entry.label for entry in splits["train"] if entry.label is not None}
    for name, entries in splits.items():
        for entry in entries:
            if entry.label is None and name != "test":
                raise InputError(f"{place}: {entry.name} in {name} has no label")
            if entry.label is not None and entry.label not in classes:
                raise InputError(
                    f"{place}: {entry.name} in {name} is of class {entry.label}, which train lacks"
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
            raise InputError(f"{place}: class {label} has one image, too few to take a val split from")
        ranked = sorted(entries, key=lambda entry: hashlib.sha256(entry.name.encode()).digest())
        count = min(max(1, round(fraction * len(entries))), len(entries) - 1)
        chosen.update(entry.where for entry in ranked[:count])
    return [e for e in train if e.where not in chosen], [e for e in train if e.where in chosen]


def standing_set(out: Path) -> PreparedSet | None:
    """The set that is at `out` already, its images checked against its hash; None if there is nothing.

    Raises InputError if something else is there, or a damaged set.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "set.json").is_file():
        raise InputError(f"{out}: is there and is no prepared set; remove it or choose another --out")
    there = open_set(out)
    there.verify()
    return there


# --- writing


def write_set(
    out: Path, source: Source, splits: dict[str, list[Entry]], classes: list[str], name: str
) -> str:
    """Writes every split's file and then set.json into the directory `out`; the hash of the contents."""
    with Progress(sum(map(len, splits.values())), "images") as progress:
        files = {
            split: write_split(out / f"{split}.arrow", source, entries, classes, progress)
            for split, entries in splits.items()
        }
    contents = set_hash(classes, {split: file["sha256"] for split, file in files.items()})
    meta = {
        "format": FORMAT,
        "name": name,
        "fastnet": __version__,
        "source": source.record,
        "hash": contents,
        "splits": files,
        "classes": classes,
        "words": [source.words.get(label, label) for label in classes],
    }
    (out / "set.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    flush_to_disk(out / "set.json")
    return contents


def write_split(
    path: Path, source: Source, entries: list[Entry], classes: list[str], progress: Progress
) -> dict[str, Any]:
    """Writes one split's file; its entry in set.json."""
    label_of = {label: i for i, label in enumerate(classes)}
    digest = hashlib.sha256()
    rows: list[tuple[str, bytes, int, int, int]] = []
    held = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for entry, image, (height, width) in examined(entries, source):
            label = -1 if entry.label is None else label_of[entry.label]
            add_image(digest, entry.name, label, image)
            rows.append((entry.name, image, label, height, width))
            held += len(image)
            if held >= BATCH_BYTES:
                writer.write_batch(record_batch(rows))
                rows, held = [], 0
            progress.add(1)
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


def examined(entries: Iterable[Entry], source: Source) -> Iterator[tuple[Entry, bytes, tuple[int, int]]]:
    """Reads the images in order, and decodes them in threads (PIL frees the interpreter while it decodes)."""

    def examine(chunk: list[tuple[Entry, bytes]]) -> list[tuple[int, int]]:
        return [image_size(image, entry, place) for entry, image in chunk]

    place = source.record["path"] or source.record["kind"]
    threads = min(8, len(os.sched_getaffinity(0)))
    waiting: deque[tuple[list[tuple[Entry, bytes]], Future[list[tuple[int, int]]]]] = deque()
    remaining = iter(entries)
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            chunk = [(entry, source.read(entry.where)) for entry in islice(remaining, CHUNK)]
            if chunk:
                waiting.append((chunk, pool.submit(examine, chunk)))
            if not waiting:
                return
            if not chunk or len(waiting) > 2 * threads:
                done, sizes = waiting.popleft()
                for (entry, image), size in zip(done, sizes.result(), strict=True):
                    yield entry, image, size
    finally:
        pool.shutdown(cancel_futures=True)


def image_size(image: bytes, entry: Entry, place: str) -> tuple[int, int]:
    """(height, width) of an image, as encoded. Decodes all of it; raises InputError if that fails."""
    name = entry.where if isinstance(entry.where, str) else entry.name
    try:
        with Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) as picture:
            picture.load()
            # The decoders take a file whose end is missing or zeroed, which DALI may not.
            if picture.format == "PNG":
                ended = b"IEND" in image[-16:]
            else:
                ended = image.rfind(JPEG_END) > image.rfind(JPEG_SCAN)
            size = picture.height, picture.width
    except UnidentifiedImageError as error:
        raise InputError(f"{place}: {name} is neither JPEG nor PNG; remove or convert it") from error
    except Exception as error:  # PIL's decoders raise all kinds of errors on bad data
        raise InputError(f"{place}: {name} is a bad image ({error}); get it again or remove it") from error
    if not ended:
        raise InputError(
            f"{place}: {name} is a truncated image (its end is missing); get it again or remove it"
        )
    return size


def flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Holds a lock file beside `out`: one process at a time makes it. A killed process lets go of its lock."""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.lock")
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes {out}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(lock), path.stat()):
                break
        except FileNotFoundError:
            pass  # its last holder removed it meanwhile: lock the one that is there now
        os.close(lock)
    try:
        yield
    finally:
        path.unlink()
        os.close(lock)


@contextlib.contextmanager
def file_errors(out: Path) -> Iterator[None]:
    """Turns a full disk and other refusals of the file system into one line: `out`'s, unless a file is named."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"{out}: no space left on its disk; nothing was kept, free some and try again"
            ) from error
        raise InputError(f"{error.filename or out}: {error.strerror or error}") from error


def cli() -> NoReturn:
    run(main)


if __name__ == "__main__":
    cli()
