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
from fastnet.training.batches import Resident, Streamed
from fastnet.training.capture import CapturedStep, capture
from fastnet.training.checkpoint import Updates, restore
from fastnet.training.ema import MovingAverage
from fastnet.training.mixing import Mixer
from fastnet.training.parallel import data_parallel
from fastnet.training.phases import Phase, make_optimizer
from fastnet.training.step import TrainStep


class RunningPhase:
    """Readies a step of the phase on images of `config.image_size`. `begun` is what to continue with where the phase
    has begun: from the checkpoint `path`, or from steps on images of another size.

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
        begun: Updates | None,
        path: Path,
    ) -> None:
        self.phase, self.config, self.runtime = phase, config, runtime
        self.network, self.average = network, average
        self.batches, self.counter, self.begun, self.path = batches, counter, begun, path
        self.mixer = Mixer(config, runtime) if config.mixes else None
        self.graph: CapturedStep | None = None
        self.plain = self.plain_step()
        self.launch: Callable[[], None] = self.plain

    def plain_step(self) -> TrainStep:
        """The step, with an optimiser and a loss scaler as they were, or new ones."""
        config, runtime = self.config, self.runtime
        with runtime.agree():
            self.optimizer = make_optimizer(self.phase, self.network, config)
        model = data_parallel(self.network, runtime, compiled=config.compile)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp is torch.float16)
        if self.begun:
            with runtime.agree():
                restore(self.optimizer, self.scaler, self.path, self.begun)
        return TrainStep(
            config,
            runtime,
            model,
            self.optimizer,
            self.scaler,
            self.counter,
            self.batches,
            self.average,
            self.mixer,
        )

    def capture(self) -> str:
        """Has the step replayed as a CUDA graph from now on, where that does the same; says which it is, and why."""
        batches = self.batches.fixed(self.runtime.dtype)
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
        """Trains on the next global batch. `number`: of steps before it."""
        self.plain.prepare(number, rate)
        self.launch()

    def updates(self) -> Updates:
        """What a checkpoint keeps of the phase, or the same phase goes on with."""
        return Updates(self.optimizer.state_dict(), self.scaler.state_dict())

    def close(self) -> None:
        """Frees what a captured step holds, the ranks' communicator among it, and what was compiled."""
        if self.graph:
            self.graph.close()
        if self.config.compile:  # dynamo keeps a few versions of a function, and fails where more are needed
            torch.compiler.reset()
