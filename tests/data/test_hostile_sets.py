"""Prepared sets that a stranger made: refused in one line, before a decoder or a mapped file is read out of bounds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from fastnet.config import Augment
from fastnet.data.entries import Entry, Source
from fastnet.data.prepared import SCHEMA, open_set
from fastnet.data.preparing import prepare
from fastnet.errors import InputError
from fastnet.input.decoded import DecodedImages
from fastnet.input.spec import InputSpec
from fastnet.input.streams import TrainStream
from tests.support.official import jpeg

RECORD = {"kind": "test", "path": None, "official": None, "bytes": None, "md5": None}
COLUMNS = [field.name for field in SCHEMA]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training images of 40 px, two val images and a test image."""
    splits = {
        name: [Entry(f"{name}_{i}.JPEG", None if name == "test" else f"c{i % 2}", i) for i in range(count)]
        for name, count in (("train", 4), ("val", 2), ("test", 1))
    }
    out = tmp_path_factory.mktemp("good") / "set"
    prepare(Source(RECORD, splits, lambda i: jpeg(i, size=40)), out)
    return out


@pytest.fixture
def fresh(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "set"))


def write_split(path: Path, batch: pa.RecordBatch, **options: Any) -> None:
    """Replaces the training split, and its size and count in set.json."""
    file = path / "train.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema, **options) as writer:
        writer.write_batch(batch)
    change_split(path, bytes=file.stat().st_size, count=max(1, len(batch)))


def change_split(path: Path, **values: Any) -> None:
    meta = json.loads((path / "set.json").read_text())
    meta["splits"]["train"] |= values
    (path / "set.json").write_text(json.dumps(meta))


def columns(path: Path) -> dict[str, list]:
    return open_set(path).splits["train"].table.to_pydict()


