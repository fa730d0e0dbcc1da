"""What every command shares: one-line errors, exit codes, --json and --debug.

Exit codes: 0 done, 2 bad input, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastnet.errors import InputError, LostError, is_disk_full, refused


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the flags that every command has."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_Formatter,
        )
        common = self.add_argument_group("output")
        common.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def run_command(main: Callable[[Sequence[str]], dict[str, Any] | None]) -> NoReturn:
    """Runs `main(argv)` as a command and exits with the project's codes.

    `main` returns the command's result; with --json it is printed as the last line. An `InputError`
    or a full disk is one line on stderr and exit code 2.
    """
    argv = sys.argv[1:]
    try:
        result = main(argv)
        if "--json" in argv and is_main_rank():
            print(json.dumps(result), flush=True)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except InputError as error:
        fail(str(error), debug="--debug" in argv)
    except LostError as error:
        if "--debug" in argv:
            traceback.print_exc()
        sys.exit(f"error: {error}")
    except OSError as error:
        if not is_disk_full(error):
            raise
        fail(str(refused(error, error.filename or "the output directory")), debug="--debug" in argv)
    sys.exit(0)


def fail(message: str, *, debug: bool) -> NoReturn:
    """Prints one line on stderr (behind the traceback with `debug`) and exits with code 2."""
    if debug:
        traceback.print_exc()
    if is_main_rank():
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def is_main_rank() -> bool:
    """Ranks share their result and their bad input: rank 0 speaks for all."""
    return os.environ.get("RANK", "0") == "0"
