"""The recurrent part of the LSTMs by itself, of those providers that it can be taken out of; see lstm_providers.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.lstm_providers import Problem, Provider, cell, projections, recurrent_loop, stacked_parameters
from fastnet_kernels.plan import architecture, is_split, plan, plans_for


def fused_recurrent(p: Problem, *, split: bool) -> Provider:
    """The two recurrent launches by themselves, over buffers of the right shape (forward overwrites its gates)."""
    from fastnet_kernels import launch  # needs triton

    plans = plan(p.stages, p.dtype, architecture(p.device), save=True, split=split)
    size = launch.sizes(plans, launch.padded_batch(p.batch))
    gates, dgates = (torch.randn(size.gates, device=p.device).to(p.dtype) for _ in range(2))
    h = torch.empty(size.states, dtype=p.dtype, device=p.device)
    c = torch.empty(size.states, device=p.device)
    carry = torch.empty(size.carry, device=p.device)
    out = torch.empty(p.batch, plans[0].outputs, dtype=p.dtype, device=p.device)
    with torch.no_grad():
        packed = launch.pack(p.module.weights(), plans, p.dtype)

    def forward() -> Tensor:
        launch.recurrent_forward(
            plans, gates=gates, h=h, c=c, packed=packed, out=out, states=True, keep_gates=True
        )
        return out

    def backward(_: Tensor) -> None:
        launch.recurrent_backward(
            plans, gates=gates, c=c, packed=packed, dout=p.dout, dgates=dgates, carry=carry
        )

    return Provider(forward, [], backward=backward)


def recurrent_providers(p: Problem, *, quick: bool) -> dict[str, Callable[[Problem], Provider]]:
    """The recurrent part alone, over inputs projected beforehand, of those that it can be taken out of.

    The fused one comes twice where small batches are split (see plan.py): as it is then, and as it would be otherwise.
    """

    def looped(q: Problem, step: Callable) -> Provider:
        flat, weights = stacked_parameters(q, q.dtype)
        with torch.no_grad():
            given = [x.contiguous() for x in projections(q, weights)]
        leaves = [*(x.requires_grad_() for x in given), *flat[1::4]]
        forward = lambda: recurrent_loop(given, flat[1::4], step)
        return Provider(forward, leaves, backward=lambda y: torch.autograd.grad(y, leaves, q.dout))

    rows: dict[str, Callable[[Problem], Provider]] = {"batched eager loop": lambda q: looped(q, cell)}
    if p.device.type == "cuda":
        rows["fastnet (fused)"] = partial(fused_recurrent, split=False)
        if is_split(plans_for(p.features[0], p.stages, save=True)):
            rows["fastnet (fused, split)"] = partial(fused_recurrent, split=True)
    if not quick:
        rows["compiled cell"] = lambda q: looped(q, torch.compile(cell))
    return rows
