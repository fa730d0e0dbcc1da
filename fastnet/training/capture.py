"""The training step as a CUDA graph: one launch in place of some hundreds, which takes the host out of the step.

A graph replays the same kernels on the same memory. What must hold for that, and is not seen where nothing runs
asynchronously:

* Everything is on one stream, the trainer's own: the copies into the memory that a graph reads, its replays, and what
  reads its results. Stream order is then enough; a copy for the next step cannot overtake a replay.
* The host's side of such a copy is pinned memory that nobody writes before an event behind the copy has passed: DALI's
  batches are on the device already, and labels come from torch's pinned allocator, which waits for that event itself.
* Nothing that a replay reads is freed: weights, optimiser state, loss scale, counter, batches and learning rate exist
  before the capture and live as long as the graph. Gradients and activations are in the graph's own pool.
* Other threads use CUDA meanwhile (DALI frees batches, NCCL's watchdog queries events), so only this thread's calls may
  end a capture: capture_error_mode="thread_local". The backward pass is in autograd's thread, on the same stream.

On several ranks the gradients' sums are in the graph. Of torch's rules for that, the eleven warm-up steps and
DistributedDataParallel made on a stream of its own are kept here. NCCL's error handling stays on: the watchdog is not
given what is captured, and torch has it finish what it has before a capture begins; that a replay hangs is therefore
seen by `--timeout` only, where the ranks next talk by gloo. What NCCL asks of its user:

* A capture is made by all ranks or by none, and so is a replay: `agree` has all of them go on with plain steps where
  one failed. To register buffers, NCCL may talk within a capture (NVLink SHARP), and ranks whose capture went well
  would wait there for one whose capture broke off; the latter ends them all after `--timeout`.
* Replays and the sums and broadcasts between them (counts, validation) are on one stream, hence in one order on all
  ranks; NCCL mixes both by default (NCCL_GRAPH_MIXING_SUPPORT).
* A communicator cannot be destroyed while a graph has its collectives; it waits for ever (pytorch issue 115388). So a
  graph is closed where it is dropped, and none is left to the garbage collector.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.network.network import Network
from fastnet.training.batches import FixedBatches
from fastnet.training.parallel import dismiss
from fastnet.training.phases import Phase
from fastnet.training.step import TrainStep

COMPARED = 4  # steps, plain and replayed
# DistributedDataParallel waits for events in the first ten steps, to time them, and in every hundredth: a capture
# refuses that (torch's notes on CUDA graphs). The capture is of the seventeenth.
WARMUP = 11
# Small enough that no gradient overflows in fp16: steps that are skipped would agree whatever the graph does.
REHEARSAL_SCALE = 2.0**7


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream for all that a trainer does on a GPU: the default stream cannot be captured, and autograd does each
    step's work where it did the first one's."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


class CapturedStep:
    """A `TrainStep` that is replayed, once it has been captured. To be closed."""

    def __init__(self, step: TrainStep) -> None:
        self.batches, self.on_device = step.batches, step.on_device
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(step.runtime.device)

    def capture(self) -> None:
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.on_device()

    def __call__(self) -> None:
        self.batches.advance()
        self.graph.replay()

    def close(self) -> None:
        """Destroys the graph and frees its memory."""
        self.graph.reset()


def capture(
    step: TrainStep, batches: FixedBatches, network: Network, phase: Phase
) -> tuple[CapturedStep, str]:
    """`step`, captured, if replays do what plain steps do from the same state; and how well they agreed.

    Four plain steps and four replays are made on batches and rates of their own, and all they changed is put back.
    Collective. Raises InputError on every rank where it cannot be captured or does not agree; `step` is then not to be
    used any more.
    """
    runtime = step.runtime
    step.batches = batches
    before = Snapshot(step, batches, network)
    before.rehearse(step.on_device, WARMUP if runtime.world_size > 1 else COMPARED, phase)
    before.rehearse(step.on_device, COMPARED, phase)
    plain = before.copy()
    captured = CapturedStep(step)
    try:
        with runtime.agree(), failing("cannot be captured"):
            captured.capture()
        with runtime.agree(), failing("cannot be replayed"):
            before.rehearse(captured.graph.replay, COMPARED, phase)
        with runtime.agree():
            agreement = before.compare(plain, COMPARED * precision(runtime))
    except InputError:
        captured.close()
        dismiss(step.model)
        raise
    finally:
        before.put_back()
        network.zero_grad(set_to_none=True)  # a capture that failed leaves some
    return captured, agreement


@contextlib.contextmanager
def failing(how: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise InputError(f"the training step {how} ({reason})") from error


def precision(runtime: Runtime) -> float:
    """Relative error of the step's products: autocast's type, or TF32 (10 bits, as fp16) in float32's place."""
    return torch.finfo(runtime.amp or torch.float16).eps


class Snapshot:
    """Everything that a step changes: weights, batch norms, the optimiser's state, loss scale, counts."""

    def __init__(self, step: TrainStep, batches: FixedBatches, network: Network) -> None:
        self.step, self.batches, self.network = step, batches, network
        # To be made before the capture: within it, the scale would become a constant of the graph.
        step.scaler.scale(torch.zeros((), device=step.runtime.device))
        self.scaler = step.scaler.state_dict()
        self.start = self.copy()

    def tensors(self) -> dict[str, Tensor]:
        optimizer = {
            f"optimizer {i} {key}": value
            for i, state in enumerate(self.step.optimizer.state.values())
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        own = {f"batches {i}": tensor for i, tensor in enumerate(self.batches.state())}
        average = self.step.average.network.state_dict() if self.step.average else {}
        own |= {f"average {name}": tensor for name, tensor in average.items()}
        return {**self.network.state_dict(), **optimizer, **own, "counter": self.step.counter.sums}

    def copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def rehearse(self, run: Callable[[], None], steps: int, phase: Phase) -> None:
        """Makes `steps` steps from this state, each with another batch and another learning rate."""
        self.put_back()
        scaler = self.step.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": REHEARSAL_SCALE})
        for i in range(steps):
            self.batches.rehearse(i)
            self.step.prepare(i, phase.peak_lr * (i + 1) / 100)
            run()

    def put_back(self) -> None:
        for name, tensor in self.tensors().items():
            if name in self.start:
                tensor.copy_(self.start[name])
            else:  # AdamW makes its state at the first step: zeros
                tensor.zero_()
        self.step.scaler.load_state_dict(self.scaler)

    def compare(self, plain: dict[str, Tensor], bound: float) -> str:
        """How far the state now is from that after the plain steps, as a fraction of how far those went.

        Raises InputError above `bound`.
        """
        replayed = self.tensors()
        if all(torch.equal(replayed[name], plain[name]) for name in plain):
            return "bit for bit as plain steps"
        moved = apart = 0.0
        for name, after in plain.items():
            if after.is_floating_point():
                start = self.start.get(name, torch.zeros_like(after))
                moved = math.hypot(moved, torch.dist(after, start).item())
                apart = math.hypot(apart, torch.dist(after, replayed[name]).item())
        share = apart / moved if moved else math.inf
        if not share <= bound:
            raise InputError(
                f"{COMPARED} replayed steps end {share:.2g} away from {COMPARED} plain ones, "
                f"more than rounding explains ({bound:.2g})"
            )
        return f"to {share:.1g} as plain steps (rounding: {bound:.1g})"
