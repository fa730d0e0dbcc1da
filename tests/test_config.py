"""Configuration, command line and the plan of phases."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest

from fastnet.cli import Parser
from fastnet.config import PRESETS, Augment, Config, add_flags, from_flags
from fastnet.errors import InputError
from fastnet.training import phases
from fastnet.training.state import TrainState

# The command line is an interface: scripts rely on these flags.
FLAGS = """
--accumulate --apex --augment --backend --batch-size --checkpoint-every --decode --depth --epochs
--erase --eval-crop --flip --head-epochs --head-lr --head-optimizer --image-size --label-smoothing
--log-every --lr --max-steps --min-crop --momentum --network --optimizer --plateau --plateau-delta
--precision --profile-steps --seed --seq-len --stages --threads --timeout --warmup --weight-decay --weights
"""


def parsed(*argv: str, preset: str = "paper") -> Config:
    parser = Parser(prog="train.py", description="")
    add_flags(parser)
    flags = vars(parser.parse_args(argv))
    return from_flags(PRESETS[preset](flags.get("network", "baseline")), flags)


def test_flags_are_what_scripts_rely_on() -> None:
    parser = Parser(prog="train.py", description="")
    before = set(parser._option_string_actions)
    add_flags(parser)
    assert sorted(set(parser._option_string_actions) - before) == FLAGS.split()


def test_every_field_is_reached_by_its_flag() -> None:
    values = {"bool": ([], True), "int": (["8"], 8), "float": (["0.25"], 0.25)}
    for owner in (Config, Augment):
        for field in dataclasses.fields(owner):
            kind = str(field.type)
            if kind not in values or field.name == "depth":
                continue
            flag = field.metadata.get("flag", "--" + field.name.replace("_", "-"))
            words, value = values[kind]
            if field.name == "image_size":
                words, value = ["96"], 96
            config = parsed(flag, *words)
            assert getattr(config if owner is Config else config.augment, field.name) == value


def test_presets() -> None:
    paper = PRESETS["paper"]("lstm")
    assert (paper.image_size, paper.weights, paper.seq_len) == (224, "imagenet", 64)
    assert [phase.name for phase in phases.plan(paper)] == ["head", "full"]
    assert [phase.name for phase in phases.plan(PRESETS["paper"]("baseline"))] == ["full"]


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("network", ["baseline", "lstm"])
def test_config_survives_json(preset: str, network: str) -> None:
    config = PRESETS[preset](network)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image-size", "100"], r"--image-size 100: must be a multiple of 32, such as 96 or 128"),
        (["--image-size", "10"], r"--image-size 10: must be at least 32"),
        (["--batch-size", "0"], r"--batch-size 0: must be at least 1"),
        (["--batch-size", "many"], r"--batch-size: invalid int value: 'many'"),
        (["--lr", "nan"], r"--lr nan: must be a finite number"),
        (["--lr", "0"], r"--lr 0.0: must be greater than 0"),
        (["--flip", "1.5"], r"--flip 1.5: must lie between 0 and 1"),
        (["--network", "vgg"], r"--network: invalid choice: 'vgg'"),
        (["--stages", "conv6"], r"--stages conv6: name some of conv2, conv3, conv4, conv5"),
        (["--stages", "conv5,conv5"], r"--stages conv5,conv5: .* each at most once"),
        (["--network", "lstm", "--seq-len", "100"], r"--seq-len 100: must divide the 256 channels of conv4"),
        (["--profile-steps", "7:5"], r"--profile-steps 7:5: give A:B with A below B"),
        (["--profile-steps", "7"], r"--profile-steps 7: give A:B with A below B"),
        (["--epochs", "0"], r"--epochs 0 with --head-epochs 0: nothing to train"),
        (["--batchsize", "3"], r"unrecognized arguments: --batchsize"),
    ],
)
def test_wrong_values_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parsed(*argv)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    phase = phases.Phase("full", False, 4, "sgd", 0.5, 0, 0.0)
    rates = [phases.learning_rate(phase, step, 10, warmup_epochs=1.0) for step in range(40)]
    assert rates[:10] == pytest.approx([0.5 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == 0.5
    assert rates[25] == pytest.approx(0.25)  # half way between warmup and end
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0 < rates[39] < 0.002


def test_a_plateau_keeps_the_rate_and_ends_the_phase() -> None:
    plan = [
        phases.Phase("head", True, 20, "adamw", 0.1, 2, 0.01),
        phases.Phase("full", False, 2, "sgd", 0.1, 0, 0.0),
    ]
    assert {phases.learning_rate(plan[0], step, 10, 1.0) for step in range(10, 200)} == {0.1}
    position = TrainState()
    for top1 in (0.5, 0.505, 0.52, 0.525):  # better, flat, better, flat
        phases.finish_epoch(plan, position, top1)
        assert position.phase == 0
    phases.finish_epoch(plan, position, 0.52)
    assert (position.phase, position.epoch, position.phase_epoch, position.best_top1) == (1, 5, 0, 0.525)
    phases.finish_epoch(plan, position, 0.1)
    assert not position.done
    phases.finish_epoch(plan, position, 0.1)
    assert position.done
