"""How fast is a whole training step, where does its time go, and how close is it to its limit?

    python -m benchmarks.step [--quick] [--data SET]

For both networks in both phases, these take turns: steps of an epoch as train.py makes them, on a GPU with the set in
its memory and as a CUDA graph where train.py does so; the same steps on one resident batch, which is the limit; with
frozen convolutions, steps on their kept outputs; the network written plainly (a DataLoader over PIL images, NCHW,
float32, an nn.LSTM per group, gradients for all parameters); and for the baseline the steps of torchvision's and timm's
training scripts. Then it says where the time of an epoch's step goes, from a trace of torch.profiler, and measures weak
scaling over ranks with train.py itself.
On a GPU it says what a step asks of the host, plain, compiled and as a CUDA graph; on softgpu that is all it can say:

    python -m softgpu --operators null --triton null -m benchmarks.step
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Laps, Table
from benchmarks.host import host_costs
from benchmarks.phase import OneBatch, at_phase
from benchmarks.pipeline import QUEUED, Source, loader, pil_dataset
from benchmarks.plain import difference, plain, plain_step
from benchmarks.step_peers import Peer, Step, peers
from benchmarks.trace import Trace, shares_of, traced
from fastnet import train
from fastnet.cli import run_command
from fastnet.config import Config, paper
from fastnet.data.default import default_set
from fastnet.data.holdout import divide
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.launch import launch_command
from fastnet.distributed.ranks import Runtime, single_process
from fastnet.errors import InputError
from fastnet.input.device import DeviceTrainStream
from fastnet.input.spec import PREFETCH, InputSpec, resolve_decode
from fastnet.input.streams import Batch, TrainStream
from fastnet.network.network import Network
from fastnet.training.features import FeatureTrainStream, FrozenFeatures
from fastnet.training.trainer import Trainer

EPOCH, LIMIT, PLAIN = "fastnet, epoch", "fastnet, resident batch", "plainly written"
KEPT, KEPT_BATCHES = "fastnet, kept features", 16
KEYS = ("set", "network", "phase", "image_size", "batch", "threads", "device", "quantity")


class Steps:
    """A candidate that measures `count` steps, whose batches need no queue."""

    refill = 0.0  # seconds

    def __init__(self, step: Callable[[], None], count: int) -> None:
        self.step, self.count = step, count

    def prepare(self) -> None:
        """What comes ahead of the steps and is not measured."""

    def __call__(self, laps: Laps) -> None:
        self.prepare()
        laps("prepared")
        for _ in range(self.count):
            self.step()
        laps("steps")
        time.sleep(self.refill)


class FedSteps(Steps):
    """Steps that take batches from a queue, which starts as a long run would have it: full if batches are made faster
    than steps use them, otherwise empty.

    take: gives the next of the batches, of which `prepared` are made ahead, by `workers` at the same time.
    alone: a step on a batch at hand.
    """

    def __init__(
        self,
        step: Callable[[], None],
        count: int,
        *,
        take: Callable[[], Any],
        prepared: int,
        workers: int,
        alone: Callable[[], None],
        device: torch.device,
    ) -> None:
        super().__init__(step, count)
        batch = seconds_each(take, prepared, device)
        time.sleep(1.5 * prepared * batch)  # or batches would still be made during the steps alone
        self.take, self.emptied = take, 0
        if batch > seconds_each(alone, 2, device):
            # Workers that start together finish together, so only whole rounds of them are a fair measure.
            self.emptied, self.count = prepared, workers * -(-max(count, prepared) // workers)
        self.refill = 1.5 * max(prepared, self.count) * batch

    def prepare(self) -> None:
        for _ in range(self.emptied):
            self.take()
        self.step()  # the workers are busy, as they are in a long run


def seconds_each(call: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds per call, over `count` calls after as many that are not measured."""
    for _ in range(count):
        call()
    laps = Laps(device)
    for _ in range(count):
        call()
    laps("calls")
    return laps.milliseconds()["calls"] / count / 1e3


