"""Feeds mutated inputs to every reader of data, each in a process of its own: python -m tests.trials.fuzz

An input is right if it is used, or refused by an InputError, within limits of time and memory. Everything else counts
as a failure: another exception, a crash, a process that does not end, and memory beyond the limit. Inputs follow from
the seed, so a failure is found again by its reader and number:

    python -m tests.trials.fuzz --reader jpeg --first 17 --count 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import write_result
from fastnet.cli import SettingsParser
from fastnet.config import Augment
from fastnet.data.prepared import open_set
from fastnet.data.preparing import prepare
from fastnet.data.sources import find_source
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.inference.runs import load_run
from fastnet.input.spec import InputSpec
from fastnet.input.streams import TrainStream
from fastnet.network.network import Network
from fastnet.network.weights import load_backbone
from fastnet.reporting.curves import read_curves
from fastnet.runs import summarise
from fastnet.settings import settings_of
from fastnet.training.manifest import read_manifest
from tests.support import hostile, hostile_runs

SECONDS = 10  # of processor time, which does not depend on what else the machine does
PATIENCE = 300.0  # seconds without an answer after which a process waits for something that will not come
MEMORY = 2 << 30  # bytes beyond what the process holds when it starts
OUTCOMES = ("used", "refused", "exception", "crash", "hang", "memory")


class Reader(NamedTuple):
    """What is fuzzed: makes the input of a number in an empty folder, and reads it as a command would."""

    make: Callable[[random.Random, Path], Path]
    read: Callable[[Path], object]


def read_source(path: Path) -> None:
    """Prepares a set and reads a batch of it."""
    read_set(prepare(find_source(path), path.parent / "out")[0].path)


def read_set(path: Path, decode: str = "cpu") -> None:
    """Opens a set, and reads its names and two batches of its training split."""
    opened = open_set(path)
    for split in opened.splits.values():
        json.dumps(split.names)
    train = opened.splits["train"]
    spec = InputSpec(32, torch.device("cpu"), torch.float32, decode, 1)
    stream = TrainStream(train, spec, Augment(), batch_size=min(8, len(train)), seed=0)
    next(stream)
    next(stream)
    stream.close()


def read_raw(path: Path) -> None:
    """Reads a set by its decoded images."""
    read_set(path, "raw")


def read_run(path: Path) -> None:
    """Loads the network of a run."""
    load_run(path, Runtime(torch.device("cpu")))


def read_weights(path: Path) -> None:
    load_backbone(Network(hostile_runs.config(), 3), 18, str(path))


def read_records(path: Path) -> None:
    """Reads what figures, runs and a continued run read."""
    summarise(path)
    read_curves(path, "run")
    json.dumps(read_manifest(path).sessions)


def read_settings(path: Path) -> None:
    settings_of(SettingsParser(prog="train.py", description="").parse(["--config", str(path)]), "zip")


READERS: dict[str, Reader] = {
    "jpeg": Reader(hostile.jpeg_folder, read_source),
    "png": Reader(hostile.png_folder, read_source),
    "zip": Reader(hostile.official_zip, read_source),
    "parquet": Reader(hostile.parquet, read_source),
    "text": Reader(hostile.official_texts, read_source),
    "arrow": Reader(hostile.prepared_arrow, read_set),
    "set.json": Reader(hostile.prepared_json, read_set),
    "raw": Reader(hostile.prepared_raw, read_raw),
    "checkpoint": Reader(hostile_runs.checkpoint, read_run),
    "weights": Reader(hostile_runs.weights, read_weights),
    "safetensors": Reader(hostile_runs.safetensors, read_weights),
    "records": Reader(hostile_runs.records, read_records),
    "settings": Reader(hostile_runs.settings, read_settings),
}


def outcome(reader: Reader, seed: int, folder: Path) -> tuple[str, str]:
    """What became of one input, and in what words. `folder` is empty before and may hold anything after."""
    path = reader.make(random.Random(seed), folder)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(reader, path, send)
    os.close(send)
    words, ended = b"", False
    while select.select([receive], [], [], PATIENCE)[0]:
        block = os.read(receive, 1 << 16)
        if not block:
            ended = True
            break
        words += block
    if not ended:
        os.kill(child, signal.SIGKILL)
    os.close(receive)
    _, status = os.waitpid(child, 0)
    if not ended:
        return "hang", ""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "hang", f"more than {SECONDS} s"
    if os.WIFSIGNALED(status):
        return "crash", signal.Signals(os.WTERMSIG(status)).name
    name, _, text = words.decode("utf-8", "replace").partition("\n")
    return (name, text) if name in OUTCOMES else ("crash", f"exit status {status}")


def _child(reader: Reader, path: Path, send: int) -> None:
    """Reads the input and writes what became of it; never returns."""
    try:
        held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            reader.read(path)
            result = "used\n"
        except InputError as error:
            result = f"refused\n{error}"
        except MemoryError:
            result = f"memory\n{traceback.format_exc()}"
        except BaseException:
            result = f"exception\n{traceback.format_exc()}"
        os.write(send, result.encode("utf-8", "backslashreplace")[: 1 << 15])
    finally:
        os._exit(0)


def fuzz(name: str, first: int, count: int, *, say: bool = True) -> tuple[Counter[str], list[str]]:
    """Runs `count` inputs of a reader: how often each outcome came, and the failures in words."""
    counted: Counter[str] = Counter()
    failures = []
    for number in range(first, first + count):
        folder = Path(tempfile.mkdtemp(prefix="fuzz"))
        try:
            result, words = outcome(READERS[name], number, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        counted[result] += 1
        if result not in ("used", "refused"):
            failures.append(f"{name} {number}: {result} {words}")
            if say:
                print(failures[-1], file=sys.stderr, flush=True)
    return counted, failures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.trials.fuzz", description=__doc__)
    parser.add_argument("--reader", choices=READERS, help="only this one; nothing is recorded")
    parser.add_argument("--first", type=int, default=0, help="the first input's number")
    parser.add_argument("--count", type=int, default=700, help="inputs of each reader")
    parser.add_argument(
        "--quick", action="store_true", help="five inputs of each reader; nothing is recorded"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, and would wait for them
    count = 5 if args.quick else args.count
    rows = {}
    failed = 0
    for name in [args.reader] if args.reader else READERS:
        counted, failures = fuzz(name, args.first, count)
        rows[name] = {"inputs": count, **{kind: counted[kind] for kind in OUTCOMES}}
        failed += len(failures)
        print(name, rows[name], flush=True)
    if not args.reader and not args.quick:
        limits = {"seconds": SECONDS, "memory_mb": MEMORY >> 20, "mutations": len(hostile.MUTATIONS)}
        total = count * len(READERS)
        print(write_result("fuzz", {"inputs": total, "failures": failed, "limits": limits, "readers": rows}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
