"""The predict command: the server's file, a folder of images, and what it refuses."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastnet import ensemble, inference, predict
from fastnet.data.image import BadImage, Examiner, check_bytes
from fastnet.data.prepared import open_set
from fastnet.errors import InputError
from fastnet.inference.images import images_as_split
from tests.support.official import jpeg


def write_images(split, folder: Path) -> None:
    folder.mkdir()
    for i, name in enumerate(split.names):
        (folder / name).write_bytes(split.jpeg(i).tobytes())


def images_table(runs: list[str], folder: Path, out: Path) -> list[dict[str, str]]:
    predict.main([*runs, "--images", str(folder), "--out", str(out)])
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_server_file_has_every_image_in_natural_order(
    tiny_set: Path, runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "predictions.txt"
    result = predict.main([*map(str, runs), "--data", str(tiny_set), "--out", str(out)])
    assert result == {"count": 5, "files": [str(out)]}
    assert [path.name for path in out.parent.iterdir()] == ["predictions.txt"]
    data = open_set(tiny_set)
    text = out.read_text()
    assert text.endswith("\n")
    lines = [line.split(" ") for line in text.splitlines()]
    assert [name for name, _ in lines] == [f"test_{i}.JPEG" for i in range(5)]

    # The same images as a folder: their best class by the average of both runs is the file's.
    write_images(data.splits["test"], tmp_path / "images")
    rows = images_table([*map(str, runs)], tmp_path / "images", tmp_path / "table.csv")
    best = {row["image"]: row["class"] for row in rows if row["rank"] == "1"}
    assert best == dict(lines)


def test_server_lines_are_ordered_as_numbers() -> None:
    names = ["test_10.JPEG", "test_9.JPEG", "test_100.JPEG", "test_0.JPEG"]
    scores = torch.eye(4)
    assert predict.server_lines(names, scores, ["a", "b", "c", "d"]) == [
        "test_0.JPEG d",
        "test_9.JPEG b",
        "test_10.JPEG a",
        "test_100.JPEG c",
    ]


def test_folder_of_images_gives_the_scores_of_the_same_images_in_a_set(
    tiny_set: Path, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = open_set(tiny_set)
    write_images(data.splits["val"], tmp_path / "images")
    (tmp_path / "images" / "notes.txt").write_text("no image, and not taken for one")
    rows = images_table([*map(str, runs)], tmp_path / "images", tmp_path / "table.csv")
    printed = capsys.readouterr().out.splitlines()

    ensemble.main([*map(str, runs), "--data", str(tiny_set), "--out", str(tmp_path)])
    average = np.load(tmp_path / "scores.npz")["average"]  # [N, K]
    assert len(rows) == average.size
    assert [row["image"] for row in rows[:: average.shape[1]]] == data.splits["val"].names
    for row in rows:
        expected = average[data.splits["val"].names.index(row["image"]), data.classes.index(row["class"])]
        assert float(row["probability"]) == pytest.approx(expected, abs=1e-6)  # six digits are written
        assert row["name"] == data.words[data.classes.index(row["class"])]
    for first, second in itertools.pairwise(rows):
        assert first["image"] != second["image"] or float(first["probability"]) >= float(
            second["probability"]
        )
    assert len(printed) == len(data.splits["val"])
    assert printed[0].startswith(f"val_0.JPEG  {float(rows[0]['probability']):6.1%} {rows[0]['name']}")


def test_bad_images_are_named(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    command = [str(runs[0]), "--images", str(folder)]
    with pytest.raises(InputError, match="images: no such file or folder"):
        predict.main(command)
    folder.mkdir()
    with pytest.raises(InputError, match="images: no image file in it"):
        predict.main(command)
    (folder / "good.jpg").write_bytes(jpeg(0))
    (folder / "torn.JPG").write_bytes(jpeg(1)[:-200])
    with pytest.raises(InputError, match=r"torn\.JPG is a bad image"):
        predict.main(command)
    (folder / "torn.JPG").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"torn\.JPG is neither JPEG nor PNG"):
        predict.main(command)


def test_bad_values_are_named(
    tiny_set: Path, set_without_test_split: Path, runs: list[Path], tmp_path: Path
) -> None:
    run, data = str(runs[0]), ["--data", str(tiny_set)]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/predictions\.txt: cannot be written"):
        predict.main([run, *data, "--out", str(tmp_path / "file" / "predictions.txt")])
    with pytest.raises(InputError, match="--out: missing"):
        predict.main([run, *data])
    os.mkfifo(tmp_path / "pipe")
    for taken in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InputError, match=f"{taken}: is no file, but a folder, device or pipe"):
            predict.main(
                [str(tmp_path / "no run"), *data, "--out", str(taken)]
            )  # before anything is computed
    with pytest.raises(InputError, match="no run: no such run"):
        predict.main([str(tmp_path / "no run"), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--images and --data: give one of them"):
        predict.main([run, *data, "--images", str(tmp_path)])
    with pytest.raises(InputError, match="argument --images: is empty; name a path"):
        predict.main([run, "--images", ""])
    with pytest.raises(InputError, match=r"--eval-crop 1e-08: must lie between 0\.01 and 1"):
        predict.main([run, *data, "--out", str(tmp_path / "out"), "--eval-crop", "1e-8"])
    with pytest.raises(InputError, match="set: has no test split"):
        predict.main([run, "--data", str(set_without_test_split), "--out", str(tmp_path / "out")])


def test_files_of_other_formats_and_a_list_on_standard_input(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lossless WebP, a palette GIF and a grey TIFF score as PNGs with the same pixels."""
    picture = Image.open(io.BytesIO(jpeg(3))).convert("RGB")
    grey, palette = picture.convert("L"), picture.quantize(16)
    picture.save(tmp_path / "a.webp", lossless=True)
    palette.save(tmp_path / "b.gif")
    grey.save(tmp_path / "c.tif")
    for name, image in (("a", picture), ("b", palette.convert("RGB")), ("c", grey)):
        image.save(tmp_path / f"{name}.png")
    files = [tmp_path / name for name in ("a.png", "a.webp", "b.png", "b.gif", "c.png", "c.tif")]
    monkeypatch.setattr("sys.stdin", standard_input("".join(f"{file}\n" for file in files).encode()))
    out = tmp_path / "table.jsonl"
    predict.main([str(runs[0]), "--images", "-", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["image"] for line in lines] == [str(file) for file in files]
    for png, other in zip(lines[::2], lines[1::2], strict=True):
        assert png["classes"] == other["classes"]
    listed = predict.main([str(runs[0]), "--images", str(tmp_path), str(files[0])])
    assert listed["count"] == 7


def standard_input(content: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def test_a_folder_is_searched_through_links(runs: list[Path], tmp_path: Path) -> None:
    """What cannot be read is named and not passed over."""
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "b.jpg").write_bytes(jpeg(1))
    (folder / "a.jpg").write_bytes(jpeg(0))
    (folder / "more").symlink_to(elsewhere)
    command = [str(runs[0]), "--images", str(folder), "--out", str(tmp_path / "out.csv")]
    assert predict.main(command)["count"] == 2
    (folder / "c.jpg").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"c\.jpg: is not a file"):
        predict.main(command)


