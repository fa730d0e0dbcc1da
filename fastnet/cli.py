"""What every command shares: flags from dataclasses, one-line errors, exit codes, --json and --debug.

Exit codes: 0 done, 2 bad input, 1 anything else, such as a result that says it is not ok.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import fastnet
from fastnet.config import PRESETS, Augment, Config, as_text, flag_name
from fastnet.errors import InputError, LostError, MemoryFullError, printable, told


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the flags that every command has."""

    def __init__(self, *, prog: str, description: str, add_help: bool = True) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_Formatter,
            add_help=add_help,
        )
        common = self.add_argument_group("output")
        common.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")
        common.add_argument("--version", action="version", version=f"fastnet {fastnet.__version__}")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


class SettingsParser(Parser):
    """A parser with a preset and a flag for every field of `Config`, for train and paper.

    `--help` shows the values of the preset and the network that are named beside it. A flag that is not given is
    absent from the result, so the preset's value holds.
    """

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, add_help=False)
        self.add_argument("-h", "--help", action="store_true", help="show this text")
        self.add_argument(
            "preset",
            nargs="?",
            metavar="PRESET",
            help="the settings that no flag gives: paper (ResNet-18 from ImageNet weights at 224 px), fast (128 px, "
            "fewer epochs, and what helps by docs/recipe.md) or sample (64 px from random weights, minutes on a CPU); "
            "default: sample for the generated sample set, else paper",
        )
        self.add_argument(
            "--config",
            metavar="FILE",
            type=Path,
            help="settings from a TOML file, or from another run's manifest.json; flags override them",
        )
        self.add_argument(
            "--data",
            metavar="SET",
            type=Path,
            help="prepared set; default: $FASTNET_DATA, else data/tiny-imagenet, else the generated sample set",
        )
        self.settings: list[tuple[argparse.Action, type, str]] = []
        groups: dict[str, Any] = {}
        for owner in (Config, Augment):
            types = get_type_hints(owner)
            for item in dataclasses.fields(owner):
                if item.name == "augment":
                    continue
                group = item.metadata["group"]
                if group not in groups:
                    groups[group] = self.add_argument_group(group)
                action = groups[group].add_argument(flag_name(item), **_options(item, types[item.name]))
                self.settings.append((action, owner, item.metadata["help"]))

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """The arguments by name. With --help it prints the help and exits."""
        given = vars(self.parse_args(argv))
        # Checked here and not by argparse, which takes the value of a misspelt flag for a wrong preset.
        if given["preset"] not in (None, *PRESETS):
            raise InputError(f"{given['preset']}: no such preset; name one of {', '.join(PRESETS)}")
        if given.pop("help"):
            preset, network = given["preset"] or "paper", given.get("network", "baseline")
            config = PRESETS[preset](network)
            for action, owner, text in self.settings:
                value = getattr(config if owner is Config else config.augment, action.dest)
                action.help = f"{text} (default: {as_text(value)})"
            self.epilog = (
                f"Defaults shown: preset {preset}, network {network}. Name another preset or --network beside --help "
                "to see its defaults."
            )
            self.print_help()
            sys.exit(0)
        return given


def _options(item: dataclasses.Field, kind: type) -> dict[str, Any]:
    """The arguments of `add_argument` for a field."""
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": item.name}
    if kind is bool:
        return {**options, "action": argparse.BooleanOptionalAction}
    if "choices" in item.metadata:
        return {**options, "type": int if kind is int else str, "choices": item.metadata["choices"]}
    if kind in (int, float, str):
        return {**options, "type": kind, "metavar": {int: "N", float: "X", str: "WHAT"}[kind]}
    if int in get_args(kind):
        return {**options, "type": _number_or_word, "metavar": "N"}
    return {**options, "type": _comma_list, "metavar": "LIST"}


def _number_or_word(text: str) -> int | str:
    """What a field that takes both is given; `Config` knows the words."""
    try:
        return int(text)
    except ValueError:
        return text


def _comma_list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def as_arguments(flags: dict[str, Any]) -> list[str]:
    """The command line that gives those of `flags` that are fields of `Config`."""
    words: list[str] = []
    for owner in (Config, Augment):
        for item in dataclasses.fields(owner):
            value = flags.get(item.name)
            if isinstance(value, bool):
                words.append(flag_name(item) if value else flag_name(item).replace("--", "--no-", 1))
            elif value is not None and item.name != "augment":
                words += [flag_name(item), as_text(value)]
    return words


def directory(text: str) -> Path:
    """An argparse type: the path of a directory. An empty one would mean the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a path")
    return Path(text)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run_command(main: Callable[[Sequence[str]], dict[str, Any] | None]) -> NoReturn:
    """Runs `main(argv)` as a command and exits with the project's codes.

    `main` returns the command's result; with --json it is printed as the last line. An `InputError` is
    one line on stderr and exit code 2, and so is an OSError that `errors.told` makes one of.
    """
    argv = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name of a file need not be text
    try:
        result = main(argv)
        if "--json" in argv and is_main_rank():
            print(json.dumps(result))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has gone, as `head` does; what is left of it would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except MemoryFullError as error:
        fail(error, debug="--debug" in argv, say=not error.told)
    except InputError as error:
        fail(error, debug="--debug" in argv)
    except LostError as error:
        if "--debug" in argv:
            traceback.print_exc()
        sys.exit(f"error: {error}")
    except OSError as error:
        line = told(error, "the output directory")
        if line is None:
            raise
        fail(line, debug="--debug" in argv)
    sys.exit(1 if result is not None and not result.get("ok", True) else 0)


def fail(error: InputError, *, debug: bool, say: bool = True) -> NoReturn:
    """Prints one line on stderr (after the traceback with `debug`) and exits with code 2.

    `say`: whether this rank prints the line, if it is one of those in `error.told_by`.
    """
    if debug:
        traceback.print_exc()
    first = {"run": is_main_rank(), "host": os.environ.get("LOCAL_RANK", "0") == "0", "rank": True}
    if say and first[error.told_by]:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
    sys.exit(2)


def is_main_rank() -> bool:
    """Ranks share their results, so rank 0 prints them for all."""
    return os.environ.get("RANK", "0") == "0"
