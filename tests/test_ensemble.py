"""The ensemble command: the average of the runs' scores, its files, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fastnet import ensemble, evaluate
from fastnet.data.prepared import open_set
from fastnet.errors import InputError


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


def test_a_run_called_average(
    tiny_set: Path, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = shutil.copytree(runs[0], tmp_path / "average")
    ensemble.main([str(named), str(runs[1]), "--data", str(tiny_set)])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == [
        "average",
        "lstm",
        "average",
    ]


def test_bad_values_are_named(tiny_set: Path, runs: list[Path], tmp_path: Path) -> None:
    data = ["--data", str(tiny_set)]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/scores\.npz: cannot be written \(Not a directory: .*file\)"):
        ensemble.main(["no run", "nor this", *data, "--out", str(tmp_path / "file")])  # said first of all
    with pytest.raises(InputError, match="argument --out: is empty; name a path"):
        ensemble.main([*map(str, runs), *data, "--out", ""])
    (tmp_path / "link").symlink_to(runs[0])
    with pytest.raises(InputError, match="the run is named twice"):
        ensemble.main([str(runs[0]), str(tmp_path / "link"), *data])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InputError, match="loop: no such run"):
        ensemble.main([str(runs[0]), str(tmp_path / "loop"), *data])
    with pytest.raises(InputError, match="baseline: an ensemble takes two or more runs"):
        ensemble.main([str(runs[0]), *data])
