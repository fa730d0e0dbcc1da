"""How fast do training images arrive, compared with other ways to load them?

    python -m benchmarks.pipeline [--quick] [--data SET]

Measures images a second, with random resized crop, flip and normalisation, into batches on the training device, by the
number of CPU threads (worker processes for torch's DataLoader). All providers read the same JPEGs, or the same decoded
images, from the page cache. Other projects' loaders take part where they are installed (benchmarks/peers.sh).
Before a measurement a provider gives up the batches that it prepared meanwhile, so that only steady work counts.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def
from nvidia.dali.tensors import TensorCPU
from nvidia.dali.types import DALIDataType
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from benchmarks import harness, pipeline_peers
from benchmarks.harness import Laps, Table
from benchmarks.pipeline_peers import RATIO, SCALE
from fastnet.cli import run_command
from fastnet.config import Augment
from fastnet.data.default import default_set
from fastnet.data.prepared import Split
from fastnet.errors import InputError
from fastnet.input import host
from fastnet.input.device import train_stream
from fastnet.input.draws import MEAN, STD
from fastnet.input.jpegs import jpeg_decoder, turbojpeg
from fastnet.input.spec import PREFETCH, InputSpec

BASELINE = "DataLoader, PIL"
QUEUED = 2  # batches a worker prepares ahead, as DataLoader does by default
LOADERS = 3  # the most that are open at once
KEYS = ("set", "image_size", "batch", "threads", "device", "quantity")
SIMPLEJPEG = "fastnet, decode cpu, simplejpeg"
LAP = 0.5  # seconds of a measurement, about; slow loaders take longer
PEERS = ("FFCV, JPEG", "FFCV, raw", "SPDL")
Take = Callable[[], Any]  # gives the next batch
Opened = Iterator[Take]
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Source:
    """The training images in the two forms that providers take: a prepared set, and a folder of class folders."""

    def __init__(self, split: Split, folder: Path, batch: int, digest: str = "") -> None:
        self.split, self.folder, self.batch, self.hash = split, folder, batch, digest
        for i, label in enumerate(split.labels):
            path = folder / f"{label:04d}" / f"{i}.JPEG"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(split.jpeg(i).tobytes())


@contextlib.contextmanager
def fastnet(source: Source, size: int, threads: int, device: torch.device, *, decode: str) -> Opened:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    spec = InputSpec(size, device, dtype, decode, threads)
    with contextlib.closing(
        train_stream(source.split, spec, Augment(), batch_size=source.batch, seed=0)
    ) as stream:
        yield lambda: next(stream)


@contextlib.contextmanager
def without_libturbojpeg(source: Source, size: int, threads: int, device: torch.device) -> Opened:
    """`--decode cpu` where the system lacks that library. A stream asks for it only when it is opened."""
    with contextlib.ExitStack() as stack:
        with mock.patch.object(host, "turbojpeg", lambda: False):
            take = stack.enter_context(fastnet(source, size, threads, device, decode="cpu"))
        yield take


@pipeline_def(prefetch_queue_depth=PREFETCH)
def reader_graph(folder: str, size: int, device: torch.device) -> Any:
    """DALI as its own examples use it: a file reader that shuffles, a decoder, a random resized crop."""
    files, labels = fn.readers.file(file_root=folder, random_shuffle=True, name="reader")
    cuda = device.type == "cuda"
    images = fn.decoders.image(files, device="mixed" if cuda else "cpu")
    images = fn.random_resized_crop(images, size=[size, size], random_area=SCALE, random_aspect_ratio=RATIO)
    images = fn.crop_mirror_normalize(
        images,
        mirror=fn.random.coin_flip(),
        mean=list(MEAN),
        std=list(STD),
        dtype=DALIDataType.FLOAT16 if cuda else DALIDataType.FLOAT,
        output_layout="HWC",
    )
    return images, labels


@contextlib.contextmanager
def dali_reader(source: Source, size: int, threads: int, device: torch.device) -> Opened:
    pipe = reader_graph(
        str(source.folder), size, device, batch_size=source.batch, num_threads=threads, device_id=_id(device)
    )
    pipe.build()
    yield lambda: torch.from_dlpack(pipe.run()[0].as_tensor())


@pipeline_def(prefetch_queue_depth=PREFETCH)
def decode_graph(feed: Callable, device: torch.device) -> Any:
    files = fn.external_source(source=feed, dtype=DALIDataType.UINT8, ndim=1, batch=True, no_copy=True)
    return fn.decoders.image(files, device="mixed" if device.type == "cuda" else "cpu")


@contextlib.contextmanager
def decode_only(source: Source, size: int, threads: int, device: torch.device) -> Opened:
    """The limit: DALI's decoder turns JPEGs into pixels, and nothing else happens."""
    at = 0

    def feed() -> list[TensorCPU]:
        nonlocal at
        at += source.batch
        return [TensorCPU(source.split.jpeg(i % len(source.split))) for i in range(at - source.batch, at)]

    pipe = decode_graph(feed, device, batch_size=source.batch, num_threads=threads, device_id=_id(device))
    pipe.build()
    yield pipe.run


