"""Stands in for apex.optimizers: the constructors, methods and state of NVIDIA's, computed by PyTorch.

As NVIDIA's kernels do, it takes tensors in the order in which they lie in memory: a gradient in another memory format
than its parameter's would be a wrong result and no error. `launches` counts what NVIDIA's would start: one for each 320
blocks of 65,536 elements, or each full list of tensors (csrc/multi_tensor_apply.cuh).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK, BLOCKS = 65_536, 320
TENSORS = {3: 48, 4: 36}  # in one launch, by the number of lists

launches = 0


def apply(*lists: list[Tensor]) -> Iterable[tuple[Tensor, ...]]:
    """The tensors of the lists side by side, each flat as it lies in memory; counts the launches for them."""
    global launches
    tensors = blocks = 0
    for together in zip(*lists, strict=True):
        tensors += 1
        for left in range(-(-together[0].numel() // BLOCK) - 1, -1, -1):
            blocks += 1
            if blocks == BLOCKS or (tensors == TENSORS[len(lists)] and not left):
                launches, tensors, blocks = launches + 1, 1 if left else 0, 0
    launches += blocks > 0
    return [tuple(map(_flat, together)) for together in zip(*lists, strict=True)]


def _flat(tensor: Tensor) -> Tensor:
    assert tensor.is_cuda and tensor.dtype == torch.float32
    assert tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        assert not dampening and not wd_after_momentum
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**defaults, "dampening": dampening})

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            first = not any("momentum_buffer" in self.state[p] for p in trained)
            for p in trained:
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffers = [self.state[p]["momentum_buffer"] for p in trained]
            rate, momentum = float(group["lr"]), group["momentum"]
            for grad, weight, buffer in apply([p.grad for p in trained], trained, buffers):
                change = grad + group["weight_decay"] * weight
                buffer.copy_(change if first else buffer * momentum + change)
                weight.sub_(rate * (change + momentum * buffer if group["nesterov"] else buffer))


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert adam_w_mode and bias_correction and not amsgrad and not capturable and not master_weights
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()

    @torch.no_grad()
    def step(self, closure: None = None, *deprecated: None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if not self.state[p]:
                    self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            means, squares = ([self.state[p][name] for p in trained] for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            for grad, weight, mean, square in apply([p.grad for p in trained], trained, means, squares):
                mean.mul_(beta1).add_((1 - beta1) * grad)
                square.mul_(beta2).add_((1 - beta2) * grad * grad)
                unbiased = square / (1 - beta2 ** group["step"])
                update = mean / (1 - beta1 ** group["step"]) / (unbiased.sqrt() + group["eps"])
                weight.sub_(float(group["lr"]) * (update + group["weight_decay"] * weight))
