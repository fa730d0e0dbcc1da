"""Prepares a set: python -m fastnet.prepare SOURCE --out SET.

Reads a source once, decodes every image (a bad one would stop training later, so it is refused by name here), and
writes one Arrow file per split. Everything is written to a folder beside the target, which is renamed when it is
whole: a run that fails or is killed leaves nothing that opens as a set.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastnet.cli import Parser, run_command
from fastnet.data.download import download
from fastnet.data.prepared import PreparedSet
from fastnet.data.preparing import prepare
from fastnet.data.sources import find_source, sample_source
from fastnet.errors import InputError, printable


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(prog="python -m fastnet.prepare", description="Prepare a set of images for training.")
    parser.add_argument(
        "source",
        help="the Tiny ImageNet zip or its extracted folder, a Parquet file or a folder of them, a folder of class "
        "folders, 'sample' (the generated sample set), or 'download' (fetch the official zip beside SET first)",
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
    if args.source == "sample":
        source = sample_source()
    elif args.source == "download":
        source = find_source(download(args.out.parent / "tiny-imagenet-200.zip"))
    else:
        source = find_source(Path(args.source))
    if source.left_out:
        count, first = len(source.left_out), ", ".join(source.left_out[:10])
        note = f"{count:,} files are left out, as their names are not those of images: {first}"
        print(
            printable(f"{source.place}: {note}{', ...' if count > 10 else ''}"), file=sys.stderr, flush=True
        )
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
    name = f"{source['kind']} {source['path'] or ''}".rstrip()
    print(printable(f"source: {', '.join([name, *known])}"))
    counts = ", ".join(f"{len(split):,} {name}" for name, split in prepared.splits.items())
    done = f"prepared in {seconds:.1f} s" if made else "was there already, with the same content"
    print(printable(f"{prepared.path}: {len(prepared.classes)} classes, {counts}; {done}"), flush=True)


if __name__ == "__main__":
    run_command(main)