def batch_of(values: dict[str, Any]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(values[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_set(path)


def batches(path: Path, decode: str = "cpu") -> None:
    """Reads two batches, cropped at random."""
    spec = InputSpec(32, torch.device("cpu"), torch.float32, decode, 1)
    stream = TrainStream(open_set(path).splits["train"], spec, Augment(), batch_size=4, seed=0)
    next(stream), next(stream)


# --- sizes


def test_sizes_that_are_right(fresh: Path) -> None:
    batches(fresh)
    batches(fresh, "raw")


@pytest.mark.parametrize("decode", ["cpu", "raw"])
def test_sizes_that_are_not_the_images(fresh: Path, decode: str) -> None:
    """DALI crops by them: it read beyond the image and crashed."""
    values = columns(fresh)
    write_split(fresh, batch_of({**values, "height": [40, 20, 40, 40], "width": [40, 80, 40, 40]}))
    with pytest.raises(InputError, match=r"train_1.JPEG is 40 x 40 pixels, but recorded as 80 x 20"):
        batches(fresh, decode)


@pytest.mark.parametrize("size", [0, -1, 60_000, 2**31 - 1])
def test_sizes_out_of_range(fresh: Path, size: int) -> None:
    write_split(
        fresh, batch_of({**columns(fresh), "height": [40, 40, 40, size], "width": [40, 40, 40, size]})
    )
    refused(fresh, "its image sizes are out of range")


@pytest.mark.parametrize("image", [b"II*\0" + bytes(40), b"\x89PNG\r\n\x1a\n", jpeg(0, size=40)[:12]])
def test_images_that_are_none(fresh: Path, image: bytes) -> None:
    values = columns(fresh)
    write_split(fresh, batch_of({**values, "jpeg": [*values["jpeg"][:3], image]}))
    with pytest.raises(InputError, match=r"train_3.JPEG is (neither|a truncated)"):
        batches(fresh)


@pytest.mark.parametrize("decode", ["cpu", "raw"])
def test_image_that_cannot_be_decoded_is_named(fresh: Path, decode: str) -> None:
    """DALI's own error names none, and ends the pipeline."""
    values = columns(fresh)
    write_split(
        fresh, batch_of({**values, "jpeg": [*values["jpeg"][:2], values["jpeg"][2][:300], values["jpeg"][3]]})
    )
    with pytest.raises(InputError, match=r"train\.arrow: train_2\.JPEG is a bad image"):
        batches(fresh, decode)


# --- columns


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": [0, 1, 0, -1]}, "its labels are out of range"),
        ({"label": [0, 1, 0, 2]}, "its labels are out of range"),
        ({"jpeg": [b"", b"x", b"x", b"x"]}, "its image offsets are out of order"),
        ({key: [] for key in COLUMNS}, "it holds 0 images"),
        ({"label": [0, 1, 0, None]}, "without a value in every column|labels are out of range"),
    ],
)
def test_values(fresh: Path, values: dict[str, list], message: str) -> None:
    write_split(fresh, batch_of({**columns(fresh), **values}))
    refused(fresh, message)


@pytest.mark.parametrize("column", ["name", "jpeg"])
@pytest.mark.parametrize("offset", [-1, 1 << 30, 3])
def test_offsets_that_lead_outside(fresh: Path, column: str, offset: int) -> None:
    """They made other memory part of the names, or ended the process with SIGBUS."""
    array = batch_of(columns(fresh)).column(column)
    kind = "<i4" if column == "name" else "<i8"
    right = np.frombuffer(array.buffers()[1], kind)
    content = (fresh / "train.arrow").read_bytes()
    assert content.count(right.tobytes()) == 1
    for place in (1, len(right) - 1):
        wrong = right.copy()
        wrong[place] = wrong[place] + offset if offset == 3 else offset
        (fresh / "train.arrow").write_bytes(content.replace(right.tobytes(), wrong.tobytes()))
        if offset == 3 and place == 1:
            names = open_set(fresh).splits["train"].names  # shifted, and within the file
            assert len(names) == 4
        else:
            refused(fresh, "train.arrow: damaged")


def test_names_that_are_no_text(fresh: Path) -> None:
    content = (fresh / "train.arrow").read_bytes()
    (fresh / "train.arrow").write_bytes(content.replace(b"train_0.JPEG", b"train_\xff.JPEG"))
    refused(fresh, "train.arrow: damaged")


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_columns(fresh: Path, codec: str) -> None:
    """A prepared set is mapped, so compressed buffers are never right; they could unpack to more than memory."""
    values = {**columns(fresh), "name": ["a" * 100_000] * 4}
    write_split(fresh, batch_of(values), options=pa.ipc.IpcWriteOptions(compression=codec))
    refused(fresh, "train.arrow: damaged: its columns are compressed")


def test_one_batch_listed_many_times(fresh: Path) -> None:
    batch = batch_of(columns(fresh))
    with pa.OSFile(str(fresh / "train.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for _ in range(3):
            writer.write_batch(batch)
    change_split(fresh, bytes=(fresh / "train.arrow").stat().st_size)
    refused(fresh, "it holds more than 4 images")
    change_split(fresh, count=10**9)
    refused(fresh, "it cannot hold 1000000000 images")


# --- set.json


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["splits"]["train"].update(file="../other/train.arrow"), "damaged"),
        (lambda m: m["splits"]["train"].update(file="/etc/passwd"), "damaged"),
        (lambda m: m["splits"]["train"].update(file=".hidden"), "damaged"),
        (lambda m: m["splits"]["train"].update(file="val.arrow\n"), "damaged"),
        (lambda m: m["splits"]["train"].update(count="4"), "damaged"),
        (lambda m: m["splits"]["train"].update(count=0), "damaged"),
        (lambda m: m["splits"]["train"].update(count=10**30), "damaged"),
        (lambda m: m["splits"].update(extra=m["splits"]["train"]), "its splits are"),
        (lambda m: m["splits"].pop("train"), "its splits are val, test"),
        (lambda m: m["splits"].pop("val"), "its splits are train, test"),
        (lambda m: m.update(classes=["c0", "c0"]), "not distinct"),
        (lambda m: m.update(classes=[]), "damaged"),
        (lambda m: m.update(classes=[0, 1]), "damaged"),
        (lambda m: m.update(words=["c0"]), "not as many as its words"),
        (lambda m: m.update(hash=5), "damaged"),
        (lambda m: m.update(source=[]), "damaged"),
        (lambda m: m["source"].update(path=5), "damaged"),
        (lambda m: m.update(format="1"), "damaged"),
        (lambda m: m.pop("name"), "damaged"),
    ],
)
def test_description(fresh: Path, change: Change, message: str) -> None:
    meta = json.loads((fresh / "set.json").read_text())
    change(meta)
    (fresh / "set.json").write_text(json.dumps(meta))
    refused(fresh, message)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**6, '{"format": 1, "name": "\\ud800"}', "1e999999"]
)
def test_description_that_is_no_description(fresh: Path, text: str) -> None:
    (fresh / "set.json").write_text(text)
    refused(fresh, r"set\.json: damaged")


@pytest.mark.parametrize("name", ["set.json", "train.arrow"])
def test_pipes_and_folders_for_files(fresh: Path, name: str) -> None:
    (fresh / name).unlink()
    os.mkfifo(fresh / name)
    refused(fresh, name)
    (fresh / name).unlink()
    (fresh / name).mkdir()
    refused(fresh, name)


# --- the decoded split


def test_decoded_split_that_is_no_file(fresh: Path) -> None:
    os.mkfifo(fresh / "train.raw")
    with pytest.raises(InputError, match=r"train\.raw: is not a file; remove it"):
        DecodedImages(open_set(fresh).splits["train"], 1)


def test_link_in_place_of_the_lock(fresh: Path) -> None:
    (fresh / ".train.raw.lock").symlink_to(fresh.parent / "elsewhere")
    with pytest.raises(InputError, match=r"\.train\.raw\.lock: cannot be written"):
        DecodedImages(open_set(fresh).splits["train"], 1)
    assert not (fresh.parent / "elsewhere").exists()
