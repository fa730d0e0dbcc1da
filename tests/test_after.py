"""What comes after training: evaluate, ensemble, predict."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnet import ensemble, evaluate, predict, train
from fastnet.data.prepared import open_set
from fastnet.errors import InputError
from fastnet.inference.scores import measure
from fastnet.prepare import main as prepare_main
from tests.support.official import jpeg, official_files, write_folder


@pytest.fixture(scope="module")
def runs(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The baseline and the LSTM network after an epoch of three steps."""
    directory = tmp_path_factory.mktemp("runs")
    common = ["sample", "--data", str(tiny_set), "--image-size", "32", "--batch-size", "14"]
    common += ["--head-epochs", "0", "--epochs", "1", "--lr", "0.005"]
    for network in ("baseline", "lstm"):
        train.main([*common, "--network", network, "--run-dir", str(directory / network)])
    return [directory / "baseline", directory / "lstm"]


def altered(run: Path, to: Path, change: Callable[[dict], None]) -> Path:
    """A copy of a run whose checkpoint is another."""
    content = torch.load(run / "best.pt", weights_only=True)
    change(content)
    to.mkdir()
    torch.save(content, to / "best.pt")
    return to


# --- counting


def test_counts_and_loss_of_known_scores() -> None:
    scores = torch.tensor(
        [
            [0.05, 0.60, 0.15, 0.10, 0.06, 0.04],  # label 1 comes first
            [0.05, 0.60, 0.15, 0.10, 0.06, 0.04],  # label 0 comes fifth
            [0.05, 0.60, 0.15, 0.10, 0.06, 0.04],  # label 5 comes last
            [1.00, 0.00, 0.00, 0.00, 0.00, 0.00],  # label 4, given no probability at all
        ]
    )
    result = measure(scores, np.array([1, 0, 5, 4]))
    assert (result.count, result.correct1, result.correct5) == (4, 1, 3)
    assert (result.top1, result.top5) == (0.25, 0.75)
    least = np.finfo(np.float32).tiny
    # Scores are float32: a relative error of 2^-24 each is an absolute one of their logarithm.
    expected = -np.log([0.60, 0.05, 0.04, least]).mean()
    assert result.loss == pytest.approx(expected, abs=2**-23)


def test_equal_scores_count_as_argmax_has_them() -> None:
    scores = torch.full((10, 10), 0.1)
    result = measure(scores, np.arange(10))
    assert (result.correct1, result.correct5) == (1, 5), (
        "the first class is first, five of ten are among five"
    )
    assert result.correct1 == (scores.argmax(dim=1) == torch.arange(10)).sum()


def test_fewer_classes_than_five_are_all_among_five() -> None:
    assert measure(torch.tensor([[0.2, 0.5, 0.3]] * 3), np.arange(3)).correct5 == 3


# --- evaluate


@pytest.mark.parametrize("batch_size", [3, 128])
def test_evaluate_repeats_what_training_measured(tiny_set: Path, runs: list[Path], batch_size: int) -> None:
    for run in runs:
        recorded = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        assert recorded["event"] == "epoch"
        flags = ["--checkpoint", "last", "--batch-size", str(batch_size)]
        result = evaluate.main([str(run), "--data", str(tiny_set), *flags])
        assert result["count"] == 10
        assert (result["top1"], result["top5"]) == (recorded["val_top1"], recorded["val_top5"])
        assert result["correct1"] == round(10 * recorded["val_top1"])
        # Both round logits below 2^5 and their exponentials to 24 bits, and sum them in another order.
        assert result["loss"] == pytest.approx(recorded["val_loss"], abs=8 * 2**5 * 2**-24)


def test_evaluate_as_a_command_prints_json_last(tiny_set: Path, runs: list[Path]) -> None:
    command = [sys.executable, "-m", "fastnet.evaluate", str(runs[0]), "--data", str(tiny_set), "--json"]
    done = subprocess.run([*command, "--split", "train"], capture_output=True, text=True, check=True)
    line, last = done.stdout.splitlines()
    assert line.startswith("baseline (best, step 3) on 42 train images: top-1 ")
    assert json.loads(last)["count"] == 42


def test_split_without_labels_is_refused(tiny_set: Path, runs: list[Path]) -> None:
    with pytest.raises(InputError, match="set: its test split has no labels"):
        evaluate.main([str(runs[0]), "--data", str(tiny_set), "--split", "test"])


# --- ensemble


