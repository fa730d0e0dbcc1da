"""A training step, an epoch of them, and evaluation, as functions.

Legend: B images of a micro-batch, K classes, N images of a split.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastnet.config import Config
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input.streams import EvalStream, TrainStream
from fastnet.network.network import Network
from fastnet.profiling import span
from fastnet.training.meter import BAD, COUNT, LOSS_UNIT, StepClock, _count, _means, _peak_memory
from fastnet.training.phases import Phase, learning_rate, make_optimizer
from fastnet.training.state import TrainState


@dataclass
class Job:
    """A phase under way: the network as the phase trains it, and where it is."""

    config: Config
    phase: Phase
    network: Network
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    stream: TrainStream
    runtime: Runtime
    position: TrainState
    totals: (
        Tensor  # [4] int64 on the device: loss, top-1, count, non-finite losses of this rank in this epoch
    )
    waits: list[float] = field(default_factory=list)
    clock: StepClock = field(default_factory=lambda: StepClock())  # defined below


def begin_phase(
    config: Config,
    phase: Phase,
    network: Network,
    stream: TrainStream,
    runtime: Runtime,
    position: TrainState,
) -> Job:
    """Freezes what the phase freezes and wraps what it trains: optimiser, loss scaler, DistributedDataParallel."""
    network.freeze_backbone(phase.frozen_backbone)
    network.train()
    optimizer = runtime.together(lambda: make_optimizer(phase, network, config))
    model: nn.Module = network
    if runtime.world_size > 1:
        model = DistributedDataParallel(
            network,
            device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        _settle_buckets(model, network, runtime)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp is torch.float16)
    totals = torch.zeros(4, dtype=torch.int64, device=runtime.device)
    return Job(config, phase, network, model, optimizer, scaler, stream, runtime, position, totals)


def _settle_buckets(model: nn.Module, network: Network, runtime: Runtime) -> None:
    """One backward pass without effect. DDP orders its gradient buckets anew after the first one, and the order of
    the sums decides their last bits: a continued run must not meet that moment at another step."""
    network.eval()
    size = network.image_size
    x = torch.zeros(1, 3, size, size, device=runtime.device).to(memory_format=torch.channels_last)
    with runtime.autocast():
        logits = model(x)
    logits.sum().backward()
    network.zero_grad(set_to_none=True)
    network.train()


def train_step(job: Job) -> None:
    """One optimiser step on the next global batch. Nothing in it waits for the device."""
    config, runtime, position = job.config, job.runtime, job.position
    in_phase = position.phase_epoch * job.stream.steps_per_epoch + position.step_in_epoch
    rate = learning_rate(job.phase, in_phase, job.stream.steps_per_epoch, config.warmup)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    for part in range(config.accumulate):
        started = time.perf_counter()
        with span("data", runtime.device):
            x, y, _ = next(job.stream)  # [B, 3, S, S], [B]
        job.waits.append(time.perf_counter() - started)
        last = part == config.accumulate - 1
        with contextlib.nullcontext() if last else _no_sync(job.model):
            with span("forward", runtime.device), runtime.autocast():
                logits = job.model(x)  # [B, K]
            # DDP averages over the ranks: with this factor every image of the global batch weighs the same.
            loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing, reduction="sum")
            with span("backward", runtime.device):
                job.scaler.scale(loss * (runtime.world_size / config.batch_size)).backward()
        _count(job.totals, logits.detach(), y)
    with span("optimizer", runtime.device):
        job.scaler.step(job.optimizer)
        job.scaler.update()
        job.optimizer.zero_grad(set_to_none=True)
    job.clock.tick()
    position.step_in_epoch += 1
    position.step += 1


def _no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def summed_totals(job: Job) -> list[int]:
    """The epoch's totals over all ranks; collective, and waits for the device.

    Raises InputError, on every rank, if a loss was not finite.
    """
    totals = job.runtime.sum_(job.totals.clone()).tolist()
    if totals[BAD]:
        raise InputError(
            f"the loss is not finite by step {job.position.step}: nothing of it was saved; lower --lr "
            f"{job.config.lr:g} or --head-lr {job.config.head_lr:g}, or lengthen --warmup, in another --run-dir"
        )
    return totals


def check_weights(job: Job) -> None:
    """Raises InputError, on every rank alike, if the last update left a weight that is not finite."""
    trained = [p for p in job.network.parameters() if p.requires_grad]
    # Ranks hold the same weights, so that none needs to ask the others.
    if not torch.stack([p.detach().isfinite().all() for p in trained]).all():
        raise InputError(
            f"the weights are not finite after step {job.position.step}: nothing of it was saved; lower --lr or "
            "--head-lr, or lengthen --warmup, in another --run-dir"
        )


def train_epoch(job: Job, after_step: Callable[[Job], bool]) -> bool:
    """Trains to the end of the epoch that `job.position` is in, or until `after_step` returns True: so does this."""
    if job.position.step_in_epoch == 0:
        job.totals.zero_()
        job.position.logged = [0] * 4
    job.waits = []
    job.clock.start(job.runtime.device)
    while job.position.step_in_epoch < job.stream.steps_per_epoch:
        train_step(job)
        if after_step(job):
            return True
    return False


def interval(job: Job) -> dict[str, Any]:
    """Means over the steps since the last call in this epoch. Collective."""
    totals, since = summed_totals(job), job.position.logged
    job.position.logged = totals
    return {
        **_where(job),
        **_means([now - then for now, then in zip(totals, since, strict=True)]),
        "lr": _rate(job),
    }


def epoch_record(job: Job) -> dict[str, Any]:
    """What an epoch's line of metrics.jsonl says of training. Collective. Times are this rank's, in this session."""
    totals = summed_totals(job)
    means = _means(totals)
    steps = job.clock.milliseconds()
    seconds = float(steps.sum()) / 1e3
    p50, p95 = np.percentile(steps, [50, 95]) if len(steps) else (0.0, 0.0)
    return {
        **_where(job),
        **means,
        "train_count": totals[COUNT],
        "lr": _rate(job),
        "images_per_s": len(steps) * job.config.batch_size / seconds if seconds else 0.0,
        "step_ms_p50": float(p50),
        "step_ms_p95": float(p95),
        "data_wait": sum(job.waits) / seconds if seconds else 0.0,
        "peak_mem_mb": _peak_memory(job.runtime.device) / 2**20,
        "seconds": seconds,
    }


def _where(job: Job) -> dict[str, Any]:
    return {"phase": job.phase.name, "epoch": job.position.epoch, "step": job.position.step}


def _rate(job: Job) -> float:
    return float(job.optimizer.param_groups[0]["lr"])


def state(job: Job) -> dict[str, Any]:
    """What a checkpoint needs of a job. Between two phases there is no optimiser to keep."""
    under_way = job.position.phase_epoch + job.position.step_in_epoch > 0
    return {
        "config": job.config.to_json(),
        "model": job.network.state_dict(),
        "optimizer": job.optimizer.state_dict() if under_way else None,
        "scaler": job.scaler.state_dict(),
        "position": asdict(job.position),
    }


def restore(job: Job, saved: dict[str, Any]) -> None:
    """Continues the phase that `saved` was in the middle of."""
    job.optimizer.load_state_dict(saved["optimizer"])
    job.scaler.load_state_dict(saved["scaler"])
    if job.runtime.is_main:  # the totals are sums over the ranks: one of them carries what was there
        job.totals += torch.tensor(job.position.totals, device=job.totals.device)


@torch.inference_mode()
def evaluate(network: Network, stream: EvalStream, runtime: Runtime) -> dict[str, float]:
    """Loss, top-1, top-5 and count over the whole split, each image counted once. Collective.

    Raises InputError, on every rank, if a loss was not finite.
    """
    network.eval()
    totals = torch.zeros(4, dtype=torch.int64, device=runtime.device)
    top5 = torch.zeros(1, dtype=torch.int64, device=runtime.device)
    for x, y, _ in stream:
        with runtime.autocast():
            logits = network(x)  # [B, K]
        _count(totals, logits, y)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        top5 += (best == y[:, None]).sum()
    network.train()
    loss, correct, count, bad, correct5 = runtime.sum_(torch.cat([totals, top5])).tolist()
    if bad:
        raise InputError(
            f"the validation loss of {bad} images is not finite; lower --lr in another --run-dir"
        )
    return {
        "loss": loss * LOSS_UNIT / count,
        "top1": correct / count,
        "top5": correct5 / count,
        "count": count,
    }


@torch.inference_mode()
def predict(network: Network, stream: EvalStream, n: int, runtime: Runtime) -> Tensor:
    """Softmax scores [N, K] float32 on the CPU, in the split's order. One process."""
    network.eval()
    scores = torch.empty(0)
    for x, _, index in stream:
        with runtime.autocast():
            logits = network(x)  # [B, K]
        if not len(scores):
            scores = torch.empty(n, logits.shape[1])
        scores[torch.from_numpy(index)] = logits.softmax(dim=1).cpu()
    return scores


def share_state(network: Network, runtime: Runtime) -> None:
    """Gives every rank the weights and batch norm statistics of rank 0, which are the ones that checkpoints keep."""
    if runtime.world_size > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)
