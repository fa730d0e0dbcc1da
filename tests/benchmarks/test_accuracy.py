"""The accuracy benchmark: runs that start from one another, seeds, averages, subsets, and what it records of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import accuracy, accuracy_runs, harness
from benchmarks.accuracy_runs import Experiment, Run
from fastnet.cli import Parser, SettingsParser
from fastnet.config import Config, with_flags
from fastnet.data.prepared import open_set
from fastnet.errors import InputError
from fastnet.inference.flags import add_evaluation_flags, changed_settings
from fastnet.training.events import EpochEvent

FLAGS = "sample --image-size 32 --batch-size 14 --epochs 1"
TINY = Experiment(
    "two networks",
    FLAGS,
    (
        Run("baseline", "--network baseline"),
        Run(
            "lstm",
            "--network lstm --head-epochs 1 --precision {precision} --weights {start}",
            start="baseline",
        ),
        Run("centre", "--eval-crop 0.5 --flip-average", trained="lstm"),
    ),
    seeds=2,
    averages=(("baseline", "lstm"),),
    curves=True,
    elsewhere=(("another", 0.9), ("a third", 0.7)),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs and results go; the experiment `tiny` is one of those to choose from."""
    monkeypatch.setattr(accuracy, "OUT", tmp_path / "runs")
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(accuracy_runs.EXPERIMENTS, "tiny", TINY)
    from_file = Experiment("from a file", FLAGS, (Run("baseline", "--weights {weights}"),))
    monkeypatch.setitem(accuracy_runs.EXPERIMENTS, "from-file", from_file)
    monkeypatch.setattr(harness, "results_dir", lambda: tmp_path)
    return tmp_path


@pytest.mark.long
def test_runs_averages_and_curves(folder: Path, tiny_set: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["tiny", "--data", str(tiny_set), "--precision", "fp32"]
    accuracy.main(command)
    rows = harness.read_csv(folder / "accuracy-tiny.csv")
    names = ["baseline", "lstm", "centre", "average of baseline and lstm"]
    assert [(row["run"], row["seed"]) for row in rows] == [(name, seed) for seed in "01" for name in names]
    assert {row["epochs"] for row in rows} == {"1", "2", ""}
    assert all(0 <= float(row["top1"]) <= float(row["top5"]) <= 1 and row["images"] == "10" for row in rows)
    assert rows[1]["flags"].endswith("--precision fp32 --weights baseline/last.pt")
    assert rows[2]["flags"] == "--eval-crop 0.5 --flip-average" and rows[2]["loss"] != rows[1]["loss"]
    assert (folder / "accuracy-tiny.png").stat().st_size > 10_000
    assert "| average of baseline and lstm |" in capfd.readouterr().out

    manifest = folder / "runs" / f"tiny-{rows[0]['set']}" / "baseline-0" / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["sessions"][-1] |= {"git": "0123456789ab", "machine": "another"}
    manifest.write_text(json.dumps(facts))
    accuracy.main(command)  # nothing is left to train
    again = harness.read_csv(folder / "accuracy-tiny.csv")[0]
    assert [again[key] for key in ("hours", "date")] == [rows[0][key] for key in ("hours", "date")]
    assert (again["git"], again["machine"]) == ("0123456789ab", "another")


def test_tuning_has_the_first_seed_alone() -> None:
    runs = (Run("kept", ""), Run("tried", "--lr 1", tuning=True))
    experiment = Experiment("", "", runs, seeds=2)
    assert [experiment.runs_of(seed) for seed in range(2)] == [[*runs], [runs[0]]]
    scores = [("kept", 0, "0.50"), ("tried", 0, "0.60"), ("kept", 1, "0.52")]
    rows = [{"run": name, "seed": seed, "top1": score, "top5": "0.80"} for name, seed, score in scores]
    assert "| tried | 0.6000 | 0.8000 | +10.0 |" in accuracy.table(rows)


def test_what_others_reached_is_within_the_plot() -> None:
    axis = Figure().subplots()
    axis.plot([0, 1], [0, 0.1])
    axis.set_ylim(bottom=0)  # as figures.draw does, after which no line widens the plot
    accuracy.mark([axis], TINY.elsewhere)
    assert [text.get_text() for text in axis.texts] == ["another: 90.0%", "a third: 70.0%"]
    assert axis.get_ylim()[1] > 0.9


def test_hours_of_an_epoch_in_two_sessions() -> None:
    """The second of them knows of its own steps only."""
    paces = [(10, 4.0), (20, 2.0)]
    epochs = [
        EpochEvent("full", n, step, 1.0, 0.5, 1.0, 0.5, 0.5, 10, images_per_s=pace, seconds=1.0)
        for n, (step, pace) in enumerate(paces)
    ]
    assert accuracy.hours(epochs, batch_size=8) * 3600 == 10 * 8 / 4 + 10 * 8 / 2


def test_a_set_with_too_few_classes(folder: Path, tiny_set: Path) -> None:
    with pytest.raises(InputError, match=r"has 3 classes, of which ablation takes 25"):
        accuracy.main(["ablation", "--data", str(tiny_set), "--weights", "FILE"])


@pytest.mark.long
@pytest.mark.slow
def test_a_path_may_have_spaces(folder: Path, tiny_set: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        accuracy.main(["from-file", "--data", str(tiny_set), "--weights", "no such file"])
    assert ended.value.code == 2
    assert "--weights no such file: no such" in capfd.readouterr().err


@pytest.mark.slow
def test_a_subset_has_every_nth_class(folder: Path, tiny_set: Path) -> None:
    whole = open_set(tiny_set)
    part = accuracy.subset(whole, 2)
    assert part.classes == whole.classes[:2]
    for name in ("train", "val"):
        assert len(part.splits[name]) == (whole.splits[name].labels < 2).sum()
    assert part.hash == accuracy.subset(whole, 2).hash


@pytest.mark.parametrize("name", ["transfer", "readout", "variants", "kept", "ablation"])
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
        if run.trained:
            parser = Parser(prog="evaluate", description="")
            add_evaluation_flags(parser)
            with_flags(Config(), changed_settings(parser.parse_args(run.flags.split())))
            assert any(run.trained == other.name and not other.trained for other in experiment.runs[:n])
            continue
        words = experiment.flags_of(run).format(weights="FILE", start="FILE", precision="bf16").split()
        given = SettingsParser(prog="train", description="").parse(words)
        config = with_flags(Config(), given)
        assert config.image_size < 224 or config.cache_features, "without a GPU this would take days"
    assert {name for members in experiment.averages for name in members} <= set(names)
