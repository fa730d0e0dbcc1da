"""Runs a program as if the machine had GPUs: python -m softgpu [OPTION ...] (SCRIPT | -m MODULE) [ARGUMENT ...]"""

from __future__ import annotations

import argparse
import contextlib
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import softgpu


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m softgpu", description="Runs a Python program as if the machine had GPUs."
    )
    parser.add_argument("--devices", type=int, metavar="N", default=1, help="GPUs that it sees")
    parser.add_argument("--memory-mb", type=int, metavar="N", default=81920, help="memory of each")
    parser.add_argument(
        "--capability", type=int, metavar="N", default=80, help="compute capability, 90 for 9.0"
    )
    modes = ("exact", "null")
    parser.add_argument(
        "--operators", choices=modes, default="exact", help="compute torch's operators, or count them"
    )
    parser.add_argument(
        "--triton", choices=modes, default="exact", help="execute Triton kernels, or count them"
    )
    parser.add_argument("--report", action="store_true", help="print what was asked of CUDA at the end")
    parser.add_argument("-m", dest="module", metavar="MODULE", nargs=argparse.REMAINDER, help="run a module")
    parser.add_argument("script", metavar="SCRIPT", nargs=argparse.REMAINDER, help="run a script")
    args = parser.parse_args()
    command = args.module or args.script
    if not command:
        parser.error("name a SCRIPT, or -m MODULE")
    softgpu.install(
        devices=args.devices,
        capability=args.capability,
        memory_mb=args.memory_mb,
        operators=args.operators,
        triton=args.triton,
    )
    sys.argv = command
    with report() if args.report else contextlib.nullcontext():
        if args.module:
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).resolve().parent))
            runpy.run_path(command[0], run_name="__main__")


@contextlib.contextmanager
def report() -> Iterator[None]:
    """Prints to standard error what the program inside asked of CUDA, whether or not it failed."""
    with softgpu.watch() as seen:
        try:
            yield
        finally:
            operators, launches = (
                sum(seen.operators.values()),
                Counter(launch.name for launch in seen.launches),
            )
            print(f"softgpu: {softgpu.counters()}", file=sys.stderr)
            print(f"softgpu: {operators} operators, Triton {dict(launches)}", file=sys.stderr)
            from softgpu import forms  # needs torch

            if forms.unknown:
                print(f"softgpu: strides taken from the CPU: {dict(forms.unknown)}", file=sys.stderr)
            for problem in seen.problems:
                print(f"softgpu: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main()
