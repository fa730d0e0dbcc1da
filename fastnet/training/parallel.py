"""A network on several ranks: gradients summed by DistributedDataParallel, and one rank's weights for all."""

from __future__ import annotations

import contextlib
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastnet.distributed.ranks import Runtime
from fastnet.network.network import Network


def data_parallel(network: Network, runtime: Runtime, *, compiled: bool) -> nn.Module:
    """`network` as the ranks train it together, through torch.compile if it is to be `compiled`. Wrap it anew for each
    phase."""
    inner: nn.Module = network
    if compiled:
        inner = cast(nn.Module, torch.compile(network, fullgraph=True, dynamic=False))
    if runtime.world_size == 1:
        return inner
    model = DistributedDataParallel(
        inner,
        device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )
    _settle_buckets(model, network, runtime)
    return model


def _settle_buckets(model: nn.Module, network: Network, runtime: Runtime) -> None:
    """One backward pass without effect. DDP reorders its gradient buckets after the first one, and the order of the
    sums decides their last bits: a continued run must not do that at another step than one that never stopped."""
    network.eval()
    size = network.image_size
    x = torch.zeros(1, 3, size, size, device=runtime.device).to(memory_format=torch.channels_last)
    # Timing cuDNN's algorithms for this one image would serve no later step.
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    # Nor would compiling the network for it.
    with torch.compiler.set_stance("force_eager"):
        with runtime.autocast():
            logits = model(x)
        logits.sum().backward()
    torch.backends.cudnn.benchmark = benchmark
    network.zero_grad(set_to_none=True)
    network.train()


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Keeps the gradients of a micro-batch to this rank, until the last one of a step sums them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def dismiss(model: nn.Module) -> None:
    """Ends `model`, whose network is about to be wrapped anew. After a backward pass that broke off, DDP would count
    the next one's gradients to it, and sum them on this rank alone."""
    if isinstance(model, DistributedDataParallel):
        model._remove_autograd_hooks()


def share_weights(network: Network, runtime: Runtime) -> None:
    """Gives every rank the weights and batch norm statistics of rank 0, which are the ones that checkpoints keep."""
    if runtime.world_size > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)
