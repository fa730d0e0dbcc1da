"""Every source gives the set it should; bad input is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastnet.cli import run_command
from fastnet.data import sample
from fastnet.data.download import download
from fastnet.data.lock import exclusive
from fastnet.data.prepared import PreparedSet, open_set
from fastnet.data.preparing import prepare, prepare_sample
from fastnet.data.sources import find_source
from fastnet.errors import InputError
from fastnet.prepare import main
from tests.support.official import ROOT, jpeg, official_files, wnids, write_folder, write_parquet, write_zip
from tests.support.paths import REPOSITORY

CLASSES, TRAIN, VAL, TEST = 3, 5, 12, 11
FILES = dict(official_files(CLASSES, TRAIN, VAL, TEST, lambda i: jpeg(i, grey=i == 4)))
Refused = Callable[..., str]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def command(*args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "fastnet.prepare", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, **more)


def assert_refused(code: object, said: str, out: Path) -> str:
    """Code 2 and one line, with nothing left behind; the line."""
    assert code == 2, said
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), said
    assert not out.exists() and not list(out.parent.glob(f".{out.name}*"))
    return lines[0]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs the command in this process, which must be refused; the line. DALI's own output would be seen."""

    def run(out: Path, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, args), "--out", str(out)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        return assert_refused(ended.value.code, capfd.readouterr().err, out)

    return run


def prepared(source: Path, out: Path, *args: str) -> PreparedSet:
    main([str(source), "--out", str(out), *args])
    return open_set(out)


def images(chosen: PreparedSet, split: str) -> dict[str, tuple[bytes, int]]:
    part = chosen.splits[split]
    return {name: (part.jpeg(i).tobytes(), int(part.labels[i])) for i, name in enumerate(part.names)}


def listing(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "source.zip", FILES.items())


# --- what each source gives


def check_official(chosen: PreparedSet) -> None:
    """Every image of the layout, byte for byte, under its name and label, in natural order."""
    names = wnids(CLASSES)
    assert chosen.classes == names
    train = {f"{name}_{i}.JPEG": label for label, name in enumerate(names) for i in range(TRAIN)}
    assert list(chosen.splits["train"].names) == list(train)
    for name, (content, label) in images(chosen, "train").items():
        assert content == FILES[f"{ROOT}train/{names[label]}/images/{name}"] and label == train[name]
    assert list(chosen.splits["val"].names) == [f"val_{i}.JPEG" for i in range(VAL)]
    for i, (name, (content, label)) in enumerate(images(chosen, "val").items()):
        assert content == FILES[f"{ROOT}val/images/{name}"] and label == i * 7 % CLASSES
    assert list(chosen.splits["test"].names) == [f"test_{i}.JPEG" for i in range(TEST)]
    for name, (content, label) in images(chosen, "test").items():
        assert content == FILES[f"{ROOT}test/images/{name}"] and label == -1
    assert all((split.sizes == 64).all() for split in chosen.splits.values())


