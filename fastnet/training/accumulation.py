"""What `--accumulate auto` means: the fewest parts of a rank's share of a batch that its GPU's memory holds.

Shapes: B images of a micro-batch, S image size.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnet.config import STAGES, Config
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.memory import is_of_memory
from fastnet.distributed.ranks import Runtime
from fastnet.input.decoded import decoded_bytes
from fastnet.input.streams import Batch, part
from fastnet.metrics import Counter
from fastnet.network.network import Network
from fastnet.training.batches import Streamed
from fastnet.training.capture import Snapshot
from fastnet.training.checkpoint import Checkpoint
from fastnet.training.ema import MovingAverage
from fastnet.training.evaluation import evaluate
from fastnet.training.kernels import compile_kernels, turns
from fastnet.training.phases import plan
from fastnet.training.placement import image_dtype, splits_read
from fastnet.training.running import RunningPhase
from fastnet.training.setup import fewest_images

# Of the free memory, for what a trial does not see: what NCCL and DALI take for themselves, DALI's next batches, and
# what PyTorch's allocator cannot use between its blocks.
MARGIN = 0.1


def choose_parts(
    config: Config,
    saved: Checkpoint | None,
    data: PreparedSet,
    network: Network,
    average: MovingAverage | None,
    runtime: Runtime,
    chosen: dict[str, Any],
) -> dict[str, Any]:
    """What `--accumulate` means for a run: {"accumulate": parts}, and for auto why, as "accumulate_reason".

    A run that continues from `saved` takes the number it began with: batch norms see micro-batches, so with another
    one it would be another run. `chosen` has the LSTMs' backend, where images are decoded, and whether there is a CUDA
    graph. Collective. Raises PyTorch's error on a rank whose memory does not hold the smallest parts.
    """
    if config.accumulate != "auto":
        return {"accumulate": config.parts}
    if saved:
        return {"accumulate": saved.config.parts, "accumulate_reason": "as the run began"}
    if runtime.device.type != "cuda":
        return {"accumulate": 1, "accumulate_reason": "a CPU's memory is not tried"}
    with runtime.agree():
        trial = Trial(config, data, network, average, runtime, chosen)
    compiles = any(runtime.gather(trial.backend == "triton"))
    parts, most = 1, max(1, config.batch_size // runtime.world_size // fewest_images(config))
    while True:
        fits, reason = False, ""
        for mine in turns(runtime) if compiles else (True,):
            with runtime.agree():
                if mine:
                    fits, reason = trial.fits(parts, last=parts == most)
        if runtime.first_of(None if fits else "too large") is None:
            return {"accumulate": parts, "accumulate_reason": reason}
        parts = min(2 * parts, most)


class Trial:
    """Makes training steps on random images and puts back all that they change.

    They are this rank's alone, without DistributedDataParallel and torch.compile, in the phase that freezes least.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedSet,
        network: Network,
        average: MovingAverage | None,
        runtime: Runtime,
        chosen: dict[str, Any],
    ) -> None:
        self.network, self.average = network, average
        self.device, self.alone = runtime.device, Runtime(runtime.device, amp=runtime.amp)
        self.backend, self.graphs = chosen["lstm_backend"], chosen["cuda_graph"] != "off"
        self.config = replace(config, batch_size=-(-config.batch_size // runtime.world_size), compile=False)
        self.phase = min(plan(config), key=lambda phase: ("none", *STAGES).index(phase.frozen))
        splits, decode = splits_read(data, config.holdout), chosen["decode"]
        self.dtype, self.classes = image_dtype(decode, runtime), len(data.classes)
        # What a run has beside its steps: the decoded set, the gradients as DistributedDataParallel sums them, and the
        # average of the weights that comes last.
        weights = sum(p.nbytes for p in network.parameters())
        self.beside = sum(map(decoded_bytes, splits)) if decode == "device" else 0
        self.beside += weights * ((runtime.world_size > 1) + (config.average_last > 0))

    def fits(self, parts: int, *, last: bool) -> tuple[bool, str]:
        """Whether the share fits in so many parts, and what they take. The `last` ones have to."""
        config = replace(self.config, accumulate=parts)
        taken: int | None
        try:
            if self.backend == "triton":
                compile_kernels(config, self.alone, self.backend, None, [config.micro_batch(ranks=1)])
            taken = self.beside + self.taken(lambda: self.train(config))
            if self.graphs:  # whose memory validation cannot use
                size = config.micro_batch(ranks=1)
                taken += self.taken(lambda: evaluate(self.network, [self.noise(size)], self.alone))
        except RuntimeError as error:
            if last or not is_of_memory(error):
                raise
            taken = None
        gc.collect()  # steps that broke off may be in cycles with their error
        torch.cuda.empty_cache()
        if taken is None:
            return False, ""
        # Asked afterwards: by now CUDA has loaded the kernels, which take memory too.
        free = torch.cuda.mem_get_info(self.device)[0]
        torch.cuda.reset_peak_memory_stats(self.device)
        reason = f"a step takes {taken / 2**30:.3g} of {free / 2**30:.3g} GiB free on the GPU"
        return last or taken <= (1 - MARGIN) * free, reason

    def taken(self, run: Callable[[], object]) -> int:
        """Bytes of the GPU that PyTorch takes at most while `run` runs."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        run()
        return torch.cuda.max_memory_reserved(self.device) - before

    def train(self, config: Config) -> None:
        """Two steps, as AdamW makes its state at the end of the first one."""
        self.network.freeze(self.phase.frozen)
        stream = Streamed(Noise(config, self.noise), self.device, lambda _: None)
        counter = Counter(self.device)
        try:
            running = RunningPhase(
                self.phase, config, self.alone, self.network, self.average, stream, counter, None, Path()
            )
            step, batches = running.plain, stream.fixed(self.alone.dtype)
            step.batches = batches
            before = Snapshot(step, batches, self.network)
            try:
                before.rehearse(step.on_device, 2, self.phase)
            finally:
                before.put_back()
        finally:
            self.network.zero_grad(set_to_none=True)
            self.network.freeze("none")

    def noise(self, size: int) -> Batch:
        """One random image `size` times, x [B, 3, S, S] and y [B], without a draw from PyTorch's own generators."""
        side, generator = self.config.image_size, torch.Generator().manual_seed(0)
        one = torch.randn(1, 3, side, side, generator=generator).to(self.device, self.dtype)
        x = one.expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        index = np.arange(size)
        return Batch(x, torch.from_numpy(index % self.classes).to(self.device), index)


class Noise:
    """A stream of random micro-batches in the sizes of a run's."""

    def __init__(self, config: Config, make: Callable[[int], Batch]) -> None:
        self.accumulate, self.make = config.parts, make
        share = (part(config.batch_size, micro, config.parts) for micro in range(config.parts))
        self.sizes = cycle([micro.stop - micro.start for micro in share])

    def __next__(self) -> Batch:
        return self.make(next(self.sizes))