def test_ensemble_averages_scores_and_saves_them(
    tiny_set: Path, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "ensemble"
    result = ensemble.main([*map(str, runs), "--data", str(tiny_set), "--out", str(out)])
    assert result["files"] == [str(out / "scores.npz")]
    saved = np.load(out / "scores.npz")
    val = open_set(tiny_set).splits["val"]
    assert saved["names"].tolist() == val.names
    assert saved["labels"].tolist() == val.labels.tolist()
    assert saved["classes"].tolist() == open_set(tiny_set).classes
    assert saved["runs"].tolist() == ["baseline", "lstm"]
    scores, average = saved["scores"], saved["average"]
    assert scores.shape == (2, 10, 3) and average.shape == (10, 3) and average.dtype == np.float32
    assert np.allclose(scores.sum(axis=2), 1, atol=1e-6)
    assert np.abs(scores[0] - scores[1]).max() > 0.01, "the runs differ, or an average of one would pass"
    assert np.abs(average - (scores[0] + scores[1]) / 2).max() <= 2**-24

    for name, of_run in zip(("baseline", "lstm"), scores, strict=True):
        alone = evaluate.main([str(runs[0].parent / name), "--data", str(tiny_set)])
        assert {**result["runs"][name], "files": []} == alone
        assert alone["correct1"] == (of_run.argmax(axis=1) == val.labels).sum()
    assert result["correct1"] == (average.argmax(axis=1) == val.labels).sum()
    assert result["loss"] == pytest.approx(-np.log(average[np.arange(10), val.labels]).mean(), abs=2**-20)

    table = capsys.readouterr().out.splitlines()[1:5]
    assert table[0].split() == ["top-1", "top-5", "error", "loss"]
    assert [line.split()[0] for line in table[1:]] == ["baseline", "lstm", "average"]
    assert table[3].split()[1:4] == [f"{result['top1']:.2%}", "100.00%", f"{1 - result['top1']:.4f}"]


# --- predict


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


def write_images(split, folder: Path) -> None:
    folder.mkdir()
    for i, name in enumerate(split.names):
        (folder / name).write_bytes(split.jpeg(i).tobytes())


def images_table(runs: list[str], folder: Path, out: Path) -> list[dict[str, str]]:
    predict.main([*runs, "--images", str(folder), "--out", str(out)])
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


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


# --- bad input


def test_bad_images_are_named(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    command = [str(runs[0]), "--images", str(folder)]
    with pytest.raises(InputError, match="images: no such folder"):
        predict.main(command)
    folder.mkdir()
    with pytest.raises(InputError, match=r"images: no \.jpg, \.jpeg, \.png file in it"):
        predict.main(command)
    (folder / "good.jpg").write_bytes(jpeg(0))
    (folder / "torn.JPG").write_bytes(jpeg(1)[:-200])
    with pytest.raises(InputError, match=r"images: torn\.JPG is a bad image"):
        predict.main(command)
    (folder / "torn.JPG").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"images: torn\.JPG is neither JPEG nor PNG"):
        predict.main(command)


def test_runs_that_cannot_be_used_are_named(tiny_set: Path, runs: list[Path], tmp_path: Path) -> None:
    baseline, lstm = runs
    data = ["--data", str(tiny_set)]

    def rename_classes(content: dict) -> None:
        content["classes"] = ["n00000001", *content["classes"][1:]]

    def swap_classes(content: dict) -> None:
        content["classes"] = content["classes"][::-1]

    def other_network(content: dict) -> None:
        content["config"]["network"] = "baseline"

    def not_finite(content: dict) -> None:
        content["model"]["classifier.bias"][0] = math.nan

    renamed = altered(lstm, tmp_path / "renamed", rename_classes)
    swapped = altered(lstm, tmp_path / "swapped", swap_classes)
    other = altered(lstm, tmp_path / "other", other_network)
    nan = altered(lstm, tmp_path / "nan", not_finite)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "best.pt").write_bytes((baseline / "best.pt").read_bytes()[:10_000])
    (tmp_path / "begun").mkdir()

    for run, message in [
        (tmp_path / "nowhere", "nowhere: no such run"),
        (tmp_path / "begun", r"begun/best\.pt: no such checkpoint"),
        (torn, r"torn/best\.pt: damaged"),
        (other, r"other/best\.pt: a checkpoint of another network"),
        (renamed, "its classes are not those of run renamed .3 and 3, n00000001 in one alone"),
        (swapped, "its classes are not those of run swapped .in another order"),
        (nan, "nan: its network gives scores that are not finite"),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate.main([str(run), *data])
    for command in (ensemble.main, predict.main):
        with pytest.raises(InputError, match="run renamed: its classes are not those of run baseline"):
            command([str(baseline), str(renamed), *data, "--out", str(tmp_path / "out")])
        with pytest.raises(InputError, match="baseline: the run is named twice"):
            command([str(baseline), str(baseline), *data, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="baseline: an ensemble takes two or more runs"):
        ensemble.main([str(baseline), *data])


def test_places_and_splits_that_are_not_there(tiny_set: Path, runs: list[Path], tmp_path: Path) -> None:
    run, data = str(runs[0]), ["--data", str(tiny_set)]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/predictions\.txt: cannot be written"):
        predict.main([run, *data, "--out", str(tmp_path / "file" / "predictions.txt")])
    with pytest.raises(InputError, match=r"file/scores\.npz: cannot be written"):
        ensemble.main([*map(str, runs), *data, "--out", str(tmp_path / "file")])
    with pytest.raises(InputError, match="--out: missing"):
        predict.main([run, *data])
    with pytest.raises(InputError, match="--images: goes without --data"):
        predict.main([run, *data, "--images", str(tmp_path)])
    with pytest.raises(InputError, match="--batch-size"):
        evaluate.main([run, *data, "--batch-size", "0"])

    source = write_folder(tmp_path / "source", official_files(3, 14, 10, 5, lambda i: jpeg(i, size=32)))
    shutil.rmtree(source / "tiny-imagenet-200" / "test")
    prepare_main([str(source), "--out", str(tmp_path / "set")])
    with pytest.raises(InputError, match="set: has no test split"):
        predict.main([run, "--data", str(tmp_path / "set"), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="set: has no test split; choose one of train, val"):
        evaluate.main([run, "--data", str(tmp_path / "set"), "--split", "test"])
