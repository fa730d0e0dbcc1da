"""A phase under way: the batches, optimiser, loss scaler and step that it trains with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.metrics import Counter
from fastnet.network.network import Network
from fastnet.training import checkpoint
from fastnet.training.batches import Resident, Streamed
from fastnet.training.capture import CapturedStep, capture
from fastnet.training.ema import MovingAverage
from fastnet.training.mixing import Mixer
from fastnet.training.parallel import data_parallel
from fastnet.training.phases import Phase, make_optimizer
from fastnet.training.step import TrainStep


class RunningPhase:
    """Readies `network` for the phase. `saved`, read from `path`, is a checkpoint of this phase to continue from.

    Collective, as all its methods are.
    """

    def __init__(
        self,
        phase: Phase,
        config: Config,
        runtime: Runtime,
        network: Network,
        average: MovingAverage | None,
        batches: Streamed | Resident,
        counter: Counter,
        saved: checkpoint.Checkpoint | None,
        path: Path,
    ) -> None:
        self.phase, self.config, self.runtime, self.network, self.average = (
            phase,
            config,
            runtime,
            network,
            average,
        )
        self.batches, self.counter, self.saved, self.path = batches, counter, saved, path
        self.mixer = Mixer(config, runtime) if config.mixup or config.cutmix else None
        self.graph: CapturedStep | None = None
        self.plain = self.plain_step()
        self.launch: Callable[[], None] = self.plain

    def plain_step(self) -> TrainStep:
        """The step, with an optimiser and a loss scaler as the checkpoint has them, or new ones."""
        config, runtime = self.config, self.runtime
        with runtime.agree():
            self.optimizer = make_optimizer(self.phase, self.network, config)
        model = data_parallel(self.network, runtime, compiled=config.compile)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp is torch.float16)
        if self.saved:
            with runtime.agree():
                checkpoint.restore(self.optimizer, self.scaler, self.path, self.saved)
        parts = (self.optimizer, self.scaler, self.counter, self.batches, self.average, self.mixer)
        return TrainStep(config, runtime, model, *parts)

    def capture(self) -> str:
        """Has the step replayed as a CUDA graph from now on, where that does the same; says which it is, and why."""
        batches = self.batches.fixed(self.runtime.amp or torch.float32)
        try:
            self.graph, agreement = capture(self.plain, batches, self.network, self.phase)
        except InputError as error:
            if self.config.cuda_graph == "on":
                raise InputError(f"--cuda-graph on: {error}; use auto or off") from error
            self.launch = self.plain = self.plain_step()
            return f"off, {error}"
        self.launch = self.graph
        return f"on, {agreement}"

    def step(self, number: int, rate: float) -> None:
        """Trains on the next global batch. `number`: of steps before it. Nothing in it waits for the device."""
        self.plain.prepare(number, rate)
        self.launch()

    def close(self) -> None:
        """Frees what a captured step holds, the ranks' communicator among it."""
        if self.graph:
            self.graph.close()
