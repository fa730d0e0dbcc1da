"""Checks this machine for training: driver, GPUs, DALI, Triton, ranks, disk, memory; a line for each."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastnet.cli import Parser, directory, run_command
from fastnet.data.default import OFFICIAL
from fastnet.diagnosis import ranks, software, storage
from fastnet.diagnosis.findings import Check, Finding, examine
from fastnet.errors import printable

REINSTALL = "run make setup, or pip install -c constraints.txt in the repository"
DRIVER = "install an NVIDIA driver that fits this PyTorch; a container needs --gpus all"


def checks(data: Path, runs: Path) -> list[Check]:
    """In the order in which what fails would keep the later ones from working."""
    return [
        Check("packages", software.packages, REINSTALL),
        Check("DALI's package", software.dali_package, REINSTALL),
        Check("driver", software.driver, DRIVER),
        Check("CUDA", software.cuda, DRIVER),
        Check("DALI, CPU", late("pixels", "dali_on_cpu"), REINSTALL),
        Check("JPEGs, CPU", late("pixels", "without_dali"), REINSTALL),
        Check(
            "DALI, GPU",
            late("pixels", "dali_on_gpu"),
            "train with --decode cpu or raw; a container needs the video libraries",
        ),
        Check(
            "Triton",
            late("kernels", "compiler"),
            "install gcc and Python's headers, or train with --backend torch",
        ),
        Check(
            "LSTM kernels",
            late("kernels", "lstm"),
            "train with --backend torch, and report it with this output",
        ),
        Check("ranks", ranks.ranks, "look at NCCL_DEBUG=INFO, and at NCCL settings in docs/operations.md"),
        Check(
            "disk for data",
            lambda: storage.disk_for_data(data),
            "free some space, or name another place with --data",
        ),
        Check(
            "disk for runs",
            lambda: storage.disk(runs, "runs", storage.RUNS_GB),
            "free some space, or name another place with --runs",
        ),
        Check("shared memory", storage.shared_memory, "give the container more: --shm-size 1g"),
    ]


def late(module: str, check: str) -> Callable[[], str]:
    """A check of a module of `diagnosis` that is imported when it runs: what it imports may be what is broken."""
    return lambda: getattr(importlib.import_module(f"fastnet.diagnosis.{module}"), check)()


def line(finding: Finding) -> str:
    remedy = f"; what to do: {finding.remedy}" if finding.remedy else ""
    return printable(f"{finding.outcome:8}{finding.name:16}{finding.text}{remedy}")


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.doctor",
        description="Checks this machine for training. Exit code 1 if something fails.",
    )
    given = os.environ.get("FASTNET_DATA") or OFFICIAL
    parser.add_argument("--data", metavar="DIR", type=directory, default=Path(given), help="where data goes")
    parser.add_argument("--runs", metavar="DIR", type=directory, default=Path("runs"), help="where runs go")
    args = parser.parse_args(argv)
    findings = []
    for check in checks(args.data, args.runs):
        findings.append(examine(check))
        print(line(findings[-1]), flush=True)
    healthy = all(finding.outcome != "fails" for finding in findings)
    return {"ok": healthy, "checks": [asdict(finding) for finding in findings], "files": []}


if __name__ == "__main__":
    run_command(main)
