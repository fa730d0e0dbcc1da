"""torchrun's command line: the flags of train.py stand behind the script and are never taken for torchrun's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from fastnet import train
from fastnet.distributed.launch import launch_command
from fastnet.errors import InputError
from tests.support.paths import SCRIPT


def flags_of_train(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Every long flag that `train.py --help` names."""
    with pytest.raises(SystemExit):
        train.main(["--help"])
    found = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out)))
    assert {"--network", "--batch-size", "--data", "--run-dir", "--json"} <= set(found)
    return found


def test_torchrun_leaves_the_scripts_flags_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """argparse looks for options behind the script too: `--run` would be an abbreviation of `--run-path`."""
    for flag in flags_of_train(capsys):
        for words in ([flag, "x"], [f"{flag}=x"]):
            for script in (["fastnet/train.py"], ["-m", "fastnet.train"]):
                given = ["--nproc_per_node=8", *script, "paper", *words]
                assert get_args_parser().parse_args(given).training_script_args == ["paper", *words], flag


@pytest.mark.parametrize("words", [["--run", "runs/lstm"], ["--run=runs/lstm"]])
def test_the_old_name_of_run_dir_is_refused(words: list[str]) -> None:
    with pytest.raises(
        InputError, match="--run: this flag is now called --run-dir; give --run-dir runs/lstm"
    ):
        train.main(["sample", *words])


@pytest.mark.parametrize(
    ("ranks", "options", "torchrun"),
    [
        (1, [], []),
        (2, [], ["--standalone", "--nproc-per-node=2"]),
        (1, ["--nnodes=2"], ["--nnodes=2", "--nproc-per-node=1"]),
    ],
)
def test_the_command_line(ranks: int, options: list[str], torchrun: list[str]) -> None:
    arguments = ["--run-dir", Path("a b"), "--seed", 3]
    line = launch_command(SCRIPT, arguments, ranks=ranks, options=options)
    if torchrun:
        torchrun = ["-m", "torch.distributed.run", *torchrun, "--shutdown-timeout=120"]
    assert line == [sys.executable, *torchrun, str(SCRIPT), "--run-dir", "a b", "--seed", "3"]