def test_zip(archive: Path, tmp_path: Path) -> None:
    done = command(archive, "--out", tmp_path / "set", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["count"] == {"train": CLASSES * TRAIN, "val": VAL, "test": TEST}
    assert result["made"] is True and all(Path(file).is_file() for file in result["files"])
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    assert result["source"] == {
        "kind": "zip",
        "path": str(archive),
        "official": False,
        "bytes": archive.stat().st_size,
        "md5": md5,
    }
    assert "not the official" in done.stdout and md5 in done.stdout
    chosen = open_set(tmp_path / "set")
    check_official(chosen)
    assert chosen.words == ["thing 1", "thing 2", "thing 3"]
    assert chosen.source == result["source"] and chosen.hash == result["hash"]
    assert listing(tmp_path) == [
        "set",
        "set/set.json",
        "set/test.arrow",
        "set/train.arrow",
        "set/val.arrow",
        "source.zip",
    ]


def test_official_zip_is_told_by_size_and_md5(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, md5 = archive.stat().st_size, hashlib.md5(archive.read_bytes()).hexdigest()
    for known_size, known_md5, official in (
        (size, "0" * 32, False),
        (size + 1, md5, False),
        (size, md5, True),
    ):
        monkeypatch.setattr("fastnet.data.sources.OFFICIAL_SIZE", known_size)
        monkeypatch.setattr("fastnet.data.sources.OFFICIAL_MD5", known_md5)
        assert find_source(archive).record["official"] is official


@pytest.mark.parametrize("inner", ["", ROOT])
def test_extracted_folder_gives_the_same_set_as_the_zip(archive: Path, tmp_path: Path, inner: str) -> None:
    write_folder(tmp_path / "folder", FILES.items())
    (tmp_path / "folder" / ROOT / ".DS_Store").write_bytes(b"x")
    chosen = prepared(tmp_path / "folder" / inner, tmp_path / "set")
    check_official(chosen)
    assert chosen.hash == prepared(archive, tmp_path / "of_zip").hash
    assert chosen.source["kind"] == "folder" and chosen.source["official"] is None


@pytest.mark.parametrize("inside", ["val/{}/", "val/{}/images/", "val/images/{}/"])
def test_val_in_class_folders_is_the_same_set(archive: Path, tmp_path: Path, inside: str) -> None:
    """As ImageFolder wants it, after one of the scripts for it, with or without the annotations."""
    folder = write_folder(tmp_path / "folder", FILES.items()) / ROOT
    for i in range(VAL):
        place = folder / inside.format(wnids(CLASSES)[i * 7 % CLASSES])
        place.mkdir(parents=True, exist_ok=True)
        (folder / f"val/images/val_{i}.JPEG").rename(place / f"val_{i}.JPEG")
    of_zip = prepared(archive, tmp_path / "of_zip")
    assert prepared(folder, tmp_path / "set").hash == of_zip.hash
    (folder / "val/val_annotations.txt").unlink()
    assert prepared(folder, tmp_path / "again").hash == of_zip.hash


def test_rearranged_without_any_text_file(archive: Path, tmp_path: Path) -> None:
    """What is left then are class folders, beside test images in one folder of no class."""
    of_zip = prepared(archive, tmp_path / "of_zip")
    files = {name: content for name, content in FILES.items() if not name.endswith(".txt")}
    for i in range(VAL):
        name = wnids(CLASSES)[i * 7 % CLASSES]
        files[f"{ROOT}val/{name}/val_{i}.JPEG"] = files.pop(f"{ROOT}val/images/val_{i}.JPEG")
    chosen = prepared(write_folder(tmp_path / "folder", files.items()), tmp_path / "set")
    for split in ("train", "val", "test"):
        assert sorted(images(chosen, split).values()) == sorted(images(of_zip, split).values())


@pytest.mark.parametrize(("start", "slash"), [("./", "/"), ("", "\\")])
def test_names_in_a_zip_as_other_programs_write_them(
    archive: Path, tmp_path: Path, start: str, slash: str
) -> None:
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as other:
        for name in (ROOT, f"{ROOT}train/", *FILES):
            other.writestr(start + name.replace("/", slash), FILES.get(name, b""))
    assert prepared(path, tmp_path / "set").hash == prepared(archive, tmp_path / "of_zip").hash


@pytest.mark.parametrize("named", [True, False])
def test_parquet_of_a_hub(archive: Path, tmp_path: Path, named: bool) -> None:
    names = wnids(CLASSES)
    order = list(reversed(names))  # a hub's labels need not be sorted
    splits: dict[str, list[tuple[str | None, bytes, int]]] = {"train": [], "valid": [], "test": []}
    of_zip = prepared(archive, tmp_path / "of_zip")
    for split, hub in (("train", "train"), ("val", "valid"), ("test", "test")):
        for name, (content, label) in images(of_zip, split).items():
            index = -1 if split == "test" else order.index(names[label]) if named else label
            splits[hub].append((name if split == "train" else None, content, index))
    write_parquet(tmp_path / "hub" / "data", splits, order if named else None)
    chosen = prepared(tmp_path / "hub", tmp_path / "set")
    if named:
        check_official(chosen)
        assert chosen.hash == of_zip.hash
    else:
        assert chosen.classes == ["class_0", "class_1", "class_2"]
        assert images(chosen, "val") == images(of_zip, "val")
    assert chosen.source["kind"] == "parquet" and chosen.source["bytes"] > 0


def test_class_folders(tmp_path: Path) -> None:
    files = {f"train/{label}/{i}.jpg": jpeg(i) for label in ("cat", "dog") for i in range(3)}
    png = io.BytesIO()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(png, "PNG")
    files |= {
        "val/dog/deep/a.png": png.getvalue(),
        "val/cat/b.jpeg": jpeg(9, size=32),
        "test/c.jpg": jpeg(10),
    }
    chosen = prepared(write_folder(tmp_path / "pets", files.items()), tmp_path / "set")
    assert chosen.classes == chosen.words == ["cat", "dog"]
    assert chosen.splits["train"].names == [
        "cat/0.jpg",
        "cat/1.jpg",
        "cat/2.jpg",
        "dog/0.jpg",
        "dog/1.jpg",
        "dog/2.jpg",
    ]
    assert chosen.splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images(chosen, "val") == {
        "cat/b.jpeg": (jpeg(9, size=32), 0),
        "dog/deep/a.png": (png.getvalue(), 1),
    }
    assert chosen.splits["val"].sizes.tolist() == [[32, 32], [20, 30]]
    assert images(chosen, "test") == {"c.jpg": (jpeg(10), -1)}


@pytest.mark.parametrize("around", ["", "pets/", "all/of the/pets/"])
def test_folders_around_the_images(around: str, tmp_path: Path) -> None:
    names = [f"{split}/{label}" for split in ("train", "val") for label in ("cat", "dog")]
    files = {f"{around}{name}/{i}.jpg": jpeg(i) for name in names for i in range(2)}
    chosen = prepared(write_folder(tmp_path / "source", files.items()), tmp_path / "set")
    assert chosen.classes == ["cat", "dog"]
    assert {name: len(split) for name, split in chosen.splits.items()} == {"train": 4, "val": 4}


def test_a_class_that_is_called_like_a_split(tmp_path: Path) -> None:
    files = {f"{label}/{i}.jpg": jpeg(i) for label in ("bus", "plane", "train") for i in range(10)}
    chosen = prepared(write_folder(tmp_path / "source", files.items()), tmp_path / "set")
    assert chosen.classes == ["bus", "plane", "train"] and len(chosen.splits["train"]) == 27


def test_a_source_without_val_gives_a_share_of_each_class(tmp_path: Path) -> None:
    files = {f"pets/{label}/{i}.jpg": jpeg(i) for label in ("cat", "dog") for i in range(10)}
    chosen = prepared(
        write_folder(tmp_path / "pets", files.items()), tmp_path / "set", "--val-fraction", "0.3"
    )
    train, val = set(chosen.splits["train"].names), set(chosen.splits["val"].names)
    assert not train & val and train | val == {name.removeprefix("pets/") for name in files}
    assert np.bincount(chosen.splits["val"].labels).tolist() == [3, 3]
    # Further classes do not move an image to the other side.
    write_folder(tmp_path / "pets", {f"pets/eel/{i}.jpg": jpeg(i) for i in range(4)}.items())
    more = prepared(tmp_path / "pets", tmp_path / "more", "--val-fraction", "0.3")
    assert val == {name for name in more.splits["val"].names if "eel" not in name}


@pytest.mark.slow
def test_sample_is_tiny_imagenet_in_small(tmp_path: Path) -> None:
    chosen = prepare_sample(tmp_path / "sample")
    counts = {name: len(split) for name, split in chosen.splits.items()}
    assert counts == {name: 20 * count for name, count in sample.COUNTS.items()}
    assert (
        len(chosen.classes) == 20
        and chosen.classes == sorted(chosen.classes)
        and "striped ring" in chosen.words
    )
    assert all((split.sizes == 64).all() for split in chosen.splits.values())
    for name in ("train", "val"):
        assert (np.bincount(chosen.splits[name].labels) == sample.COUNTS[name]).all()
    assert (chosen.splits["test"].labels == -1).all()
    assert chosen.splits["test"].names[:2] == ["test_0.JPEG", "test_1.JPEG"]
    train = chosen.splits["train"]
    pictures = [Image.open(io.BytesIO(train.jpeg(i).tobytes())) for i in range(len(train))]
    assert 0.005 < np.mean([picture.mode == "L" for picture in pictures]) < 0.04
    everything = [split.jpeg(i).tobytes() for split in chosen.splits.values() for i in range(len(split))]
    assert len(set(everything)) == len(everything)


def test_sample_pixels_are_the_same_everywhere() -> None:
    """The mean colours that this code drew first; the margin is for JPEG encoders of other versions."""
    means = {1: [139.34, 137.88, 110.53], 13: [89.36, 117.06, 129.68], 18: [127.18, 162.57, 155.17]}
    for label, mean in means.items():
        picture = Image.open(io.BytesIO(sample.draw("train", 3, label))).convert("RGB")
        assert np.asarray(picture).reshape(-1, 3).mean(axis=0) == pytest.approx(mean, abs=0.25)


# --- what is there already


def test_again_onto_the_same_set(archive: Path, tmp_path: Path) -> None:
    first = json.loads(command(archive, "--out", tmp_path / "set", "--json").stdout.splitlines()[-1])
    before = {file: (tmp_path / "set" / file).stat().st_mtime_ns for file in listing(tmp_path / "set")}
    write_folder(tmp_path / "folder", FILES.items())
    for source in (archive, tmp_path / "folder"):
        done = command(source, "--out", tmp_path / "set", "--json")
        assert done.returncode == 0 and "there already" in done.stdout
        again = json.loads(done.stdout.splitlines()[-1])
        assert again == {**first, "made": False}
    assert before == {
        file: (tmp_path / "set" / file).stat().st_mtime_ns for file in listing(tmp_path / "set")
    }


def test_another_set_is_not_overwritten(archive: Path, tmp_path: Path) -> None:
    prepared(archive, tmp_path / "set")
    before = {file: (tmp_path / "set" / file).read_bytes() for file in listing(tmp_path / "set")}
    other = write_zip(
        tmp_path / "other.zip", official_files(CLASSES, TRAIN, VAL, TEST, lambda i: jpeg(i + 1))
    )
    done = command(other, "--out", tmp_path / "set")
    assert done.returncode == 2 and f"{tmp_path / 'set'}: holds another set" in done.stderr
    assert before == {file: (tmp_path / "set" / file).read_bytes() for file in listing(tmp_path / "set")}
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_something_else_is_not_overwritten(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    prepared(archive, tmp_path / "set")  # an empty one may be used
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    with pytest.raises(InputError, match="thesis: exists and is no prepared set"):
        main([str(archive), "--out", str(tmp_path / "thesis")])
    assert listing(tmp_path / "thesis") == ["chapter"]


def test_a_set_whose_images_changed_is_refused(archive: Path, tmp_path: Path) -> None:
    place = prepared(archive, tmp_path / "set").path / "train.arrow"
    content = bytearray(place.read_bytes())
    at = content.index(FILES[f"{ROOT}train/{wnids(1)[0]}/images/{wnids(1)[0]}_0.JPEG"])
    content[at + 900] ^= 1
    place.write_bytes(content)
    with pytest.raises(InputError, match=r"set.json: damaged: the images"):
        main([str(archive), "--out", str(tmp_path / "set")])


@pytest.mark.slow
def test_killed_at_any_moment_leaves_nothing_that_opens(tmp_path: Path) -> None:
    """Killed when it has written some of a split, and a rerun makes the set that it should."""
    source = write_zip(
        tmp_path / "source.zip",
        official_files(4, 1500, 50, 50, lambda i: FILES[f"{ROOT}test/images/test_{i % TEST}.JPEG"]),
    )
    out, partial = tmp_path / "set", tmp_path / ".set.partial"
    line = [sys.executable, "-m", "fastnet.prepare", str(source), "--out", str(out)]
    with subprocess.Popen(line, env=ENVIRONMENT) as process:
        while not (partial / "train.arrow").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert partial.is_dir() and not out.exists()
    with pytest.raises(InputError, match="no such set"):
        open_set(out)
    assert len(prepared(source, out).splits["train"]) == 6000
    assert listing(tmp_path) == [
        "set",
        "set/set.json",
        "set/test.arrow",
        "set/train.arrow",
        "set/val.arrow",
        "source.zip",
    ]


@pytest.mark.slow
def test_many_at_once_make_one_set(tmp_path: Path) -> None:
    """Eight processes ask for one set at the same time; each ends up with the same whole one."""
    source = write_zip(tmp_path / "source.zip", FILES.items())
    line = [sys.executable, "-m", "fastnet.prepare", str(source), "--out", str(tmp_path / "set"), "--json"]
    many = [subprocess.Popen(line, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True) for _ in range(8)]
    results = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in many]
    assert [result["made"] for result in results].count(True) == 1
    assert len({result["hash"] for result in results}) == 1
    assert not list(tmp_path.glob(".*"))


# --- bad input


def changed(**files: bytes | None) -> dict[str, bytes]:
    """The layout with files replaced, added, or (None) removed. The keys are made of paths below the root."""
    after = {**FILES, **{ROOT + name: content for name, content in files.items()}}
    return {name: content for name, content in after.items() if content is not None}


FIRST = wnids(CLASSES)[0]
BAD_IMAGE = f"train/{FIRST}/images/{FIRST}_3.JPEG"
GOOD = FILES[ROOT + BAD_IMAGE]
ANNOTATIONS = FILES[ROOT + "val/val_annotations.txt"]
GIF = io.BytesIO()
Image.new("RGB", (9, 9)).save(GIF, "GIF")
PNG = io.BytesIO()
Image.new("RGB", (9, 9)).save(PNG, "PNG")


@pytest.mark.parametrize(
    "trailer", [b"\xff\xda\x00\x0c" * 300, b"\xff\xd9\xff\xda", bytes(40)], ids=["scans", "end", "zeros"]
)
def test_what_follows_the_end_of_an_image_is_passed_over(trailer: bytes, tmp_path: Path) -> None:
    """Phones put a film behind a picture; the bytes of markers occur in it by chance."""
    changed = {f"{label}/{i}.jpg": jpeg(i) + trailer for label in "ab" for i in range(10)}
    changed["a/9.jpg"] = PNG.getvalue() + trailer
    made, _ = prepare(find_source(write_folder(tmp_path / "pets", changed.items())), tmp_path / "set")
    assert sum(map(len, made.splits.values())) == 20


BAD_LAYOUTS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "cut image": ({BAD_IMAGE: GOOD[: len(GOOD) * 2 // 3]}, f"{BAD_IMAGE} is a bad image"),
    "image without its last byte": ({BAD_IMAGE: GOOD[:-1]}, f"{BAD_IMAGE} is a bad image"),
    "image whose end is zeros": ({BAD_IMAGE: GOOD[:-2] + bytes(8)}, f"{BAD_IMAGE} is a truncated image"),
    "PNG without its end": ({BAD_IMAGE: PNG.getvalue()[:-12]}, f"{BAD_IMAGE} is a truncated image"),
    "empty image": ({BAD_IMAGE: b""}, f"{BAD_IMAGE} is neither JPEG nor PNG"),
    "text for an image": ({BAD_IMAGE: b"<html>404</html>"}, f"{BAD_IMAGE} is neither JPEG nor PNG"),
    "another format": ({BAD_IMAGE: GIF.getvalue()}, f"{BAD_IMAGE} is neither JPEG nor PNG"),
    "bad test image": ({"test/images/test_2.JPEG": GOOD[:500]}, "test/images/test_2.JPEG is a bad image"),
    "annotation that names no file": (
        {"val/val_annotations.txt": ANNOTATIONS + b"val_99.JPEG\tn1\t0\t0\t1\t1\n"},
        f"val_annotations.txt line {VAL + 1} names 'val_99.JPEG'",
    ),
    "val image without annotation": (
        {"val/val_annotations.txt": ANNOTATIONS.split(b"\n", 1)[1]},
        "val/images/val_0.JPEG has no line in",
    ),
    "no annotations": ({"val/val_annotations.txt": None}, "val/val_annotations.txt is missing"),
    "val class that train lacks": (
        {"val/val_annotations.txt": ANNOTATIONS.replace(wnids(2)[1].encode(), b"n09999999", 1)},
        "is of class n09999999, which train lacks",
    ),
    "val partly in class folders": (
        {f"val/{FIRST}/val_0.JPEG": GOOD},
        f"val/{FIRST}/val_0.JPEG is in a class folder, {ROOT}val/images/val_0.JPEG is not",
    ),
    "an image in two folders": (
        {f"val/{FIRST}/more/val_0.JPEG": GOOD},
        f"val/{FIRST}/more/val_0.JPEG is below two folders",
    ),
    "a training image of no class": ({"train/images/x.JPEG": GOOD}, "x.JPEG in train has no label"),
    "class without images": (
        {"wnids.txt": FILES[ROOT + "wnids.txt"] + b"n05\n"},
        "class n05 of wnids.txt has no images",
    ),
    "class that wnids.txt lacks": ({"wnids.txt": FIRST.encode()}, "which wnids.txt lacks"),
    "no images": (
        dict.fromkeys((name.removeprefix(ROOT) for name in FILES), None) | {"wnids.txt": b""},
        "no training images",
    ),
}


@pytest.mark.parametrize("case", BAD_LAYOUTS)
def test_bad_layout(case: str, tmp_path: Path, refused: Refused) -> None:
    files, message = BAD_LAYOUTS[case]
    if case == "no images":
        files = {**files, "val/val_annotations.txt": b""}
    source = write_zip(tmp_path / "source.zip", changed(**files).items())
    assert message in refused(tmp_path / "set", source)


def zip_with(path: Path, name: str, mode: int = 0o644) -> Path:
    write_zip(path, FILES.items())
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    return path


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("../outside.JPEG", 0o644, "names '../outside.JPEG', outside"),
        (f"{ROOT}train/../../x", 0o644, "outside the archive"),
        ("/etc/cron.d/x", 0o644, "names '/etc/cron.d/x', outside"),
        ("C:/x", 0o644, "outside the archive"),
        (f"{ROOT}test/images/link.JPEG", stat.S_IFLNK | 0o777, "is a link"),
    ],
)
def test_zip_that_reaches_outside(
    name: str, mode: int, message: str, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused(tmp_path / "set", zip_with(tmp_path / "source.zip", name, mode))


def test_truncated_zip(archive: Path, tmp_path: Path, refused: Refused) -> None:
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) * 3 // 4])
    assert f"{archive}: not a whole zip" in refused(tmp_path / "set", archive)


def test_zip_with_a_damaged_member(archive: Path, tmp_path: Path, refused: Refused) -> None:
    with zipfile.ZipFile(archive) as opened:
        at = opened.getinfo(ROOT + BAD_IMAGE).header_offset
    content = bytearray(archive.read_bytes())
    content[at + 300] ^= 0xFF
    archive.write_bytes(content)
    assert f"{ROOT}{BAD_IMAGE} cannot be read" in refused(tmp_path / "set", archive)


def test_sources_that_are_none(tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "set"
    assert f"{tmp_path / 'absent'}: no such file" in refused(out, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty: no training images" in refused(out, tmp_path / "empty")
    (tmp_path / "note.txt").write_text("hello")
    assert "note.txt: not a whole zip" in refused(out, tmp_path / "note.txt")
    flat = write_folder(tmp_path / "flat", {"a.jpg": jpeg(0)}.items())
    assert "a.jpg is in no class folder" in refused(out, flat)
    assert "--val-fraction" in refused(out, flat, "--val-fraction", "1.5")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"train/a/0.jpg": jpeg(0), "val/b/0.jpg": jpeg(1)},
            "b/0.jpg in val is of class b, which train lacks",
        ),
        ({"train/a/0.jpg": jpeg(0), "val/a/0.jpg": b"BM123"}, "val/a/0.jpg is neither JPEG nor PNG"),
        ({"train/a/0.jpg": jpeg(0), "notes/x.jpg": jpeg(1)}, "notes/x.jpg is in none of train/"),
        ({"a/0.jpg": jpeg(0), "b/0.jpg": jpeg(0)}, "class a has one image"),
    ],
)
def test_bad_class_folders(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        prepare(find_source(write_folder(tmp_path / "pets", files.items())), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_bad_parquet(tmp_path: Path, refused: Refused) -> None:
    rows: list[tuple[str | None, bytes, int]] = [(None, jpeg(i), i % 2) for i in range(6)]
    out = tmp_path / "set"
    cut = write_parquet(tmp_path / "cut", {"train": rows}, None)
    file = next(cut.iterdir())
    file.write_bytes(file.read_bytes()[:-50])
    assert f"{file}: not a whole Parquet file" in refused(out, cut)
    unnamed = write_parquet(tmp_path / "unnamed", {"things": rows}, None)
    assert "its name begins with none of" in refused(out, unnamed)
    few = write_parquet(tmp_path / "few", {"train": rows}, ["only"])
    assert "label 1, but its metadata names 1 classes" in refused(out, few)
    bad = write_parquet(tmp_path / "bad", {"train": rows, "val": [("v.JPEG", GOOD[:99], 0)]}, None)
    assert "v.JPEG is a truncated image" in refused(out, bad)


def test_file_system_refuses_to_write(archive: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the writer meets it in the middle of a split."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = command(archive, "--out", tmp_path / "set", preexec_fn=limit)
    assert "no space left" in assert_refused(done.returncode, done.stderr, tmp_path / "set")
    assert len(prepared(archive, tmp_path / "set").splits["train"]) == CLASSES * TRAIN


def test_full_disk(archive: Path, tmp_path: Path) -> None:
    """A real one: a small tmpfs in a mount namespace of its own, which ends with the command."""
    enter = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    mount = f"mount -t tmpfs -o size=24k none {tmp_path / 'small'}"
    (tmp_path / "small").mkdir()
    trial = subprocess.run([*enter, "sh", "-c", mount], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {trial.stderr.strip()}")
    line = f"{sys.executable} -m fastnet.prepare {archive} --out {tmp_path}/small/set"
    script = f"{mount} && {line}; echo $?; ls -A {tmp_path}/small"
    done = subprocess.run([*enter, "sh", "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    assert (
        done.stderr.startswith("error: ") and "no space left" in done.stderr and done.stderr.count("\n") == 1
    )
    assert done.stdout == "2\n"


# --- download


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; breaks off after `cut` bytes of an answer; knows ranges if `ranges`."""

    content: bytes
    cut: int | None
    ranges: bool
    asked: list[str | None]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.content) - begin))
        self.end_headers()
        self.wfile.write(self.content[begin:][: self.cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[tuple[type[Server], str]]:
    handler = type(
        "Handler",
        (Server,),
        {"content": random.Random(0).randbytes(300_000), "cut": None, "ranges": True, "asked": []},
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{running.server_port}/tiny.zip"
        running.shutdown()


def fetch(served: tuple[type[Server], str], target: Path) -> Path:
    handler, address = served
    return download(target, address, len(handler.content), hashlib.md5(handler.content).hexdigest())


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_was_cut_off(
    served: tuple[type[Server], str], tmp_path: Path, ranges: bool
) -> None:
    handler, _ = served
    handler.cut, handler.ranges = 120_000, ranges
    target = tmp_path / "data" / "tiny.zip"
    with pytest.raises(InputError, match="120,000 of 300,000 bytes; run the same command again to continue"):
        fetch(served, target)
    assert not target.exists()
    handler.cut = None
    assert fetch(served, target).read_bytes() == handler.content
    assert handler.asked == [None, "bytes=120000-"]
    fetch(served, target)
    assert len(handler.asked) == 2 and listing(tmp_path) == ["data", "data/tiny.zip"]


def test_download_of_something_else(served: tuple[type[Server], str], tmp_path: Path) -> None:
    _, address = served
    with pytest.raises(InputError, match=r"sent 300,000 bytes with md5 .*, expected 300,000 with md5 0123"):
        download(tmp_path / "tiny.zip", address, 300_000, "0123")
    with pytest.raises(InputError, match=r"sent 300,000 bytes .*, expected 200,000"):
        download(tmp_path / "tiny.zip", address, 200_000, "0123")
    assert listing(tmp_path) == []


def test_a_download_waits_for_another_one(
    served: tuple[type[Server], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes what that one has fetched."""
    # capsys would lose what another thread writes while it is read.
    target, said = tmp_path / "tiny.zip", io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with ThreadPoolExecutor() as pool:
        with exclusive(target.with_name("tiny.zip.part")):
            waiting = pool.submit(fetch, served, target)
            while "waiting for another process" not in said.getvalue() and not waiting.done():
                pass
            target.write_bytes(b"of the other one")
        assert "waiting for another process" in said.getvalue()
        assert waiting.result() == target and target.read_bytes() == b"of the other one"


def test_download_without_a_server(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/x: .*after 0 of 5 bytes"):
        download(tmp_path / "tiny.zip", "http://127.0.0.1:9/x", 5, "")
