"""The outputs of frozen convolutions, computed once: `--cache-features K`.

In a phase whose first stages are frozen, their output for an image and a draw of its augmentation never changes. It is
computed for K draws, or as many as the phase has epochs, and for validation, kept as float16 beside the set, and read
in place of images from then on: epoch e of the run sees draw e % K.

A directory is named after all that the numbers depend on, so runs that freeze the same weights share it. It holds a
file for each `SHARD` images of a draw, which is there whole or not at all: what was stopped goes on where it was, and
the ranks that write to one disk divide the files.

Shapes: B images of a batch, R numbers of an image, C, H, W channels, height and width of a stage's output.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastnet import __version__
from fastnet.config import Config
from fastnet.data.holdout import Division
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.ranks import Runtime
from fastnet.distributed.stop import StopSignal
from fastnet.distributed.storage import ranks_sharing
from fastnet.files import STALE, atomic_write, remove_leftovers
from fastnet.input.spec import InputSpec
from fastnet.input.streams import Batch, DrawnStream, micro_batches, part
from fastnet.network.network import Network
from fastnet.progress import track
from fastnet.training.placement import streamed_decode

SHARD = 2048  # images in a file
VALIDATION = "val"  # in place of a draw


class FrozenFeatures:
    """The kept features of a set for the stages that `network` freezes now, and for the draws that `epochs` of a run
    see. `prepare` computes what is missing."""

    def __init__(
        self,
        config: Config,
        data: PreparedSet,
        division: Division,
        network: Network,
        runtime: Runtime,
        epochs: Iterable[int],
    ) -> None:
        self.config, self.data, self.network, self.runtime = config, data, network, runtime
        self.splits = {"train": division.train, VALIDATION: division.val}
        self.images = {"train": division.train_images, VALIDATION: division.val_images}
        self.draws = sorted({epoch % config.cache_features for epoch in epochs})
        self.decode = streamed_decode(config.decode, runtime.device)
        size = config.image_size
        with torch.no_grad():
            one = torch.zeros(1, 3, size, size, device=runtime.device).to(memory_format=torch.channels_last)
            with runtime.autocast():
                # (C, H, W) each
                self.shapes = [tuple(kept.shape[1:]) for kept in network.frozen_outputs(one)]
        self.row = sum(map(int, map(np.prod, self.shapes)))  # R
        facts = self.facts()
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = data.path / "features" / name
        self.shards: dict[Path, NDArray[np.float16]] = {}

    def facts(self) -> dict[str, Any]:
        """All that the numbers depend on, besides the order of sums."""
        config, digest = self.config, hashlib.sha256()
        for module in self.network.frozen_modules():
            for tensor in module.state_dict().values():
                digest.update(tensor.cpu().numpy().tobytes())
        return {
            "version": __version__,
            "shard": SHARD,
            "decode": self.decode,
            "data": self.data.hash,
            "frozen": self.network.kept_stages(),
            "weights": digest.hexdigest(),
            "depth": config.depth,
            "stem": config.stem,
            "image_size": config.image_size,
            "eval_crop": config.eval_crop,
            "augment": asdict(config.augment),
            "seed": config.seed,
            "precision": str(self.runtime.amp),
            "holdout": config.holdout,
        }

    def files(self) -> dict[Path, tuple[str, NDArray[np.int64]]]:
        """Every file with its draw and the images in it."""
        named = {}
        draws = [str(draw) for draw in self.draws]
        # Averaged with mirror images, validation needs pixels.
        for draw in draws if self.config.flip_average else [*draws, VALIDATION]:
            images = self.images[use_of(draw)]
            for first in range(0, len(images), SHARD):
                path = self.folder / f"{draw}-{first // SHARD}.npy"
                named[path] = draw, images[first : first + SHARD]
        return named

    def missing(self) -> tuple[list[int], dict[Path, tuple[str, NDArray[np.int64]]]]:
        """The ranks that write to this rank's disk, and the files that it lacks; both empty where no disk lacks
        any. Collective."""
        files = self.files()
        seen = self.runtime.gather(
            [path.name for path, (_, images) in files.items() if not self._is_whole(path, len(images))]
        )
        if not any(seen):
            return [], {}
        sharing = ranks_sharing(self.folder.parent, self.runtime)
        # By one rank's look: other runs may be making the same files meanwhile.
        return sharing, {path: file for path, file in files.items() if path.name in seen[sharing[0]]}

    def prepare(self, threads: int, stop: StopSignal | None = None) -> bool:
        """Computes the missing files, each rank some of those that its disk lacks. Collective. Returns False after a
        signal to stop."""
        sharing, missing = self.missing()
        if not sharing:
            return True
        with self.runtime.agree():
            if missing and self.runtime.rank == sharing[0]:
                remove_leftovers(self.folder, older=STALE)
                self.runtime.say(
                    f"features: {', '.join(self.network.kept_stages())} of "
                    f"{sum(len(images) for _, images in missing.values())} images, "
                    f"{sum(self.sizes(missing).values()) / 1e9:.2g} GB in {self.folder}"
                )
        training = self.network.training
        self.network.eval()
        done = all(
            self._compute(
                {path: file for path, file in missing.items() if use_of(file[0]) == use},
                use,
                sharing,
                threads,
                stop,
            )
            for use in self.splits
        )
        self.network.train(training)
        return done

    def sizes(self, files: dict[Path, tuple[str, NDArray[np.int64]]]) -> dict[Path, int]:
        """The bytes of each file."""
        return {path: self._size(len(images)) for path, (_, images) in files.items()}

    def _is_whole(self, path: Path, images: int) -> bool:
        """Whether a file is there with all its bytes, which one that was copied from elsewhere may lack."""
        return path.is_file() and path.stat().st_size == self._size(images)

    def _size(self, images: int) -> int:
        return len(self._header(images)) + images * self.row * 2

    def _compute(
        self,
        files: dict[Path, tuple[str, NDArray[np.int64]]],
        use: str,
        sharing: list[int],
        threads: int,
        stop: StopSignal | None,
    ) -> bool:
        """In rounds, in which each rank makes one of the files, and after which all of them stop if one is to."""
        mine = list(files.items())[sharing.index(self.runtime.rank) :: len(sharing)]
        rounds = max(self.runtime.gather(len(mine)))
        with contextlib.ExitStack() as stack:
            stream: DrawnStream | None = None
            for number in track(f"features for {use}", range(rounds), rounds, "files"):
                with self.runtime.agree():
                    for path, (draw, index) in mine[number : number + 1]:
                        stream = stream or stack.enter_context(closing(self._stream(use, threads)))
                        self._write(
                            path, stream.of(index, 0 if draw == VALIDATION else int(draw)), len(index)
                        )
                if stop and stop.asked():
                    return False
        return True

    def _stream(self, use: str, threads: int) -> DrawnStream:
        config, device = self.config, self.runtime.device
        spec = InputSpec.of(config, device, self.runtime.image_dtype, self.decode, threads)
        augment = config.augment if use == "train" else None
        size = config.micro_batch(self.runtime.world_size)
        return DrawnStream(self.splits[use], spec, augment, seed=config.seed, batch_size=size)

    def _write(self, path: Path, batches: Iterable[Batch], images: int) -> None:
        full = "free some space, or use fewer draws with --cache-features"
        # Written and not mapped: where the disk fills up, writing fails, and a mapped page kills the process.
        with atomic_write(path, full=full) as beside, beside.open("wb") as file:
            file.write(self._header(images))
            for x, *_ in batches:
                file.write(self._rows(x).data)

    def _header(self, images: int) -> bytes:
        buffer = io.BytesIO()
        shape = {"descr": "<f2", "fortran_order": False, "shape": (images, self.row)}
        np.lib.format.write_array_header_1_0(buffer, shape)
        return buffer.getvalue()

    def _rows(self, x: Tensor) -> NDArray[np.float16]:
        """Images [B, 3, S, S] -> [B, R]: each output in the order of its memory, which is [H, W, C]."""
        with self.runtime.autocast():
            kept = self.network.frozen_outputs(x)
        flat = [output.permute(0, 2, 3, 1).reshape(len(x), -1) for output in kept]
        return torch.cat(flat, dim=1).to(torch.float16).cpu().numpy()

    def batch(self, draw: str, index: NDArray[np.int64], dtype: torch.dtype) -> Batch:
        """The images `index`, with the outputs of `network.kept_stages`: [B, C, H, W] each, channels_last."""
        use = use_of(draw)
        rows = np.empty((len(index), self.row), np.float16)
        for row, at in zip(rows, np.searchsorted(self.images[use], index), strict=True):
            row[:] = self._shard(draw, int(at) // SHARD)[int(at) % SHARD]
        values, y = torch.from_numpy(rows), torch.from_numpy(self.splits[use].labels[index])
        device = self.runtime.device
        if device.type == "cuda":
            values, y = (t.pin_memory().to(device, non_blocking=True) for t in (values, y))
        parts = values.to(dtype).split([int(np.prod(shape)) for shape in self.shapes], dim=1)
        x = tuple(
            part.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
            for part, (channels, height, width) in zip(parts, self.shapes, strict=True)
        )
        return Batch(x, y, index)

    def _shard(self, draw: str, number: int) -> NDArray[np.float16]:
        path = self.folder / f"{draw}-{number}.npy"
        if path not in self.shards:
            # Each map is an open file. An epoch reads one draw, and validation its own.
            current = (f"{draw}-", f"{VALIDATION}-")
            self.shards = {path: kept for path, kept in self.shards.items() if path.name.startswith(current)}
            self.shards[path] = np.load(path, mmap_mode="r")
        return self.shards[path]


def use_of(draw: str) -> str:
    """What the images of a draw are for: "train" or VALIDATION."""
    return VALIDATION if draw == VALIDATION else "train"


class FeatureTrainStream:
    """TrainStream's micro-batches, the same images in the same order, with kept features in place of pixels."""

    def __init__(self, features: FrozenFeatures, dtype: torch.dtype, *, epoch: int, step: int) -> None:
        config, runtime = features.config, features.runtime
        self.features, self.dtype, self.accumulate = features, dtype, config.parts
        self.todo = micro_batches(
            features.images["train"],
            config.batch_size,
            config.parts,
            config.seed,
            runtime.rank,
            runtime.world_size,
            epoch,
            step,
        )

    def __next__(self) -> Batch:
        epoch, index = next(self.todo)
        draw = str(epoch % self.features.config.cache_features)
        return self.features.batch(draw, index, self.dtype)


class FeatureEvalStream:
    """EvalStream's batches in the same way."""

    def __init__(self, features: FrozenFeatures, dtype: torch.dtype, batch_size: int) -> None:
        self.features, self.dtype, self.batch_size = features, dtype, batch_size
        runtime = features.runtime
        images = features.images[VALIDATION]
        self.share = images[part(len(images), runtime.rank, runtime.world_size)]

    def __len__(self) -> int:
        return -(-len(self.share) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.share), self.batch_size):
            index = self.share[first : first + self.batch_size]
            yield self.features.batch(VALIDATION, index, self.dtype)
