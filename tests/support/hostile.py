"""Small valid inputs of every reader, and how they are spoiled: what the fuzzer feeds."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.official import ROOT, jpeg, official_files, write_folder, write_parquet, write_zip
from tests.support.paths import REPOSITORY

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
WIDE = (0, 1, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "../x",
    "\x1b[2J",
    "é" * 9,
    [],
    {},
    [[]],
    [None],
)


def flip_bits(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def set_bytes(rng: random.Random, content: bytearray) -> None:
    for _ in range(rng.choice((1, 2, 4))):
        content[rng.randrange(len(content))] = rng.choice(INTERESTING)


def set_numbers(rng: random.Random, content: bytearray) -> None:
    """Overwrites 2, 4 or 8 bytes by a number at the edge of its range, in either order of bytes."""
    kind, size = rng.choice((("H", 2), ("I", 4), ("Q", 8)))
    if len(content) > size:
        at = rng.randrange(len(content) - size)
        content[at : at + size] = struct.pack(rng.choice("<>") + kind, rng.choice(WIDE) % 2 ** (8 * size))


def cut(rng: random.Random, content: bytearray) -> None:
    del content[rng.randrange(len(content)) :]


def remove(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.choice((1, 4, 64, 1024))]


def insert(rng: random.Random, content: bytearray) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = rng.choice((rng.randbytes(1), rng.randbytes(16), bytes(64), b"\xff" * 8))


def repeat(rng: random.Random, content: bytearray) -> None:
    """Copies a part to another place."""
    begin, to = rng.randrange(len(content)), rng.randrange(len(content))
    content[to:to] = content[begin : begin + rng.choice((4, 64, 512))]


def move(rng: random.Random, content: bytearray) -> None:
    """Overwrites a part by another."""
    size = rng.choice((1, 4, 8, 64))
    begin, to = rng.randrange(len(content)), rng.randrange(len(content))
    content[to : to + size] = content[begin : begin + size]


MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    *(flip_bits, set_bytes, set_numbers, cut),
    *(remove, insert, repeat, move),
)


def mutated(rng: random.Random, content: bytes) -> bytes:
    """The content, spoiled once or a few times. Now and then it is left whole, or is empty or noise."""
    if rng.random() < 0.02:
        return rng.choice((b"", content, rng.randbytes(200)))
    spoiled = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if spoiled:
            rng.choice(MUTATIONS)(rng, spoiled)
    return bytes(spoiled)


def mutated_json(rng: random.Random, value: Any) -> Any:
    """The value with one part of it replaced by something of another type or range."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return [*value[:at], mutated_json(rng, value[at]), *value[at + 1 :]]
    return rng.choice(JSON_VALUES)


def image(rng: random.Random, kind: str) -> bytes:
    """A JPEG or PNG of any mode that PIL writes."""
    pixels = np.frombuffer(rng.randbytes(24 * 20 * 3), np.uint8).reshape(24, 20, 3)
    picture = Image.fromarray(pixels)
    file = io.BytesIO()
    if kind == "jpeg":
        picture.convert(rng.choice(("RGB", "RGB", "L", "CMYK"))).save(
            file, "JPEG", progressive=rng.random() < 0.3, quality=rng.choice((20, 75, 95))
        )
    else:
        picture.convert(rng.choice(("RGB", "RGBA", "L", "LA", "P", "1"))).save(file, "PNG")
    return file.getvalue()


def jpeg_folder(rng: random.Random, folder: Path) -> Path:
    return _image_folder(rng, folder, "jpeg")


def png_folder(rng: random.Random, folder: Path) -> Path:
    return _image_folder(rng, folder, "png")


def _image_folder(rng: random.Random, folder: Path, kind: str) -> Path:
    files = {f"cat/{i}.{kind}": image(rng, kind) for i in range(3)}
    files[f"cat/2.{kind}"] = mutated(rng, files[f"cat/2.{kind}"])
    return write_folder(folder / "source", files.items())


def official_zip(rng: random.Random, folder: Path) -> Path:
    path = write_zip(folder / "source.zip", _official().items())
    path.write_bytes(mutated(rng, path.read_bytes()))
    return path


def official_texts(rng: random.Random, folder: Path) -> Path:
    files = dict(_official())
    name = ROOT + rng.choice(("wnids.txt", "words.txt", "val/val_annotations.txt"))
    files[name] = mutated(rng, files[name])
    return write_folder(folder / "source", files.items()) / ROOT


def parquet(rng: random.Random, folder: Path) -> Path:
    rows: list[tuple[str | None, bytes, int]] = [(f"{i}.jpg", jpeg(i, size=16), i % 2) for i in range(6)]
    path = write_parquet(folder / "hub", {"train": rows, "val": rows[:2]}, rng.choice((None, ["cat", "dog"])))
    file = rng.choice(sorted(path.iterdir()))
    file.write_bytes(mutated(rng, file.read_bytes()))
    return path


def prepared_arrow(rng: random.Random, folder: Path) -> Path:
    """Spoils a split's file; its size in set.json is made to fit, as who means harm would do."""
    path = _set_in(folder)
    file = path / rng.choice(("train.arrow", "val.arrow", "test.arrow"))
    file.write_bytes(mutated(rng, file.read_bytes()))
    meta = json.loads((path / "set.json").read_text(encoding="utf-8"))
    meta["splits"][file.stem]["bytes"] = file.stat().st_size
    (path / "set.json").write_text(json.dumps(meta), encoding="utf-8")
    return path


def prepared_json(rng: random.Random, folder: Path) -> Path:
    path = _set_in(folder)
    text = (path / "set.json").read_text(encoding="utf-8")
    if rng.random() < 0.3:
        (path / "set.json").write_bytes(mutated(rng, text.encode()))
    else:
        (path / "set.json").write_text(json.dumps(mutated_json(rng, json.loads(text))), encoding="utf-8")
    return path


def prepared_raw(rng: random.Random, folder: Path) -> Path:
    """A decoded split, not made here, of the right header and length half of the time."""
    path = _set_in(folder)
    meta = json.loads((path / "set.json").read_text(encoding="utf-8"))
    header = f"fastnet raw 1 {meta['splits']['train']['sha256']}\n".encode().ljust(128)
    content = header + rng.randbytes(6 * 24 * 24 * 3)
    (path / "train.raw").write_bytes(content if rng.random() < 0.5 else mutated(rng, content))
    return path


@cache
def _official() -> dict[str, bytes]:
    return dict(official_files(2, 3, 2, 1, lambda i: jpeg(i, size=24)))


@cache
def _set() -> dict[str, bytes]:
    """The files of a prepared set, made in another process: one that has run DALI or torch must not be forked."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        source = write_folder(folder / "source", _official().items())
        line = [sys.executable, "-m", "fastnet.prepare", str(source), "--out", str(folder / "set")]
        subprocess.run(line, check=True, capture_output=True, cwd=REPOSITORY)
        return {file.name: file.read_bytes() for file in (folder / "set").iterdir()}
    finally:
        shutil.rmtree(folder)


def _set_in(folder: Path) -> Path:
    return write_folder(folder / "set", _set().items())
