"""The console command: fastnet COMMAND ...; `python -m fastnet COMMAND ...` is the same."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from fastnet import __version__
from fastnet.cli import run_command
from fastnet.errors import InputError

COMMANDS = {
    "prepare": "make a prepared set of Tiny ImageNet or other images",
    "train": "train one network, or continue a stopped run",
    "evaluate": "top-1, top-5 and loss of a run",
    "ensemble": "the average of several runs, and each of them",
    "predict": "classes of unlabelled images",
    "export": "a run's network as a torch.export program, ONNX or safetensors weights",
    "figures": "loss and accuracy over training",
    "report": "one HTML page about runs: results, curves, mistakes, settings",
    "runs": "the runs below a directory, as a table",
    "doctor": "check this machine: driver, GPUs, DALI, Triton, ranks, disk",
    "paper": "all of the paper's experiments",
}
USAGE = "usage: fastnet [--version] COMMAND ...\n\n" + "\n".join(
    f"  {name:10}{text}" for name, text in COMMANDS.items()
)


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(f"{USAGE}\n\nfastnet COMMAND --help describes a command.")
        return None
    if name == "--version":
        print(f"fastnet {__version__}")
        return None
    if name not in COMMANDS:
        raise InputError(f"{name}: no such command; name one of {', '.join(COMMANDS)}")
    return import_module(f"fastnet.{name}").main(argv[1:])


def cli() -> NoReturn:
    run_command(main)


if __name__ == "__main__":
    cli()