@pytest.mark.long
@pytest.mark.slow
def test_a_reader_that_has_gone_costs_no_file(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    words = [sys.executable, "-m", "fastnet.predict", str(runs[0]), "--images", str(tmp_path / "a.jpg")]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*words, "--out", str(tmp_path / "out.csv")], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
    assert (tmp_path / "out.csv").read_text().count("\n") == 4  # a header and three classes


def test_the_limit_of_bytes_is_that_of_the_file(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pixels as PNG may have more."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "a.webp", quality=1)
    noise.save(png := io.BytesIO(), "PNG")
    size = (tmp_path / "a.webp").stat().st_size
    assert size < len(png.getvalue())
    (limited,), (free,) = (Examiner(most)([png.getvalue()]) for most in (size, None))
    assert isinstance(limited, BadImage) and free == (64, 64)
    command = [str(runs[0]), "--images", str(tmp_path / "a.webp")]
    assert predict.main(command)["count"] == 1
    monkeypatch.setattr(inference.images, "check_bytes", partial(check_bytes, most=size - 1))
    with pytest.raises(InputError, match=r"a\.webp has [\d,]+ bytes, more than 0 MB"):
        predict.main(command)


def test_an_empty_list_on_standard_input(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", standard_input(b"\n"))
    with pytest.raises(InputError, match="--images -: standard input names no file"):
        predict.main([str(runs[0]), "--images", "-"])


def test_names_that_are_no_text(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    image.write_bytes(jpeg(0))
    monkeypatch.setattr("sys.stdin", standard_input(os.fsencode(image) + b"\n"))
    predict.main([str(runs[0]), "--images", "-", "--out", str(tmp_path / "a.csv")])
    assert r"caf\xe9.jpg,1," in (tmp_path / "a.csv").read_text(encoding="utf-8")


def test_an_image_named_twice_has_two_lines(runs: list[Path], tmp_path: Path) -> None:
    image, out = tmp_path / "a.jpg", tmp_path / "out.jsonl"
    image.write_bytes(jpeg(0))
    predict.main([str(runs[0]), "--images", str(image), str(image), "--out", str(out)])
    first, second = out.read_text().splitlines()
    assert first == second and len(json.loads(first)["classes"]) == 3


def test_pixels_of_16_bits_are_scaled_and_those_of_32_refused(runs: list[Path], tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    (tmp_path / "a.pgm").write_bytes(b"P5 48 32 65535\n" + values.astype(">u2").tobytes())
    Image.fromarray((values >> 8).astype(np.uint8)).save(tmp_path / "a.png")
    split = images_as_split([tmp_path / name for name in ("a.png", "a.tif", "a.pgm")])
    plain, *deep = (
        np.asarray(Image.open(io.BytesIO(split.jpeg(i).tobytes())).convert("RGB")) for i in range(3)
    )
    assert all(np.array_equal(plain, pixels) for pixels in deep)
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(InputError, match=r"b\.tif has grey values of 32 bits, .*; convert it to 8 bits"):
        predict.main([str(runs[0]), "--images", str(tmp_path / "b.tif")])


def test_names_cannot_steer_the_terminal() -> None:
    guesses = [predict.Guess("a\x1b[2J\n.jpg", 1, "n1", "cat\x07", 1.0)]
    assert predict.text_table(guesses) == r"a\x1b[2J\n.jpg  100.0% cat\x07"
