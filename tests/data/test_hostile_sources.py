"""Sources that a stranger made, or that are merely odd: each is used, or refused in one line that names the culprit."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastnet.data.entries import natural
from fastnet.data.image import MAX_PIXELS
from fastnet.data.prepared import PreparedSet, open_set
from fastnet.data.preparing import prepare
from fastnet.data.sources import find_source
from fastnet.errors import InputError
from tests.support.official import ROOT, jpeg, official_files, write_folder, write_zip
from tests.support.paths import REPOSITORY

SMALL = jpeg(0, size=16)


def png(mode: str = "RGB", side: int = 9) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "PNG")
    return file.getvalue()


def prepared(source: Path, out: Path) -> PreparedSet:
    return prepare(find_source(source), out)[0]


def refused(source: Path, message: str) -> str:
    out = source.parent / f"{source.name}.set"
    with pytest.raises(InputError, match=message) as caught:
        prepared(source, out)
    assert not out.exists() and not list(source.parent.glob(f".{out.name}*"))
    return str(caught.value)


def pets(path: Path, **more: bytes) -> Path:
    """Two classes of four images, and `more` files, whose / is written __."""
    files = {f"{name}/{i}.jpg": jpeg(i, size=16) for name in ("cat", "dog") for i in range(4)}
    return write_folder(
        path, {**files, **{name.replace("__", "/"): file for name, file in more.items()}}.items()
    )


# --- images


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (SMALL[:20] + b"\0" + SMALL[20:], "its JPEG header is damaged"),
        (png()[:-13] + bytes([png()[-13] ^ 1]) + png()[-12:], "DALI cannot decode it"),  # a bit of a checksum
        (
            struct.pack(">8sI4sII5B", png()[:8], 13, b"IHDR", 13_300, 13_300, 8, 2, 0, 0, 0),
            "more than 64 million",
        ),
        (SMALL[:-2] + b"\xff\xda\x00\x02" * 300 + b"\xff\xd9", "more than 256 scans"),
        (SMALL + bytes(1 << 26), "has more than 64 MB"),
    ],
)
def test_images_that_dali_refuses_or_that_cost_too_much(image: bytes, message: str, tmp_path: Path) -> None:
    source = pets(tmp_path / "pets", cat__bad=image)
    assert f"{source}: cat/bad {'is' if 'bad' in message else ''}" in refused(source, message)


def test_solid_image_of_too_many_pixels(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("1", (13_300, 13_300)).save(file, "PNG")
    message = refused(
        pets(tmp_path / "pets", cat__solid=file.getvalue()), "13300 x 13300 pixels, more than 64 million"
    )
    assert message.count("\n") == 0


def test_large_images_are_decoded(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5) // 2
    chosen = prepared(pets(tmp_path / "pets", cat__large=png("L", side)), tmp_path / "set")
    assert [side, side] in [size for split in chosen.splits.values() for size in split.sizes.tolist()]


@pytest.mark.parametrize(("count", "end"), [(3, "x2 is neither JPEG nor PNG"), (12, "; and 2 more")])
def test_bad_images_are_named_together(tmp_path: Path, count: int, end: str) -> None:
    message = refused(
        pets(tmp_path / "pets", **{f"cat__x{i}": b"x" for i in range(count)}), f"{count} bad images: "
    )
    assert message.count("is neither JPEG nor PNG") == min(count, 10) and end in message


# --- folders


def test_names_of_splits_in_capitals(tmp_path: Path) -> None:
    files = {f"{split}/{name}/{split}.jpg": SMALL for split in ("Train", "VAL") for name in ("cat", "dog")}
    chosen = prepared(write_folder(tmp_path / "pets", files.items()), tmp_path / "set")
    assert chosen.classes == ["cat", "dog"]
    assert {name: len(split) for name, split in chosen.splits.items()} == {"train": 2, "val": 2}
    write_folder(tmp_path / "pets", {"valid/cat/x.jpg": SMALL}.items())
    with pytest.raises(InputError, match="VAL/ and valid/ would both be the val split"):
        find_source(tmp_path / "pets")


def test_links_to_class_folders_are_followed(tmp_path: Path) -> None:
    source = pets(tmp_path / "pets")
    (tmp_path / "elsewhere").mkdir()
    for i in range(2):
        (tmp_path / "elsewhere" / f"{i}.jpg").write_bytes(SMALL)
    (source / "eel").symlink_to(tmp_path / "elsewhere")
    assert prepared(source, tmp_path / "set").classes == ["cat", "dog", "eel"]
    (source / "fox").symlink_to(source / "cat")
    refused(source, "fox: is the same folder as .*cat")
    (source / "fox").unlink()
    (source / "dog" / "loop").symlink_to(source)
    refused(source, "loop: is the same folder as")


def test_empty_class_folder_within_others(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pets", {f"a/b/train/cat/{i}.jpg": SMALL for i in range(4)}.items())
    (source / "a" / "b" / "train" / "dog").mkdir()
    refused(source, r"a/b/train/dog/ has no images; remove it")


@pytest.mark.parametrize("packed", [False, True])
def test_empty_class_folder(tmp_path: Path, packed: bool) -> None:
    source = pets(tmp_path / "pets", eel__README=b"")
    (source / "eel" / "README").rename(source / "eel" / "README.txt")
    if packed:
        files = {str(file.relative_to(source)): file.read_bytes() for file in source.rglob("*.*")}
        source = write_zip(tmp_path / "pets.zip", files.items())
    refused(source, r"eel/ has no images; remove it")


def test_empty_val_folder(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "pets", {f"train/cat/{i}.jpg": SMALL for i in range(4)}.items())
    (source / "val").mkdir()
    refused(source, "val/ has no images")


def test_other_files_among_images_are_left_out(tmp_path: Path) -> None:
    source = pets(tmp_path / "pets")
    write_folder(source, {"README.txt": b"", "cat/Thumbs.db": b"", "dog/notes.TXT": b"x"}.items())
    found = find_source(source)
    assert sorted(found.left_out) == ["README.txt", "cat/Thumbs.db", "dog/notes.TXT"]
    assert len(found.splits["train"]) == 8
    refused(pets(tmp_path / "more", **{"cat__a.webp": b"RIFF"}), "cat/a.webp is neither JPEG nor PNG")


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    source = pets(tmp_path / "pets")
    write_folder(source, {"README.txt": b"", "cat/Thumbs.db": b""}.items())
    done = command(source, tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert (
        f"{source}: 2 files are left out, as their names are not those of images: README.txt, cat/Thumbs.db"
        in (done.stderr)
    )


def command(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    line: list[str | bytes] = [
        sys.executable,
        "-m",
        "fastnet.prepare",
        os.fsencode(source),
        "--out",
        os.fsencode(out),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(line, capture_output=True, text=True, env=environment, errors="surrogateescape")


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_names_that_are_not_ascii(tmp_path: Path, locale: dict[str, str]) -> None:
    """Latin-1 bytes become escapes; UTF-8 stays, whatever the locale."""
    source = Path(os.fsdecode(os.fsencode(tmp_path / "pets") + b"\xe9"))
    for folder in (b"caf\xe9", "größe".encode()):
        for i in range(2):
            file = Path(os.fsdecode(os.fsencode(source) + b"/" + folder + b"/%d\xe9.jpg" % i))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(i, size=16))
    done = command(source, tmp_path / "sét", **locale)
    assert done.returncode == 0, done.stderr
    chosen = open_set(tmp_path / "sét")
    assert chosen.classes == ["caf\\xe9", "größe"]
    assert chosen.splits["train"].names[0] in ("caf\\xe9/0\\xe9.jpg", "caf\\xe9/1\\xe9.jpg")
    file.write_bytes(b"x")
    done = command(source, tmp_path / "other", **locale)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_names_do_not_reach_the_terminal_unescaped(tmp_path: Path) -> None:
    done = command(pets(tmp_path / "pets", **{"cat__\x1b]0;owned\x07": b"x"}), tmp_path / "set")
    assert (
        done.returncode == 2 and "\x1b" not in done.stderr and "\\x1b]0;owned\\x07 is neither" in done.stderr
    )


def test_pipes_and_broken_links(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is neither a file nor a folder"):
        find_source(tmp_path / "pipe")
    for name, make in (("pipe", os.mkfifo), ("link", lambda path: path.symlink_to("nowhere"))):
        source = pets(tmp_path / f"with_{name}")
        make(source / "cat" / name)
        refused(source, f"cat/{name}: is not a file")


def test_long_numbers_in_names() -> None:
    names = ["a10", "a9", "a" + "1" * 5000, "a09", "a"]
    for listed in (names, names[::-1]):  # a folder's files have no order of their own
        assert sorted(listed, key=natural) == ["a", "a09", "a9", "a10", "a" + "1" * 5000]


# --- zips


def zipped(path: Path, method: int = zipfile.ZIP_DEFLATED, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for i in range(4):
            archive.writestr(f"cat/{i}.jpg", jpeg(i, size=16))
        for name, content in more.items():
            archive.writestr(name.replace("__", "/"), content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_zip_of_another_method(tmp_path: Path, method: int) -> None:
    refused(zipped(tmp_path / "a.zip", method), "compressed by another method than deflate")


def test_zip_with_a_member_that_unpacks_to_more_than_memory(tmp_path: Path) -> None:
    """The stream is cut where an image ends to be one, whatever size the directory claims."""
    path = zipped(tmp_path / "a.zip", cat__bomb=bytes(1 << 27))
    assert path.stat().st_size < 200_000
    refused(path, "cat/bomb has more than 64 MB")


def test_zip_with_overlapping_members(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    entries = [at for at in range(len(content)) if content[at : at + 4] == b"PK\1\2"]
    content[entries[2] + 42 : entries[2] + 46] = content[entries[1] + 42 : entries[1] + 46]
    path.write_bytes(content)
    refused(path, "overlap")


def test_zip_with_a_name_twice(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = zipped(tmp_path / "a.zip", zipfile.ZIP_DEFLATED, **{"cat__0.jpg": SMALL})
    refused(path, r"it holds 'cat/0.jpg' more than once")


def test_zip_of_an_unknown_version(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 255
    path.write_bytes(content)
    refused(path, "not a whole zip")


def test_text_files_of_any_size(tmp_path: Path) -> None:
    files = dict(official_files(2, 2, 2, 1, lambda i: SMALL))
    for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        path = write_zip(tmp_path / "a.zip", {**files, ROOT + name: b"\n" * (1 << 25)}.items())
        refused(path, f"{name} has more than 16 MB")
    doubled = files[ROOT + "val/val_annotations.txt"] * 2
    path = write_zip(tmp_path / "a.zip", {**files, ROOT + "val/val_annotations.txt": doubled}.items())
    refused(path, "val_annotations.txt line 3 names 'val_0.JPEG' a second time")


# --- Parquet


def table(
    path: Path, labels: Any, names: Any = None, kind: pa.DataType | None = None, image: Any = None
) -> Path:
    images = image or [{"bytes": jpeg(i, size=16), "path": None} for i in range(len(labels))]
    made = pa.table({"image": images, "label": pa.array(labels, kind)})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(made, path)
    return path.parent


def test_huge_label_costs_no_memory(tmp_path: Path) -> None:
    chosen = prepared(table(tmp_path / "hub" / "train.parquet", [0, 0, 10**12, 10**12]), tmp_path / "set")
    assert chosen.classes == ["class_0000000000000", "class_1000000000000"]


@pytest.mark.parametrize(
    ("labels", "names", "kind", "message"),
    [
        ([0, -2, 1, 1], ["a", "b", "c"], None, "it has label -2; labels count from 0"),
        ([0, -1, 1, 1], ["a", "b", "c"], None, "it has label -1; labels count from 0"),
        ([0, 0, 1, 1], ["a", "a"], None, "two classes the same name"),
        ([0, 0, 1, 1], 5, None, "not a list of strings"),
        ([0, 0, 1, 1], {"0": "a"}, None, "not a list of strings"),
        ([0, 0, 1, 1], ["a", ["b"]], None, "not a list of strings"),
        (["a", "a", "b", "b"], None, None, "the column label is string; it must be integers"),
        ([0.0, 0.0, 1.0, 1.0], None, None, "the column label is double"),
        ([[0], [0], [1], [1]], None, None, "the column label is list"),
        ([Decimal(0)] * 4, None, pa.decimal128(3, 0), "the column label is decimal"),
        ([None, 0, 1, 1], None, None, "has no label"),
    ],
)
def test_parquet_labels(
    labels: list, names: Any, kind: pa.DataType | None, message: str, tmp_path: Path
) -> None:
    refused(table(tmp_path / "hub" / "train.parquet", labels, names, kind), message)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([{"bytes": SMALL, "path": 5}] * 2, "paths of its images are int64"),
        (["a", "b"], "the column image is string"),
        ([{"bytes": None, "path": "x"}, {"bytes": SMALL, "path": "y"}], "has no image bytes"),
    ],
)
def test_parquet_images(image: list, message: str, tmp_path: Path) -> None:
    refused(table(tmp_path / "hub" / "train.parquet", [0, 0], image=image), message)


def test_parquet_files_name_classes_in_their_own_order(tmp_path: Path) -> None:
    table(tmp_path / "hub" / "train.parquet", [0, 1], ["cat", "dog"])
    hub = table(tmp_path / "hub" / "val.parquet", [0, 1], ["dog", "cat"])
    chosen = prepared(hub, tmp_path / "set")
    assert chosen.splits["train"].labels.tolist() == [0, 1]
    assert chosen.splits["val"].labels.tolist() == [1, 0]
    refused(table(hub / "val.parquet", [0, 1]), "val.parquet: its metadata names no classes, but that of")


def test_parquet_metadata_of_deep_json(tmp_path: Path) -> None:
    made = pa.table({"image": [SMALL, SMALL], "label": [0, 0]})
    (tmp_path / "hub").mkdir()
    deep = made.replace_schema_metadata({"huggingface": "[" * 100_000})
    pq.write_table(deep, tmp_path / "hub" / "train.parquet")
    assert prepared(tmp_path / "hub", tmp_path / "set").classes == ["class_0"]


def test_parquet_of_more_rows_than_bytes(tmp_path: Path) -> None:
    """A value repeated a million times takes a few bytes in a file, and some hundred MB as a list."""
    many = pa.table({"image": pa.array([b"x"] * 2_000_000), "label": np.zeros(2_000_000, np.int64)})
    (tmp_path / "hub").mkdir()
    pq.write_table(many, tmp_path / "hub" / "train.parquet")
    assert (tmp_path / "hub" / "train.parquet").stat().st_size < 20_000
    refused(tmp_path / "hub", "it cannot hold 2,000,000 images")
