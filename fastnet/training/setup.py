"""What a run trains with, checked before the first step: precision, threads, what computes the LSTMs, CUDA graphs."""

from __future__ import annotations

import socket
from typing import Any

import torch

from fastnet.config import Config, first_change
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.device import has_bf16, threads_per_rank
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.network.network import lstm_backend
from fastnet.provenance import machine_memory
from fastnet.training.phases import plan

# Settings in which ranks may differ: rank 0 alone reads the weights.
OF_A_RANK = {"threads", "weights"}


def check_alike(config: Config, data: PreparedSet, runtime: Runtime) -> None:
    """Raises InputError, on every rank, where ranks have other settings or another set than rank 0: commands are typed,
    and sets copied, on each host. Collective."""
    where = f"rank {runtime.rank} on {socket.gethostname()}"
    (first, main_config, main_hash), *others = runtime.gather((where, config, data.hash))
    for other, its_config, its_hash in others:
        if its_hash != main_hash:
            raise InputError(f"--data: {other} has another set than {first}; prepare it once, and copy it")
        changed = first_change(main_config, its_config, OF_A_RANK)
        if changed:
            flag, one, another = changed
            raise InputError(f"{flag} {one}: {other} has {flag} {another}; give all ranks the same")


def choices(config: Config, runtime: Runtime) -> dict[str, Any]:
    """What runs where. Raises InputError for a choice that cannot run here."""
    dtype = runtime.dtype
    if config.compile:
        check_compiler(runtime.device)
    if dtype is torch.bfloat16 and runtime.device.type == "cpu" and not has_bf16():
        runtime.say("--precision bf16: this processor has no instructions for it; fp32 is many times as fast")
    return {
        "device": runtime.device.type,
        "ranks": runtime.world_size,
        "precision": str(dtype).removeprefix("torch."),
        "threads": config.threads or threads_per_rank(),
        "lstm_backend": lstm_backend(config, runtime.device, dtype),
        "cuda_graph": resolve_graph(config, runtime.device),
        "validation": "holdout" if config.holdout else "val",
    }


def resolve_graph(config: Config, device: torch.device) -> str:
    """What `--cuda-graph` means on this device. Raises InputError where "on" cannot be."""
    reason = None
    if device.type != "cuda":
        reason = "there is no GPU here"
    elif config.apex:
        reason = "with --apex the learning rate is on the host, where a graph cannot see it change"
    if reason and config.cuda_graph == "on":
        raise InputError(f"--cuda-graph on: {reason}; use auto or off")
    return "off" if reason else config.cuda_graph


def check_compiler(device: torch.device) -> None:
    """Raises InputError where --compile has no compiler: torch.compile's for the CPU is g++ or clang++."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a second
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "--compile: there is no C++ compiler here; install g++, set $CXX, or leave it out"
        ) from error


def check_sizes(config: Config, runtime: Runtime) -> None:
    """Raises InputError for a run that could not make its first step: LSTMs that no memory holds, batch norms that
    would see a single value, and images that have no others to be mixed with."""
    parameters = sum(groups * 8 * hidden * (hidden + 1) for groups, _, hidden in config.lstm_stages)
    # float32: the parameters, their gradients, and the two moments of AdamW
    needed, there = 4 * 4 * parameters, _memory(runtime.device)
    if config.network == "lstm" and needed > there:
        raise InputError(
            f"--image-size {config.image_size}: the LSTMs of {', '.join(config.stages)} have {parameters / 1e6:,.0f} "
            f"million parameters and take {needed / 2**30:.0f} GiB to train, of {there / 2**30:.0f} GiB here; use "
            "smaller images, or deeper --stages"
        )
    # auto stops before its parts are too small
    share = config.batch_size // runtime.world_size // (1 if config.accumulate == "auto" else config.parts)
    if share == 1 and config.mixes:
        raise InputError(
            f"--batch-size {config.batch_size}: some rank trains on 1 image at a time, which has no other to be mixed "
            "with (--mixup, --cutmix); use a larger batch, or fewer ranks or parts"
        )
    if share == 1 < fewest_images(config):
        raise InputError(
            f"--batch-size {config.batch_size}: some rank trains on 1 image at a time, in which "
            f"{config.read_stages[-1]} has a single value ({min(trained_sizes(config))} px), too few for batch norm; "
            "use a larger batch, fewer ranks or parts, or larger images"
        )


def fewest_images(config: Config) -> int:
    """How many images a micro-batch must have: batch norm takes no single value, which the last stage may have, and
    mixing takes two."""
    sides = [size // config.stride(config.read_stages[-1]) for size in trained_sizes(config)]
    return 2 if 1 in sides or config.mixes else 1


def trained_sizes(config: Config) -> list[int]:
    """Pixels of the images on which the last stage trains."""
    return [size for phase in plan(config) if phase.trains(config.read_stages[-1]) for size in phase.sizes]


def _memory(device: torch.device) -> int:
    """Bytes of the GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory()
