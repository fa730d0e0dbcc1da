"""The whole paper on a tiny set: trains, averages, predicts, draws; stopped, it continues."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastnet import paper
from fastnet.data.prepared import open_set
from fastnet.distributed import device
from fastnet.errors import InputError
from tests.support.paths import REPOSITORY
from tests.support.tiny import refused

FLAGS = (
    "--weights none --image-size 32 --batch-size 8 --head-epochs 1 --epochs 1 --log-every 2 --threads 1 --lr 0.01 "
    "--augment jitter"
)


def command(data: Path, out: Path, *flags: str) -> list[str]:
    given = ["--data", str(data), "--out", str(out)]
    return [sys.executable, "-m", "fastnet.paper", *given, *flags, *FLAGS.split()]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.slow
def test_the_whole_paper(tiny_set: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "paper", shutil.copytree(tiny_set, tmp_path / "set")  # which features are added to
    out.mkdir()
    (out / "lstm").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with subprocess.Popen(
        command(own, out, "--cache-features", "1"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # stopped as soon as the baseline is trained and the LSTM network begins
            if line.startswith("LSTM network:"):
                break
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert not (out / "results.json").exists()

    done = subprocess.run(
        [*command(own, out, "--cache-features", "1"), "--json"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert f"{out / 'baseline'}: already done" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["done"] and result["count"] == 10
    baseline = json.loads((out / "baseline" / "manifest.json").read_text())["config"]
    assert baseline["head_epochs"] == 0 and baseline["augment"]["policy"] == "jitter"
    assert all(Path(file).stat().st_size for file in result["files"])

    table = (out / "results.md").read_text()
    assert table in done.stdout
    endings = {"baseline": "| - | 0.338 |", "LSTM network": "| 0.3341 | 0.386 |", "ensemble": "| - | 0.329 |"}
    for row, ending in endings.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} ")]
        assert line.endswith(ending)
    results = json.loads((out / "results.json").read_text())
    scores = np.load(out / "scores.npz")
    right = (scores["average"].argmax(1) == scores["labels"]).mean()
    assert results["average"]["top1"] == result["top1"] == pytest.approx(right)
    assert f"| ensemble | {1 - right:.4f} |" in table

    lines = (out / "predictions.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [f"test_{i}.JPEG" for i in range(5)]
    assert (out / "figures" / "training.png").exists()
    lines = done.stdout.splitlines()
    last = lines[lines.index(f"report: {out / 'report.html'}") :]
    assert last[1] == table.splitlines()[0] and result["files"][0] == str(out / "report.html")
    config = json.loads((out / "lstm" / "manifest.json").read_text())["config"]
    assert config["weights"] == "none" and config["head_epochs"] == 1
    baseline = json.loads((out / "baseline" / "manifest.json").read_text())["config"]
    assert (baseline["head_epochs"], baseline["cache_features"], config["cache_features"]) == (0, 0, 1)
    assert "--head-epochs: for the LSTM network; the paper's baseline has no frozen phase" in done.stderr


@pytest.mark.parametrize(
    ("holdout", "decided"), [(0.0, "on the same images."), (0.05, "on 5% of the training images, held out.")]
)
def test_the_table_says_what_decided(tiny_set: Path, tmp_path: Path, holdout: float, decided: str) -> None:
    score = {"top1": 0.5, "top5": 0.75, "loss": 1.0, "count": 10}
    scores = {**score, "runs": {"baseline": score, "lstm": score}}
    paper.write_results(tmp_path, open_set(tiny_set), scores, holdout)
    assert f"the best epoch were decided {decided}" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["holdout"] == holdout


@pytest.mark.long
@pytest.mark.slow
def test_the_device_is_that_of_all_steps(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose GPU does not work, on which --device auto is refused."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "NVIDIA_DEVICES", (tmp_path, "nvidia[0-9]*"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99")  # no machine has it
    with pytest.raises(InputError, match="insist on the CPU"):
        device.choose_device("auto")
    flags = [*FLAGS.split(), "--device", "cpu", "--max-steps", "1"]
    assert paper.main(["--data", str(tiny_set), "--out", str(tmp_path / "paper"), *flags])["done"]


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (["sample"], "baseline/best.pt"),
        (["paper", "--weights", "some.pth", "--weights-partial"], "baseline/best.pt"),
        (["paper", "--weights", "some.pth"], "some.pth"),
        (["paper"], None),
    ],
    ids=["random", "partial", "whole", "imagenet"],
)
def test_what_the_lstm_network_starts_from(
    flags: list[str], start: str | None, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline that was just trained, unless all of ImageNet's weights are there."""
    asked: list[list[str]] = []

    def begun(line: list[str], ranks: int) -> bool:
        asked.append(line)
        return len(asked) == 1

    monkeypatch.setattr(paper, "train", begun)
    paper.main([*flags, "--data", str(tiny_set), "--out", str(tmp_path)])
    baseline, lstm = asked
    given = flags[flags.index("--weights") + 1] if "--weights" in flags else None
    for line, expected in ((baseline, given), (lstm, start)):
        found = line[line.index("--weights") + 1] if "--weights" in line else None
        assert found == (str(tmp_path / expected) if expected and "/" in expected else expected)
    assert ("--weights-partial" in baseline) == ("--weights-partial" in flags)
    assert "--weights-partial" not in lstm


def test_bad_flags_are_refused_before_anything_starts(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "--nonsense": "unrecognized arguments: --nonsense (see python -m fastnet.paper --help)",
        "--seq-len=100": "--seq-len 100: must divide the 256 channels of conv4",  # which the baseline has no use for
    }
    for flag, line in told.items():
        flags = command(tiny_set, tmp_path / "paper", flag)[3:]
        assert refused(capsys, monkeypatch, *flags, main=paper.main) == f"error: {line}"
    assert not (tmp_path / "paper").exists()


SAVE_FAILS = (
    "import os, signal; signal.signal(15, lambda *_: os._exit(2)); os.kill(os.getppid(), 15); signal.pause()"
)


@pytest.mark.parametrize(
    ("code", "ends_with"),
    [
        ("import os; os.kill(os.getpid(), 9)", "train.py was ended by SIGKILL"),
        ("import sys; sys.exit(3)", "3"),
        (SAVE_FAILS, "2"),
    ],
    ids=["killed", "failed", "stopped, but could not save"],
)
def test_how_training_ends(code: str, ends_with: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "launch_command", lambda *_, **__: [sys.executable, "-c", code])
    with pytest.raises(SystemExit) as ended:
        paper.train([], ranks=1)
    assert str(ended.value.code).startswith(ends_with)
