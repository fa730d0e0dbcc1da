"""The accuracy benchmark: runs that start from one another, seeds, averages, subsets, and what it records of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import accuracy, accuracy_runs, harness
from benchmarks.accuracy_runs import Experiment, Run
from fastnet.cli import SettingsParser
from fastnet.config import Config, with_flags
from fastnet.data.prepared import open_set
from fastnet.errors import InputError

FLAGS = "sample --image-size 32 --batch-size 14 --epochs 1"
TINY = Experiment(
    "two networks",
    FLAGS,
    (
        Run("baseline", "--network baseline"),
        Run("lstm", "--network lstm --head-epochs 1 --weights {start}", start="baseline"),
    ),
    seeds=2,
    averages=(("baseline", "lstm"),),
    curves=True,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs and results go; the experiment `tiny` is one of those to choose from."""
    monkeypatch.setattr(accuracy, "OUT", tmp_path / "runs")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(accuracy_runs.EXPERIMENTS, "tiny", TINY)
    monkeypatch.setattr(harness, "results_dir", lambda: tmp_path)
    return tmp_path


@pytest.mark.long
def test_runs_averages_and_curves(folder: Path, tiny_set: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["tiny", "--data", str(tiny_set)]
    accuracy.main(command)
    rows = harness.read_csv(folder / "accuracy-tiny.csv")
    names = ["baseline", "lstm", "average of baseline and lstm"]
    assert [(row["run"], row["seed"]) for row in rows] == [(name, seed) for seed in "01" for name in names]
    assert {row["epochs"] for row in rows} == {"1", "2", ""}
    assert all(0 <= float(row["top1"]) <= float(row["top5"]) <= 1 and row["images"] == "10" for row in rows)
    assert rows[1]["flags"].endswith("--weights baseline/last.pt")
    assert (folder / "accuracy-tiny.png").stat().st_size > 10_000
    assert "| average of baseline and lstm |" in capfd.readouterr().out

    accuracy.main(command)  # nothing is left to train
    assert harness.read_csv(folder / "accuracy-tiny.csv")[0]["hours"] == rows[0]["hours"]


@pytest.mark.slow
def test_a_subset_has_every_nth_class(folder: Path, tiny_set: Path) -> None:
    whole = open_set(tiny_set)
    part = accuracy.subset(whole, 2)
    assert part.classes == whole.classes[:2]
    for name in ("train", "val"):
        assert len(part.splits[name]) == (whole.splits[name].labels < 2).sum()
    assert part.hash == accuracy.subset(whole, 2).hash


@pytest.mark.parametrize("name", ["transfer", "readout", "variants", "ablation"])
def test_pretrained_weights_have_to_be_named(name: str, tiny_set: Path) -> None:
    with pytest.raises(InputError, match=f"--weights: {name} starts from pretrained weights"):
        accuracy.parse([name, "--data", str(tiny_set)])


@pytest.mark.parametrize("name", accuracy_runs.EXPERIMENTS)
def test_flags_of_the_experiments_are_flags_of_train(name: str) -> None:
    """A typing error must not show after hours."""
    experiment = accuracy_runs.EXPERIMENTS[name]
    names = [run.name for run in experiment.runs]
    assert len(set(names)) == len(names)
    for n, run in enumerate(experiment.runs):
        assert run.start in ("", *names[:n])
        words = experiment.flags_of(run).format(weights="FILE", start="FILE").split()
        given = SettingsParser(prog="train", description="").parse(words)
        config = with_flags(Config(), given)
        assert config.image_size < 224 or config.cache_features, "without a GPU this would take days"
    assert {name for members in experiment.averages for name in members} <= set(names)
