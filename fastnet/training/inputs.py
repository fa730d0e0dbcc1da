"""What the phases of a run train and validate on: streams of images, or kept features of frozen convolutions."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastnet.config import Config
from fastnet.data.holdout import divide
from fastnet.data.prepared import PreparedSet, Split
from fastnet.distributed.ranks import Runtime
from fastnet.distributed.stop import StopSignal
from fastnet.errors import InputError
from fastnet.input.device import DeviceEvalStream, DeviceTrainStream, eval_stream, train_stream
from fastnet.input.spec import InputSpec
from fastnet.input.streams import EvalStream, TrainStream, check_batch_size, part
from fastnet.network.network import Network
from fastnet.progress import track
from fastnet.training.batches import Resident, Stream, Streamed
from fastnet.training.features import FeatureEvalStream, FeatureTrainStream, FrozenFeatures
from fastnet.training.phases import Phase, image_size
from fastnet.training.placement import image_dtype, streamed_decode
from fastnet.training.state import TrainState

AGAIN = 200  # steps


class Inputs:
    """This rank's share of the images of a run, decoded where `chosen` says. `waited` is told the seconds of each wait
    for data.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedSet,
        runtime: Runtime,
        chosen: dict[str, Any],
        waited: Callable[[float], None],
    ) -> None:
        self.config, self.data, self.runtime, self.waited = config, data, runtime, waited
        self.division = divide(data, config.holdout)
        train, images = self.division.train, len(self.division.train_images)
        check_batch_size(train.name, images, config.batch_size, config.parts, runtime.world_size)
        dtype = image_dtype(chosen["decode"], runtime)
        self.spec = InputSpec.of(config, runtime.device, dtype, chosen["decode"], chosen["threads"])
        self.steps_per_epoch = images // config.batch_size
        self.share = config.micro_batch(runtime.world_size)
        if config.holdout:  # the look at the end must not fail then, after hours
            self.open_val(data.splits["val"]).close()
        self.val = self.open_val(self.division.val, self.division.val_images)
        self.images: TrainStream | DeviceTrainStream | None = None
        self.images_spec: InputSpec | None = None
        self.batches: Streamed | Resident | None = None
        self.features: FrozenFeatures | None = None

    @property
    def batch_sizes(self) -> set[int]:
        """Of this rank's micro-batches in training, in validation and in a last look at val."""
        config, runtime = self.config, self.runtime
        share = part(config.batch_size, runtime.rank, runtime.world_size)
        trained = (part(share.stop - share.start, micro, config.parts) for micro in range(config.parts))
        sizes = {micro.stop - micro.start for micro in trained}
        for images in {self.division.val_images.size, len(self.data.splits["val"])}:
            mine = part(images, runtime.rank, runtime.world_size)
            sizes.update(
                min(self.share, mine.stop - first) for first in range(mine.start, mine.stop, self.share)
            )
        return sizes

    def open_val(self, split: Split, only: NDArray[np.int64] | None = None) -> EvalStream | DeviceEvalStream:
        """This rank's share of a split, as validation takes it."""
        ranks = {"rank": self.runtime.rank, "world_size": self.runtime.world_size}
        return eval_stream(split, self.spec, batch_size=self.share, only=only, **ranks)

    def caches(self, phase: Phase) -> bool:
        return self.config.cache_features > 0 and phase.frozen != "none"

    def frozen_features(self, network: Network, epochs: range) -> FrozenFeatures:
        return FrozenFeatures(self.config, self.data, self.division, network, self.runtime, epochs)

    def check_room(self, phases: Sequence[Phase], network: Network, state: TrainState) -> None:
        """Raises InputError where a disk has no room for the features of all phases that are left. Collective.
        Freezes the network as each of these phases does."""
        sizes: dict[Path, int] = {}
        begun = state.epoch - state.phase_epoch
        for phase in phases[state.phase :]:
            if self.caches(phase):
                network.freeze(phase.frozen)
                features = self.frozen_features(network, range(begun, begun + phase.epochs))
                sizes |= features.sizes(features.missing()[1])
            begun += phase.epochs
        folder, needed = self.data.path / "features", sum(sizes.values())
        with self.runtime.agree():
            free = shutil.disk_usage(folder).free if needed else 0  # a link to another disk, perhaps
            if needed > 0.95 * free:
                raise InputError(
                    f"--cache-features {self.config.cache_features}: takes {needed / 1e9:.1f} GB in {folder}, where "
                    f"{free / 1e9:.1f} GB are free; use fewer draws, or leave the flag out"
                )

    def keep_features(self, phase: Phase, network: Network, state: TrainState, stop: StopSignal) -> bool:
        """Where the phase trains on kept features: computes those that are missing. Collective. Returns False after a
        signal to stop."""
        if not self.caches(phase):
            return True
        begun = state.epoch - state.phase_epoch
        self.features = self.frozen_features(network, range(begun, begun + phase.epochs))
        return self.features.prepare(self.spec.threads, stop)

    def open(self, phase: Phase, state: TrainState) -> tuple[Streamed | Resident, Any]:
        """What a phase trains on, and what it validates on. Collective."""
        if self.features and self.caches(phase):
            return self.open_features(self.features, state)
        with self.runtime.agree():
            return self.open_images(phase, state), self.val

    def open_images(self, phase: Phase, state: TrainState) -> Streamed | Resident:
        """Training images, from where the run is; the stream goes on from phase to phase, until their size changes."""
        spec = replace(self.spec, image_size=image_size(phase, state.phase_epoch))
        if self.batches is None or spec != self.images_spec:
            self.close_images()  # first: with --decode device the memory may not hold the set twice
            self.images, self.images_spec = self._open(spec, state.epoch, state.step_in_epoch), spec
            if isinstance(self.images, DeviceTrainStream):
                self.batches = Resident(self.images)
            else:
                self.batches = self._streamed(self.images)
        return self.batches

    def _open(self, spec: InputSpec, epoch: int, step: int) -> TrainStream | DeviceTrainStream:
        return train_stream(
            self.division.train,
            spec,
            self.config.augment,
            batch_size=self.config.batch_size,
            accumulate=self.config.parts,
            seed=self.config.seed,
            epoch=epoch,
            step=step,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            only=self.division.train_images,
        )

    def once_more(self, phase: Phase, epoch: int, title: str) -> Iterator[Any]:
        """The images of an epoch as training draws them, at --image-size, or their kept features: the micro-batches of
        its first `AGAIN` steps at most. The stream that trains stays where it is. Collective."""
        count = min(self.steps_per_epoch, AGAIN) * self.config.parts
        stream: Stream
        with contextlib.ExitStack() as stack:
            if self.features and self.caches(phase):
                stream = FeatureTrainStream(self.features, self.runtime.dtype, epoch=epoch, step=0)
            else:
                decode = streamed_decode(self.spec.decode, self.runtime.device)
                spec = replace(self.spec, decode=decode, dtype=image_dtype(decode, self.runtime))
                with self.runtime.agree():
                    stream = stack.enter_context(closing(self._open(spec, epoch, 0)))
            for _ in track(title, range(count), count, "batches"):
                yield next(stream).x

    def open_features(self, features: FrozenFeatures, state: TrainState) -> tuple[Streamed, Any]:
        """Training and validation batches of kept features."""
        dtype = self.runtime.dtype
        stream = FeatureTrainStream(features, dtype, epoch=state.epoch, step=state.step_in_epoch)
        val = self.val if self.config.flip_average else FeatureEvalStream(features, dtype, self.share)
        return self._streamed(stream), val

    def _streamed(self, stream: Any) -> Streamed:
        return Streamed(stream, self.runtime.device, self.waited)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.val.close)
            stack.callback(self.close_images)

    def close_images(self) -> None:
        if self.images is not None:
            self.images.close()
        self.images = self.images_spec = self.batches = None