def _id(device: torch.device) -> int | None:
    return torch.cuda.current_device() if device.type == "cuda" else None


def augmentation(size: int) -> list[Any]:
    return [v2.RandomResizedCrop(size, scale=SCALE, ratio=RATIO), v2.RandomHorizontalFlip()]


def normalised() -> list[Any]:
    """From uint8 CHW; fastnet's MEAN and STD are of 0..255."""
    return [v2.ToDtype(torch.float32), v2.Normalize(list(MEAN), list(STD))]


class Jpegs(Dataset):
    """Files decoded by torchvision's decode_jpeg into tensors, then transforms v2."""

    def __init__(self, folder: Path, size: int) -> None:
        self.files = ImageFolder(folder).samples
        self.transform = v2.Compose([*augmentation(size), *normalised()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[i]
        return self.transform(decode_jpeg(read_file(path), mode=ImageReadMode.RGB)), label


def pil_dataset(folder: Path, size: int) -> ImageFolder:
    return ImageFolder(folder, v2.Compose([*augmentation(size), v2.PILToTensor(), *normalised()]))


def to_device(batches: Batches, device: torch.device) -> Batches:
    for x, y in batches:
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


@contextlib.contextmanager
def loader(
    source: Source,
    size: int,
    threads: int,
    device: torch.device,
    *,
    make: Callable[[Path, int], Dataset],
    collate: Callable | None = None,
    arrive: Callable[[Batches, torch.device], Batches] = to_device,
    labels: bool = False,
) -> Opened:
    """torch's DataLoader with `threads` worker processes. It draws without end, so there is no gap between epochs.

    `arrive` brings its batches to the device.
    """
    images: Any = make(source.folder, size)
    # Float32 images travel through shared memory; a worker that finds none left is killed by a signal.
    needed = LOADERS * QUEUED * threads * source.batch * 12 * size**2
    there = shutil.disk_usage("/dev/shm").total
    if needed > there:
        raise InputError(
            f"cannot run: {LOADERS} loaders with {threads} workers each need {needed / 2**30:.1f} GiB of /dev/shm, "
            f"which has {there / 2**30:.1f}; give the container more with --shm-size, or use fewer --threads"
        )
    batches = DataLoader(
        images,
        source.batch,
        sampler=RandomSampler(images, replacement=True, num_samples=2**40),
        num_workers=threads,
        prefetch_factor=QUEUED,
        pin_memory=device.type == "cuda",
        worker_init_fn=_one_thread,
        collate_fn=collate,
    )
    endless = iter(arrive(batches, device))
    yield (lambda: next(endless)) if labels else (lambda: next(endless)[0])


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def ffcv(
    source: Source, size: int, threads: int, device: torch.device, *, kind: str
) -> contextlib.AbstractContextManager[Take]:
    path = source.folder.parent / f"{kind}.beton"
    if not path.exists():
        pipeline_peers.write_beton(source.split, path, kind)
    return pipeline_peers.ffcv(source.split, path, size, source.batch, threads, device)


def spdl(
    source: Source, size: int, threads: int, device: torch.device
) -> contextlib.AbstractContextManager[Take]:
    return pipeline_peers.spdl(source.split, size, source.batch, threads, device)


def providers(device: torch.device) -> dict[str, Callable[..., contextlib.AbstractContextManager[Take]]]:
    def with_decode(decode: str) -> Callable:
        return lambda *given: fastnet(*given, decode=decode)

    placements = ("device", "gpu", "cpu", "raw") if device.type == "cuda" else ("cpu", "raw")
    rows: dict[str, Callable] = {
        BASELINE: lambda *given: loader(*given, make=pil_dataset),
        "DataLoader, decode_jpeg": lambda *given: loader(*given, make=Jpegs),
        "DALI file reader": dali_reader,
        **{f"fastnet, decode {d}": with_decode(d) for d in placements},
        "JPEG decoding alone": decode_only,
    }
    if device.type == "cpu" and turbojpeg():
        rows[SIMPLEJPEG] = without_libturbojpeg
    peers: dict[str, Callable] = {
        "FFCV, JPEG": lambda *given: ffcv(*given, kind="jpg"),
        "FFCV, raw": lambda *given: ffcv(*given, kind="raw"),
        "SPDL": spdl,
    }
    return rows | {name: opened for name, opened in peers.items() if installed(name)}


def installed(peer: str) -> bool:
    return find_spec(peer.split(",")[0].lower()) is not None


def check(take: Take, source: Source, size: int, device: torch.device) -> str:
    """What is wrong with a batch: shape, device, values that are not finite or not normalised; "" if nothing is."""
    batch = take()
    x = batch[0] if isinstance(batch, tuple) else batch
    if x.shape not in ((source.batch, 3, size, size), (source.batch, size, size, 3)):
        return f"gives {list(x.shape)}"
    if x.device.type != device.type or not x.isfinite().all() or not 0.5 < x.float().std() < 2:
        return "gives images that are not normalised, or elsewhere"
    return ""


def measure(
    table: Table,
    source: Source,
    size: int,
    threads: int,
    device: torch.device,
    *,
    seconds: float,
    batches: int,
) -> None:
    case = {"set": source.hash[:12], "image_size": size, "batch": source.batch}
    case |= {"threads": threads, "device": device.type}
    print(f"{size} px, {threads} threads")
    with contextlib.ExitStack() as stack:
        ready: dict[str, harness.Candidate] = {}
        taken: dict[str, int] = {}
        for name, opened in providers(device).items():
            try:
                take = stack.enter_context(opened(source, size, threads, device))
                problem = "" if opened is decode_only else check(take, source, size, device)
            except InputError as error:
                problem = str(error)
            if problem:
                table.note(case, name, problem)
            else:
                prepared = PREFETCH * (threads if name.startswith("DataLoader") else 1) + 1
                taken[name] = batches * (1 if table.quick else repeats(take, batches))
                ready[name] = timed(take, prepared, taken[name])
        times = harness.alternate(ready, device, seconds=seconds, least=2 if table.quick else 6)
    for name in ("fastnet, decode device", "fastnet, decode gpu", *PEERS):
        if name not in providers(device):
            table.note(case, name, "not run: " + ("not installed here" if name in PEERS else "no GPU here"))
    for name, laps in times.items():
        rates = taken[name] * source.batch * 1e3 / np.array(laps["batches"])
        by = jpeg_decoder() if name == "fastnet, decode cpu" and device.type == "cpu" else ""
        table.add(case, name, "batches", "images/s", rates, note=by)


def repeats(take: Take, batches: int) -> int:
    """How many times to take `batches` batches for a measurement of `LAP` seconds."""
    pace = []
    for _ in range(3):  # the first ones were prepared meanwhile
        began = time.perf_counter()
        for _ in range(batches):
            take()
        pace.append(time.perf_counter() - began)
    return max(1, math.ceil(LAP / pace[-1]))


def timed(take: Take, prepared: int, batches: int) -> harness.Candidate:
    """Takes the batches `prepared` meanwhile, measures `batches`, and lets the provider prepare as many again."""

    def run(laps: Laps) -> None:
        for _ in range(prepared):
            take()
        laps("prepared")
        began = time.perf_counter()
        for _ in range(batches):
            take()
        laps("batches")
        # Its queues fill up now, and not while another provider is measured.
        time.sleep(1.5 * prepared * (time.perf_counter() - began) / batches)

    return run


def main(argv: Sequence[str]) -> None:
    parser = harness.parser("pipeline", __doc__)
    parser.add_argument("--data", type=Path, metavar="SET", help="prepared set; default: as the README says")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = default_set(args.data)
    split = data.splits["train"]
    table = Table("pipeline", quick=args.quick)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        batch = min(256 if not args.quick else 32, len(split))
        source = Source(split, Path(folder) / "train", batch, data.hash)
        counts = {args.threads} if args.quick else {1, 2, 4, 8, 16, args.threads}
        for size in (64, 224):
            for threads in sorted(n for n in counts if n <= args.threads):
                seconds = 4 if args.quick else 30
                # Workers that start together finish together, so only whole rounds of them are a fair measure.
                batches = threads * max(2, -(-(4 if args.quick else 16) // threads))
                measure(table, source, size, threads, device, seconds=seconds, batches=batches)
    harness.mark_ratios(table.rows, BASELINE, KEYS)
    table.write()


if __name__ == "__main__":
    run_command(main)
