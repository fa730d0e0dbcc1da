"""Settings from files: what they mean, what overrides what, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastnet import train
from fastnet.cli import SettingsParser, as_arguments
from fastnet.config import NETWORKS, PRESETS, Config
from fastnet.errors import InputError
from fastnet.settings import as_toml, meeting_of, settings_of


def resolved(*argv: str, data_kind: str = "zip") -> Config:
    return settings_of(SettingsParser(prog="train.py", description="").parse(argv), data_kind)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("network", NETWORKS)
def test_printed_settings_are_read_back(preset: str, network: str, tmp_path: Path) -> None:
    config = PRESETS[preset](network)
    (tmp_path / "run.toml").write_text(as_toml(config))
    assert resolved("--config", str(tmp_path / "run.toml")) == config
    (tmp_path / "manifest.json").write_text(json.dumps({"config": config.to_json(), "sessions": []}))
    assert resolved("--config", str(tmp_path / "manifest.json"), data_kind="sample") == config


def test_a_file_overrides_the_preset_and_a_flag_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('network = "lstm"\nlr = 1\nstages = ["conv5"]\n[augment]\nflip = 0.0\n')
    config = resolved("sample", "--config", str(file), "--flip", "0.25", "--seed", "3")
    preset = PRESETS["sample"]("lstm")
    assert (config.network, config.lr, config.stages, config.seed) == ("lstm", 1.0, ("conv5",), 3)
    assert (config.augment.flip, config.augment.min_crop) == (0.25, preset.augment.min_crop)
    assert (config.image_size, config.head_epochs) == (preset.image_size, preset.head_epochs)
    assert resolved("--config", str(file), "--network", "baseline").network == "baseline"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "learning_rate = 1", r"a\.toml: learning_rate is no setting"),
        ("a.toml", "batchsize = 1", r"a\.toml: batchsize is no setting; did you mean batch_size\?"),
        ("a.toml", "[augment]\nflap = 1", r"flap is no setting; did you mean flip\?"),
        ("a.toml", 'lr = "fast"', r"a\.toml: Expected `float`, got `str` - at `\$\.lr`"),
        ("a.toml", "augment = 3", r"a\.toml: "),
        ("a.toml", "network = 3", r"a\.toml: network must be a string"),
        ("a.toml", 'network = "vgg"', r"a\.toml: --network vgg: must be one of"),
        ("a.toml", "lr = -1", r"a\.toml: --lr -1.0: must be greater than 0"),
        ("a.toml", "lr = ", r"a\.toml: cannot be read"),
        ("a.json", "[" * 100_000, r"a\.json: cannot be read"),
        ("a.json", '{"sessions": []}', r"a\.json: is no run's manifest\.json"),
    ],
)
def test_what_is_no_setting_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        resolved("--config", str(tmp_path / name))


def test_print_config_trains_nothing(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--config nowhere\.toml: no such file"):
        train.main(["--config", "nowhere.toml", "--data", str(tiny_set)])
    train.main(["--print-config", "fast", "--network", "lstm", "--data", str(tiny_set), "--lr", "0.5"])
    printed = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(printed)
    assert resolved("--config", "run.toml") == resolved("fast", "--network", "lstm", "--lr", "0.5")
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_a_flag_turns_off_what_a_file_turns_on(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("compile = true\nflip_average = true\n")
    given = resolved("--config", str(tmp_path / "run.toml"), "--no-compile")
    assert not given.compile and given.flip_average
    assert as_arguments({"compile": False, "flip_average": True}) == ["--flip-average", "--no-compile"]


def test_a_file_may_hold_what_only_some_networks_use(tmp_path: Path) -> None:
    """Kept features need frozen convolutions, which a flag can bring; old runs without them can still be read."""
    file = tmp_path / "run.toml"
    file.write_text("cache_features = 2\n")
    assert resolved("--config", str(file), "--network", "lstm").cache_features == 2
    assert resolved("--config", str(file), "--freeze", "conv3").cache_features == 2
    assert resolved("--config", str(file), "--cache-features", "0").cache_features == 0
    with pytest.raises(InputError, match="--cache-features 2: no convolutions are frozen"):
        resolved("--config", str(file))
    before = Config().to_json() | {"cache_features": 2}
    assert Config.from_json(before).cache_features == 2


def test_the_ranks_meet_by_two_settings_alone(tmp_path: Path) -> None:
    """The others may be wrong for the preset that is named before the data is known."""

    def meeting(*argv: str) -> tuple[float, str]:
        return meeting_of(SettingsParser(prog="train.py", description="").parse(argv))

    file = tmp_path / "run.toml"
    file.write_text('timeout = 7\nnetwork = "lstm"\nepochs = 0\naverage_last = 2\n')
    assert meeting("--config", str(file)) == (7.0, Config.device)
    assert meeting("--config", str(file), "--timeout", "9", "--device", "cpu") == (9.0, "cpu")
    with pytest.raises(InputError, match=r"^--timeout -1\.0: must be greater than 0"):
        meeting("--config", str(file), "--timeout", "-1")
    file.write_text("timeout = -1")
    with pytest.raises(InputError, match=r"run\.toml: --timeout -1\.0: must be greater than 0"):
        meeting("--config", str(file))
