"""--accumulate auto: what the flag takes, and what it means where no memory is tried and where a run continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastnet.cli import SettingsParser, as_arguments
from fastnet.config import Config
from fastnet.errors import InputError
from fastnet.settings import as_toml, settings_of
from fastnet.training.checkpoint import load
from tests.support.runs import assert_same_end
from tests.support.tiny import run_here

FLAGS = ["--network", "linear", "--stages", "conv2", "--head-epochs", "0", "--epochs", "1"]


def resolved(*argv: str) -> Config:
    return settings_of(SettingsParser(prog="train.py", description="").parse(argv), "sample")


def session(run: Path) -> dict[str, object]:
    return json.loads((run / "manifest.json").read_text())["sessions"][-1]


@pytest.mark.parametrize("value", ["auto", 3])
def test_it_is_a_number_or_auto(value: str | int, tmp_path: Path) -> None:
    config = resolved("--accumulate", str(value))
    assert config.accumulate == value
    assert as_arguments({"accumulate": value}) == ["--accumulate", str(value)]
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    (tmp_path / "run.toml").write_text(as_toml(config))
    assert resolved("--config", str(tmp_path / "run.toml")) == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "^--accumulate 0: must be at least 1$"),
        ("-2", "^--accumulate -2: must be at least 1$"),
        ("some", "^--accumulate some: give a number, or auto$"),
        ("2.5", "^--accumulate 2.5: give a number, or auto$"),
    ],
)
def test_anything_else_is_refused(value: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolved("--accumulate", value)


def test_on_a_cpu_it_is_one(tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what a run resulted in has the number, so that another session or run can be given it."""
    run_here(tiny_set, tmp_path, *FLAGS, "--accumulate", "auto", "--max-steps", "1")
    assert "accumulate 1, accumulate_reason a CPU's memory is not tried" in capsys.readouterr().err
    assert session(tmp_path)["accumulate"] == load(tmp_path / "last.pt").config.accumulate == 1
    run_here(tiny_set, tmp_path, *FLAGS, "--accumulate", "1", "--max-steps", "2")
    assert "accumulate_reason" not in session(tmp_path)
    with pytest.raises(InputError, match="started with --accumulate 1 and not 2"):
        run_here(tiny_set, tmp_path, *FLAGS, "--accumulate", "2")


def test_a_run_that_continues_keeps_its_number(tiny_set: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(tiny_set, whole, *FLAGS, "--accumulate", "3")
    run_here(tiny_set, parts, *FLAGS, "--accumulate", "3", "--max-steps", "2")
    run_here(tiny_set, parts, *FLAGS, "--accumulate", "auto")
    assert session(parts)["accumulate"] == 3
    assert session(parts)["accumulate_reason"] == "as the run began"
    assert_same_end(whole, parts)
