"""What trains in a phase: parameters, batch norm mode, optimiser, learning rate, and when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastnet.config import Config
from fastnet.errors import InputError
from fastnet.network.network import LAYERS, Network
from fastnet.training.state import TrainState


@dataclass(frozen=True)
class Phase:
    """A part of training. It ends after `epochs`, or before that after `plateau` epochs in a row in which top-1 has not
    risen by more than `plateau_delta`; with a `plateau` of 0 it never ends early. `sizes` are those of its training
    images in pixels, in the order of the epochs: see `image_size`.
    """

    name: str
    frozen: str  # the last frozen stage, or none
    epochs: int
    optimizer: str
    peak_lr: float
    plateau: int
    plateau_delta: float
    sizes: tuple[int, ...]

    @property
    def calmer(self) -> str:
        """What to do where its training diverges."""
        flag = "--head-lr" if self.name == "head" else "--lr"
        return f"lower {flag} {self.peak_lr:g}, or lengthen --warmup, in another --run-dir"

    def trains(self, stage: str) -> bool:
        """Whether the convolutions of a stage train."""
        return self.frozen == "none" or self.frozen < stage


def plan(config: Config) -> list[Phase]:
    """The phases of a run in their order: the head alone (section 4 of the paper), then the whole network."""
    phases = []
    if config.head_epochs:
        phases.append(
            Phase(
                name="head",
                frozen=config.head_freeze,
                epochs=config.head_epochs,
                optimizer=config.head_optimizer,
                peak_lr=config.head_lr,
                plateau=config.plateau,
                plateau_delta=config.plateau_delta,
                sizes=(config.image_size,),
            )
        )
    if config.epochs:
        sizes = tuple(range(config.start_size or config.image_size, config.image_size + 1, 32))
        phases.append(Phase("full", config.freeze, config.epochs, config.optimizer, config.lr, 0, 0.0, sizes))
    return phases


def image_size(phase: Phase, epoch: int) -> int:
    """Height and width of the training images in an epoch of the phase, from 0.

    The sizes below the largest divide the first two thirds of the epochs (rounded down) among them.
    """
    growing = 2 * phase.epochs // 3
    return phase.sizes[epoch * (len(phase.sizes) - 1) // growing] if epoch < growing else phase.sizes[-1]


def averaged_before(phases: list[Phase], position: TrainState, last: int) -> int:
    """How many of the `last` epochs of a run were over before the one under way; negative before these."""
    if position.phase < len(phases) - 1:
        return -1
    return position.phase_epoch - (phases[-1].epochs - last)


def finish_epoch(phases: list[Phase], position: TrainState, top1: float) -> None:
    """Moves `position` past an epoch whose validation gave `top1`: to the next epoch, the next phase, or the end."""
    phase = phases[position.phase]
    position.epoch += 1
    position.phase_epoch += 1
    position.step_in_epoch = 0
    position.best_top1 = max(position.best_top1, top1)
    if top1 > position.plateau_top1 + phase.plateau_delta:
        position.plateau_top1, position.plateau_age = top1, 0
    else:
        position.plateau_age += 1
    flat = 0 < phase.plateau <= position.plateau_age
    if flat or position.phase_epoch == phase.epochs:
        position.phase += 1
        position.phase_epoch = position.plateau_age = 0
        position.plateau_top1 = -1.0
        position.done = position.phase == len(phases)


def learning_rate(phase: Phase, step: int, steps_per_epoch: int, warmup_epochs: float) -> float:
    """The learning rate of a step of the phase: linear warmup, then half a cosine down to zero (Loshchilov and Hutter
    2017, eq. 5).

    A phase that may end at a plateau stays at its peak, as the length that a cosine needs is not known beforehand.
    """
    warmup = int(warmup_epochs * steps_per_epoch)
    total = phase.epochs * steps_per_epoch
    if step < warmup:
        return phase.peak_lr * (step + 1) / (warmup + 1)
    if phase.plateau:
        return phase.peak_lr
    progress = (step - warmup) / max(1, total - warmup)
    return phase.peak_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(phase: Phase, network: Network, config: Config) -> torch.optim.Optimizer:
    """The phase's fused optimiser, over the parameters that train. Biases and batch norms have no weight decay.

    On a GPU the learning rate is a tensor there (float32, one for all groups of one `lr_scale`); Apex reads it on the
    host.

    Raises InputError if --apex is given and NVIDIA Apex is not installed, or there is no GPU.
    """
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    kinds: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, p in trained:
        plain = p.ndim == 1 or "bias" in name
        kinds.setdefault((-lr_scale(name, config), plain), []).append(p)
    groups = [
        {"params": members, "weight_decay": 0.0 if plain else config.weight_decay, "lr_scale": -scale}
        for (scale, plain), members in sorted(kinds.items(), key=lambda item: item[0])
    ]
    if config.apex:
        return _apex_optimizer(phase, groups, config)
    optimizer: torch.optim.Optimizer
    on_gpu = trained[0][1].is_cuda
    if phase.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=phase.peak_lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
        )
        # torch makes these uninitialised at the first step, and where the loss scaler has that step skipped (in fp16,
        # at a scale that is still too large) the second one would add what happened to lie in memory.
        for _, p in trained if config.momentum else ():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    else:
        optimizer = torch.optim.AdamW(groups, lr=phase.peak_lr, fused=True, capturable=on_gpu)
    if on_gpu:
        rates = {group["lr_scale"]: torch.zeros((), device=trained[0][1].device) for group in groups}
        for group in optimizer.param_groups:
            group["lr"] = rates[group["lr_scale"]]
    return optimizer


def lr_scale(name: str, config: Config) -> float:
    """The factor of a parameter's learning rate: 1 for the head, and --layer-decay times that for each stage from the
    deepest one that is read down to the first convolution."""
    stages = [layer for stage, layer in LAYERS.items() if stage <= config.read_stages[-1]]
    for above, layer in enumerate([*reversed(stages), "bn1", "conv1"], start=1):
        if name.startswith(f"backbone.{layer}."):
            return config.layer_decay ** min(above, len(stages) + 1)
    return 1.0


def _apex_optimizer(phase: Phase, groups: list[dict], config: Config) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import (  # NVIDIA's; PyPI's package of that name has no optimizers
            FusedAdam,
            FusedSGD,
        )
    except ImportError as error:
        raise InputError(f"--apex: NVIDIA Apex is not installed ({error}); leave the flag out") from error
    if not groups[0]["params"][0].is_cuda:
        raise InputError("--apex: NVIDIA Apex needs a GPU; leave the flag out")
    try:
        if phase.optimizer == "sgd":
            return FusedSGD(groups, lr=phase.peak_lr, momentum=config.momentum, nesterov=config.momentum > 0)
        return FusedAdam(groups, lr=phase.peak_lr, adam_w_mode=True)
    except RuntimeError as error:  # built without its CUDA extension
        raise InputError(
            f"--apex: {error}; build Apex with APEX_CUDA_EXT=1, or leave the flag out"
        ) from error
