"""Configuration, command line and the plan of phases."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastnet.cli import SettingsParser, as_arguments
from fastnet.config import NETWORKS, PRESETS, Augment, Config, choose_preset, with_flags
from fastnet.errors import InputError

# The command line is an interface: scripts rely on these flags.
FLAGS = """
--accumulate --apex --augment --average-last --backend --batch-size --cache-features
--checkpoint-every --clip-grad --compile --cuda-graph --cutmix --decode --depth --deterministic
--device --ema --epochs --erase --eval-crop --flip --flip-average --freeze --head-epochs
--head-freeze --head-lr --head-optimizer --holdout --image-size --label-smoothing --layer-decay
--log-every --lr --max-steps --min-crop --mixup --momentum --network --optimizer --plateau
--plateau-delta --precision --profile-steps --seed --seq-len --stages --start-size --stem
--threads --timeout --warmup --weight-decay --weights --weights-partial
"""


def parsed(*argv: str, preset: str = "paper") -> Config:
    given = SettingsParser(prog="train.py", description="").parse(argv)
    return with_flags(PRESETS[preset](given.get("network", "baseline")), given)


def test_flags_are_what_scripts_rely_on() -> None:
    parser = SettingsParser(prog="train.py", description="")
    assert sorted(action.option_strings[0] for action, _, _ in parser.settings) == FLAGS.split()


def test_every_field_is_reached_by_its_flag() -> None:
    values = {"bool": ([], True), "int": (["8"], 8), "float": (["0.375"], 0.375)}
    extra = {"cache_features": ["--freeze", "conv2"]}
    for owner in (Config, Augment):
        for field in dataclasses.fields(owner):
            kind = str(field.type)
            if kind not in values or field.name == "depth":
                continue
            flag = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
            words, value = values[kind]
            if field.name in ("image_size", "start_size"):
                words, value = ["96"], 96
            config = parsed(flag, *words, *extra.get(field.name, []))
            assert (
                getattr(config if owner is Config else config.augment, field.name) == value != field.default
            )


def test_presets() -> None:
    paper = PRESETS["paper"]("lstm")
    assert (paper.image_size, paper.weights, paper.seq_len) == (224, "imagenet", 64)
    assert (choose_preset(None, "zip"), choose_preset(None, "sample")) == ("paper", "sample")
    assert choose_preset("fast", "sample") == "fast"


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_linear_layer_trains_as_the_lstms_that_it_is_compared_with(preset: str) -> None:
    of_lstms = dataclasses.replace(PRESETS[preset]("lstm"), network="linear")
    assert PRESETS[preset]("linear") == of_lstms and of_lstms.head_epochs > 0
    # It has no sequences whose length could fail to divide the channels.
    assert dataclasses.replace(of_lstms, seq_len=100).read_stages == ("conv4", "conv5")


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("network", NETWORKS)
def test_config_survives_json(preset: str, network: str) -> None:
    config = PRESETS[preset](network)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image-size", "100"], r"--image-size 100: must be a multiple of 32, such as 96 or 128"),
        (["--image-size", "10"], r"--image-size 10: must lie between 32 and 4096"),
        (["--batch-size", "0"], r"--batch-size 0: must be at least 1"),
        (["--batch-size", "many"], r"--batch-size: invalid int value: 'many'"),
        (["--lr", "nan"], r"--lr nan: must be a finite number"),
        (["--lr", "0"], r"--lr 0.0: must be greater than 0"),
        (["--head-lr", "1e39"], r"--head-lr 1e\+39: must lie between 0 and 1e\+38"),
        (["--flip", "1.5"], r"--flip 1.5: must lie between 0 and 1"),
        (["--network", "vgg"], r"--network: invalid choice: 'vgg'"),
        (["--stages", "conv6"], r"--stages conv6: name some of conv2, conv3, conv4, conv5"),
        (["--stages", "conv5,conv5"], r"--stages conv5,conv5: .* each at most once"),
        (["--network", "lstm", "--seq-len", "100"], r"--seq-len 100: must divide the 256 channels of conv4"),
        (["--profile-steps", "7:5"], r"--profile-steps 7:5: give A:B with A below B"),
        (["--profile-steps", "7"], r"--profile-steps 7: give A:B with A below B"),
        (["--epochs", "0"], r"--epochs 0 with --head-epochs 0: nothing to train"),
        (["--image-size", "3200000"], r"--image-size 3200000: must lie between 32 and 4096"),
        (["--threads", "100000"], r"--threads 100000: must lie between 0 and 1024"),
        (["--warmup", "1e308"], r"--warmup 1e\+308: must lie between 0 and 10000"),
        (["--timeout", "1e308"], r"--timeout 1e\+308: must lie between 0 and 10000000"),
        (["--epochs", "9" * 400], r"--epochs 99999999999999999999...: must be at most 1,000,000,000,000"),
        (["--start-size", "48"], r"--start-size 48: must be a multiple of 32, at most --image-size 224"),
        (["--start-size", "256"], r"--start-size 256: must be a multiple of 32, at most --image-size 224"),
        (
            ["--start-size", "64", "--network", "lstm"],
            r"--start-size 64: the LSTMs' size is that of the images",
        ),
        (["--start-size", "64", "--epochs", "1"], r"--start-size 64: .* over --epochs, at least 2 and not 1"),
        (
            ["--start-size", "64", "--cache-features", "1", "--freeze", "conv2"],
            r"--start-size 64: kept features are of one size; leave out --cache-features or --freeze",
        ),
        (["--cache-features", "2"], r"--cache-features 2: no convolutions are frozen, so all change"),
        (["--average-last", "2", "--ema", "0.9"], r"--average-last 2 with --ema 0.9: two averages"),
        (["--average-last", "16"], r"--average-last 16: the last phase has 15 epochs; use at most that"),
        (
            ["--average-last", "1", "--epochs", "0", "--head-epochs", "2", "--plateau", "1"],
            r"--average-last 1: where --plateau ends the run, nobody knows its last epochs",
        ),
        (["large"], r"large: no such preset; name one of paper, sample, fast"),
        (["--batchsize", "3"], r"unrecognized arguments: --batchsize"),
    ],
)
def test_wrong_values_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parsed(*argv)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (
            ["--help"],
            {"--network": "baseline", "--lr": "0.02", "--image-size": "224", "--stages": "conv4,conv5"},
        ),
        (["sample", "--help"], {"--network": "baseline", "--lr": "0.02", "--head-epochs": "0"}),
        (["-h", "--network", "lstm", "sample"], {"--network": "lstm", "--lr": "0.02", "--head-epochs": "3"}),
        (["--help", "--network", "linear"], {"--network": "linear", "--head-epochs": "20", "--plateau": "3"}),
        (["fast", "--help"], {"--batch-size": "512", "--image-size": "128", "--layer-decay": "0.7"}),
    ],
    ids=["nothing named", "a preset", "preset and network", "a network", "fast"],
)
def test_help_shows_one_default_a_flag(
    argv: list[str], shown: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        SettingsParser(prog="train.py", description="").parse(argv)
    text, defaults, _ = " ".join(capsys.readouterr().out.split()).partition("Defaults shown")
    assert ended.value.code == 0 and defaults
    for flag, value in shown.items():
        described = text[text.rindex(f" {flag} ") :]
        assert described.split("(default: ")[1].split(")")[0] == value, flag


def test_settings_survive_the_command_line() -> None:
    flags = {
        "stages": ("conv3", "conv5"),
        "lr": 0.5,
        "apex": True,
        "flip": 0.25,
        "network": "lstm",
        "preset": None,
    }
    assert as_arguments(flags) == (
        ["--network", "lstm", "--stages", "conv3,conv5", "--lr", "0.5", "--apex", "--flip", "0.25"]
    )
    assert parsed(*as_arguments(flags)) == with_flags(PRESETS["paper"]("lstm"), flags)


def test_the_order_of_stages_makes_no_other_network() -> None:
    assert parsed("--stages", "conv5,conv4") == parsed("--stages", "conv4,conv5")