def measure(
    table: Table, data: PreparedSet, source: Source, case: dict[str, Any], runtime: Runtime, *, seconds: float
) -> None:
    """One network in one phase: epoch, limit and, if everything trains, written plainly."""
    size, batch, threads = case["image_size"], case["batch"], case["threads"]
    print(f"{case['network']}, phase {case['phase']}, {size} px, batch {batch}, {threads} threads")
    sizes = {"image_size": size, "batch_size": batch, "threads": threads}
    config = replace(paper(case["network"]), **sizes, weights="none", head_epochs=1, plateau=0)
    steps, phase = 2, case["phase"]
    with contextlib.ExitStack() as stack:
        trainer = stack.enter_context(at_phase(config, phase, data, runtime))
        kept = one_batch(config, data, runtime)
        limit = stack.enter_context(at_phase(config, phase, data, runtime, kept))
        written = plain(trainer.network, config)
        problem = difference(trainer.network, written, kept.batch.x, runtime)
        if problem:
            table.note(case, EPOCH, problem)
            return
        stream: Any = trainer.inputs.images
        fed = partial(FedSteps, count=steps, device=runtime.device)
        epoch = Steps(trainer.train_step, steps)
        if not isinstance(stream, DeviceTrainStream):
            epoch = fed(
                trainer.train_step,
                take=lambda: next(stream),
                prepared=PREFETCH,
                workers=1,
                alone=limit.train_step,
            )
        ready = {EPOCH: epoch, LIMIT: Steps(limit.train_step, steps)}
        trainers = {EPOCH: trainer, LIMIT: limit}
        if phase == "head":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
            features = KeptFeatures(config, data, runtime, folder, threads)
            trainers[KEPT] = stack.enter_context(at_phase(config, phase, data, runtime, features))
            ready[KEPT] = Steps(trainers[KEPT].train_step, steps)
        others: dict[str, Peer] = {}
        if phase == "full":
            optimizer = torch.optim.SGD(written.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
            others[PLAIN] = Peer(lambda *_: partial(plain_step, written, optimizer), pil_dataset)
        if phase == "full" and case["network"] == "baseline":
            others |= peers()
        for name, peer in others.items():
            images = loader(
                source,
                size,
                threads,
                runtime.device,
                make=peer.make,
                collate=peer.collate,
                arrive=peer.arrive,
                labels=True,
            )
            try:
                take = stack.enter_context(images)
            except InputError as error:
                table.note(case, name, str(error))
                continue
            step = peer.step(len(data.classes), runtime.device)
            ready[name] = fed(
                partial(_take_step, step, take),
                take=take,
                prepared=QUEUED * threads + peer.ahead,
                workers=threads,
                alone=partial(step, *take()),
            )
        # A replayed graph allocates nothing: of a trainer, it is its plain step's.
        allocating: dict[str, harness.Candidate] = ready | {
            name: plain_steps(one) for name, one in trainers.items()
        }
        memory = {name: harness.peak_mb(run, runtime.device) for name, run in allocating.items()}
        times = harness.alternate(ready, runtime.device, seconds=seconds, least=2 if table.quick else 10)
        for name, laps in times.items():
            rates = ready[name].count * batch * 1e3 / np.array(laps["steps"])
            table.add(case, name, "step", "images/s", rates, peak_mb=memory[name])
        if runtime.device.type == "cuda":  # a replayed graph runs nothing under the ranges
            trainer = stack.enter_context(at_phase(replace(config, cuda_graph="off"), phase, data, runtime))
        ready[EPOCH].prepare()
        trace = Trace(traced(trainer.train_step, steps, runtime.device))
        for name, share in shares_of(trace).items():
            table.add(case, EPOCH, f"share {name}", "of a step", [share])


def plain_steps(trainer: Trainer) -> harness.Candidate:
    """A step that is not replayed from a graph."""

    def run(_: Laps) -> None:
        assert trainer.running
        trainer.running.plain()

    return run


def one_batch(config: Config, data: PreparedSet, runtime: Runtime) -> OneBatch:
    """The first batch of an epoch, over and over."""
    decode = resolve_decode("auto", runtime.device)
    spec = InputSpec.of(config, runtime.device, runtime.image_dtype, decode, config.threads)
    stream = TrainStream(data.splits["train"], spec, config.augment, batch_size=config.batch_size, seed=0)
    with contextlib.closing(stream):
        x, y, index = next(stream)
        return OneBatch(Batch(x.clone(memory_format=torch.preserve_format), y.clone(), index), 10**6)


class KeptFeatures(FeatureTrainStream):
    """Batches of what the frozen convolutions of `config` give for `KEPT_BATCHES` batches of images.

    They are kept in `folder` and read through the page cache, as those of a whole set are where memory holds them.
    """

    def __init__(
        self, config: Config, data: PreparedSet, runtime: Runtime, folder: Path, threads: int
    ) -> None:
        images = np.arange(min(KEPT_BATCHES * config.batch_size, len(data.splits["train"])))
        division = replace(divide(data, 0.0), train_images=images, val_images=images[:1])
        network = Network(config, len(data.classes)).to(runtime.device)
        network.freeze(config.head_freeze)
        config = replace(config, cache_features=1)
        features = FrozenFeatures(config, data, division, network, runtime, epochs=[0])
        features.folder = folder
        features.prepare(threads)
        self.steps_per_epoch = len(images) // config.batch_size
        super().__init__(features, runtime.dtype, epoch=0, step=0)


def _take_step(step: Step, batches: Callable[[], Any]) -> None:
    step(*batches())


def paces(table: Table) -> None:
    """How many times as fast a frozen phase is as full training, and kept features as computed ones, by the medians."""
    pace = {
        (row["network"], row["image_size"], row["phase"], row["provider"]): (float(row["p50"]), row)
        for row in table.rows
        if row["quantity"] == "step"
    }
    frozen, kept, full = ("head", EPOCH), ("head", KEPT), ("full", EPOCH)
    ratios = {
        "frozen over full": (frozen, full),
        "kept over full": (kept, full),
        "kept over frozen": (kept, frozen),
    }
    for network, size in dict.fromkeys(key[:2] for key in pace):
        for name, (one, other) in ratios.items():
            fast, slow = pace.get((network, size, *one)), pace.get((network, size, *other))
            if fast and slow:
                rate, row = fast
                case = {key: row[key] for key in KEYS if key != "quantity"}
                table.add(case, row["provider"], name, "times", [rate / slow[0]])


def scaling(table: Table, data: PreparedSet, *, quick: bool, threads: int) -> None:
    """Weak scaling: images/s of train.py with the same number of images a rank, on the CPU with one thread a rank."""
    cuda = torch.cuda.is_available()
    most = torch.cuda.device_count() if cuda else threads
    counts = [n for n in (1, 2, 4, 8) if n <= most]
    steps = 6 if quick else 20
    size, share = (224, 256) if cuda else (64, 32)
    # The steps lie in one epoch, however many ranks there are.
    share = min(share, len(data.splits["train"]) // (steps * counts[-1]))
    if share < 2:
        print(f"weak scaling: not run: {counts[-1]} ranks need more than {len(data.splits['train'])} images")
        return
    rates: dict[int, list[float]] = {n: [] for n in counts}
    print(f"weak scaling: lstm, {size} px, {share} images a rank")
    for _ in range(1 if quick else 2):
        for n in counts:
            rates[n].append(trained_rate(data, n, size, share, steps=steps))
    device = "cuda" if cuda else "cpu"
    case = {
        "set": data.hash[:12],
        "network": "lstm",
        "phase": "full",
        "image_size": size,
        "batch": share,
        "threads": 1,
        "device": device,
    }
    for n, values in rates.items():
        kept = np.median(values) / n / np.median(rates[1])  # of one rank's pace
        table.add(
            {**case, "ranks": n},
            f"train.py, {n} ranks",
            "weak scaling",
            "images/s",
            values,
            ratio=f"{kept:.3f}",
        )


def trained_rate(data: PreparedSet, ranks: int, size: int, share: int, *, steps: int) -> float:
    """Images/s of a real run by its median step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = ["sample", "--network", "lstm", "--head-epochs", 0, "--data", data.path, "--run-dir", run]
        flags += ["--image-size", size, "--batch-size", share * ranks, "--max-steps", steps]
        flags += [] if torch.cuda.is_available() else ["--threads", 1]
        command = launch_command(Path(train.__file__), flags, ranks=ranks)
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    return share * ranks * 1e3 / lines[-1]["step_ms_p50"]


def cases(runtime: Runtime, *, quick: bool) -> Iterator[tuple[str, str, int, int]]:
    """(network, phase, image size, batch)."""
    cuda = runtime.device.type == "cuda"
    sizes = {64: 512, 224: 256} if cuda else {64: 64, 224: 64}
    if quick:
        sizes = {224: 256} if cuda else {64: 16}
    for size, batch in sizes.items():
        for network in ("baseline", "lstm"):
            for phase in ("head", "full"):
                yield network, phase, size, batch


def main(argv: Sequence[str]) -> None:
    parser = harness.parser("step", __doc__)
    parser.add_argument("--data", type=Path, metavar="SET", help="prepared set; default: as the README says")
    args = parser.parse_args(argv)
    runtime = single_process()
    data = default_set(args.data)
    torch.set_num_threads(args.threads)
    if harness.on_softgpu():
        table = Table("step-softgpu", quick=args.quick)
        host_costs(table, data, runtime.device, quick=args.quick, threads=args.threads)
        table.write()
        return
    table = Table("step", quick=args.quick)
    with tempfile.TemporaryDirectory() as folder:
        source = Source(data.splits["train"], Path(folder), batch=0)  # each case's own
        for network, phase, size, batch in cases(runtime, quick=args.quick):
            case = {"set": data.hash[:12], "network": network, "phase": phase, "image_size": size}
            case |= {"batch": batch, "threads": args.threads, "device": runtime.device.type}
            source.batch = batch
            measure(table, data, source, case, runtime, seconds=2 if args.quick else 40)
            if args.quick:  # what ends it at a limit leaves the cases before
                table.write()
    paces(table)
    if runtime.device.type == "cuda":
        host_costs(table, data, runtime.device, quick=args.quick, threads=args.threads)
    if args.quick:
        table.write()
    scaling(table, data, quick=args.quick, threads=args.threads)
    harness.mark_ratios(table.rows, LIMIT, KEYS)
    table.write()


if __name__ == "__main__":
    run_command(main)
