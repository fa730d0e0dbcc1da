"""The prepared set: what is read from it, and that a set which is not whole is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fastnet.data.default import default_set
from fastnet.data.entries import Entry, Source
from fastnet.data.prepared import open_set
from fastnet.data.preparing import prepare
from fastnet.errors import InputError
from tests.support.official import jpeg
from tests.support.paths import REPOSITORY

RECORD = {"kind": "test", "path": None, "official": None, "bytes": None, "md5": None}


def make(out: Path, seed: int = 0) -> Path:
    """A set of 4 training and 2 val images of two classes, and 3 test images."""
    splits = {
        name: [
            Entry(f"{name}_{i}.JPEG", None if name == "test" else f"c{i % 2}", seed + 10 * split + i)
            for i in range(count)
        ]
        for split, (name, count) in enumerate([("train", 4), ("val", 2), ("test", 3)])
    }
    prepare(Source(RECORD, splits, lambda where: jpeg(where, size=16 + where % 5)), out)
    return out


def change_meta(path: Path, **values: Any) -> None:
    meta = json.loads((path / "set.json").read_text())
    (path / "set.json").write_text(json.dumps({**meta, **values}))


def test_reads_what_was_written(tmp_path: Path) -> None:
    chosen = open_set(make(tmp_path / "set"))
    assert (chosen.name, chosen.classes, chosen.words) == ("set", ["c0", "c1"], ["c0", "c1"])
    assert list(chosen.splits) == ["train", "val", "test"]
    train = chosen.splits["train"]
    assert len(train) == 4 and train.names == [f"train_{i}.JPEG" for i in range(4)]
    assert train.labels.tolist() == [0, 1, 0, 1] and train.labels.dtype == np.int64
    assert train.sizes.tolist() == [[16, 16], [17, 17], [18, 18], [19, 19]] and train.sizes.dtype == np.int32
    assert chosen.splits["test"].labels.tolist() == [-1, -1, -1]
    for i in range(4):
        assert train.jpeg(i).dtype == np.uint8 and train.jpeg(i).tobytes() == jpeg(i, size=16 + i % 5)


def test_images_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    train = open_set(make(tmp_path / "set")).splits["train"]
    assert np.shares_memory(train.jpeg(1), train.mapped) and not train.jpeg(1).flags.writeable
    assert train.mapped.nbytes == train.path.stat().st_size


def test_images_of_many_record_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnet.data.preparing.BATCH_BYTES", 1500)
    chosen = open_set(make(tmp_path / "set"))
    train = chosen.splits["train"]
    with pa.memory_map(str(train.path)) as file:
        assert pa.ipc.open_file(file).num_record_batches > 1
    assert [train.jpeg(i).tobytes() for i in range(4)] == [jpeg(i, size=16 + i % 5) for i in range(4)]
    chosen.verify()


def test_hash_is_of_the_contents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_set(make(tmp_path / "set")).hash
    monkeypatch.setattr("fastnet.data.preparing.BATCH_BYTES", 1500)
    assert open_set(make(tmp_path / "again")).hash == first
    assert open_set(make(tmp_path / "other", seed=1)).hash != first


@pytest.mark.long
@pytest.mark.slow
def test_opening_reads_no_images(tmp_path: Path) -> None:
    """A file of 100,000 images is opened by its offsets: far fewer bytes are touched than it has."""
    source = Source(
        RECORD, {"train": [Entry("a", "c", 0)] * 2, "val": [Entry("v", "c", 0)]}, lambda _: jpeg(0)
    )
    path = prepare(source, tmp_path / "set")[0].path
    many, image = 100_000, jpeg(0)
    columns = [["a"] * many, [image] * many, [0] * many, [64] * many, [64] * many]
    schema = open_set(path).splits["train"].table.schema
    batch = pa.record_batch(
        [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
    )
    with pa.OSFile(str(path / "train.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    size = (path / "train.arrow").stat().st_size
    meta = json.loads((path / "set.json").read_text())
    meta["splits"]["train"] |= {"count": many, "bytes": size}
    change_meta(path, splits=meta["splits"])
    script = (
        "import resource, sys; from pathlib import Path; from fastnet.data.prepared import open_set\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "split = open_set(Path(sys.argv[1])).splits['train']; assert len(split) == 100_000\n"
        "assert split.jpeg(99_999).tobytes() == split.jpeg(0).tobytes()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert size > 100e6 and int(done.stdout) < 0.25 * size


# --- sets that are not whole


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_set(path)
    return str(caught.value)


def test_missing_and_half_prepared(tmp_path: Path) -> None:
    assert "absent: no such set; make it with" in refused(tmp_path / "absent")
    path = make(tmp_path / "set")
    (path / "val.arrow").rename(path / "moved")
    assert "val.arrow: damaged: it is missing" in refused(path)
    (path / "moved").rename(path / "val.arrow")
    open_set(path)
    (path / "set.json").unlink()
    assert "not a prepared set (it has no set.json)" in refused(path)


def test_damaged_description(tmp_path: Path) -> None:
    path = make(tmp_path / "set")
    good = (path / "set.json").read_text()
    for bad in (
        good[:200],
        "",
        "[]",
        "\xff",
        '{"format": 1}',
        '{"format": 1, "classes": 3, "splits": {"train": 1}}',
    ):
        (path / "set.json").write_text(bad, encoding="latin-1")
        assert "set.json: damaged" in refused(path)
    (path / "set.json").write_text(good)
    change_meta(path, format=99)
    assert "a set of format 99, this version reads format 1" in refused(path)


def test_damaged_file(tmp_path: Path) -> None:
    path = make(tmp_path / "set")
    file = path / "train.arrow"
    good = file.read_bytes()

    def with_content(content: bytes) -> str:
        file.write_bytes(content)
        return refused(path)

    assert f"train.arrow: damaged: it has {len(good) - 9} bytes" in with_content(good[:-9])
    assert "train.arrow: damaged" in with_content(bytes(len(good)))
    assert "train.arrow: damaged" in with_content(good[:-60] + bytes(60))
    offsets = np.cumsum([0] + [len(jpeg(i, size=16 + i % 5)) for i in range(4)]).astype("<i8").tobytes()
    assert good.count(offsets) == 1
    wild = np.frombuffer(offsets, "<i8").copy()
    wild[2] = len(good) * 2
    assert "train.arrow: damaged: In column 1: Invalid: Offset" in with_content(
        good.replace(offsets, wild.tobytes())
    )
    labels = np.array([0, 1, 0, 1], "<i8").tobytes()
    assert good.count(labels) == 1
    wrong = np.array([0, 1, 0, 7], "<i8").tobytes()
    assert "train.arrow: damaged: its labels are out of range" in with_content(good.replace(labels, wrong))
    file.write_bytes(good)
    open_set(path).verify()


# --- the default set


def test_default_set_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTNET_DATA", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    make(Path("data/sample"))
    assert default_set(None).path == Path("data/sample")
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "data/sample" in line and "there is no --data" in line
    make(Path("data/tiny-imagenet"))
    assert default_set(None).path == Path("data/tiny-imagenet")
    make(tmp_path / "mine")
    monkeypatch.setenv("FASTNET_DATA", str(tmp_path / "mine"))
    assert default_set(None).path == tmp_path / "mine"
    assert "$FASTNET_DATA" in capsys.readouterr().err
    make(tmp_path / "flag")
    assert default_set(tmp_path / "flag").path == tmp_path / "flag"
    assert "--data" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    default_set(tmp_path / "flag")
    assert capsys.readouterr().err == ""


def test_default_set_never_falls_back_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTNET_DATA", "absent")
    with pytest.raises(InputError, match=r"absent: no such set"):
        default_set(None)
    monkeypatch.delenv("FASTNET_DATA")
    Path("data/tiny-imagenet").mkdir(parents=True)
    with pytest.raises(InputError, match=r"data/tiny-imagenet: not a prepared set"):
        default_set(None)


@pytest.mark.long
@pytest.mark.slow
def test_first_use_by_eight_ranks_makes_one_sample(tmp_path: Path) -> None:
    script = (
        "from fastnet.data import sample; sample.COUNTS = {'train': 4, 'val': 2, 'test': 1}\n"
        "from fastnet.data.default import default_set; print(default_set(None).hash)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "FASTNET_DATA"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(8)
    ]
    results = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 8, results
    assert len({hash for hash, _ in results}) == 1
    assert sum("the generated sample set" in errors for _, errors in results) == 1
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["sample"]
