"""Operators that need more than the CPU's kernel of the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from softgpu import graphs, lstm, watching
from softgpu.host import Placement, alias, region

aten = torch.ops.aten


def _cudnn_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    y, save_mean, save_invstd = torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    if not training:
        save_mean, save_invstd = x.new_empty(0), x.new_empty(0)
    return y, save_mean, save_invstd, torch.empty(0, dtype=torch.uint8)


def _cudnn_batch_norm_backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    save_mean: Tensor | None,
    save_invstd: Tensor | None,
    eps: float,
    reserve: Tensor,
) -> tuple[Tensor, ...]:
    return aten.native_batch_norm_backward(
        dy, x, weight, mean, var, save_mean, save_invstd, True, eps, [True, True, True]
    )


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return aten._log_softmax(x, dim, False)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return aten._softmax(x, dim, False)


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    watching.note_operator("copy_", [self, src])
    if not (self.is_cuda and src.is_cuda):
        # Between host and device: torch's own way, through pinned memory or not, with its waiting.
        return aten.copy_.default._op_dk(
            torch._C.DispatchKey.CompositeExplicitAutograd, self, src, non_blocking
        )
    graph = graphs.capturing(self.device.index)
    to, source = alias(self), alias(src)
    if graph:
        graphs.keep(graph, [region(self)])
        graphs.record(graph, lambda: _host_copy(to, source))
    _host_copy(to, source)
    return self


def _host_copy(to: Tensor, source: Tensor) -> None:
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
        to.copy_(source)


def _foreach_copy(self: list[Tensor], src: list[Tensor], non_blocking: bool = False) -> None:
    for to, source in zip(self, src, strict=True):
        to.copy_(source, non_blocking)


def _equal(a: Tensor, b: Tensor) -> bool:
    watching.note_operator("equal", [a, b])
    placement = Placement("equal", host_tensors=False)
    on_host = [placement.to_host(t) for t in (a, b)]
    torch.cuda.current_stream(placement.device).synchronize()
    return torch.equal(*on_host)


# Computed on aliases, in place of the CPU's kernel.
COMPUTED: dict[str, Callable[..., Any]] = {
    "cudnn_batch_norm": _cudnn_batch_norm,
    "cudnn_batch_norm_backward": _cudnn_batch_norm_backward,
    "_log_softmax": _log_softmax,
    "_softmax": _softmax,
    "_cudnn_rnn": lstm.cudnn_rnn,
    "_cudnn_rnn_backward": lstm.cudnn_rnn_backward,
}
# Given the device's tensors themselves.
WHOLE: dict[str, Callable[..., Any]] = {"copy_": _copy, "_foreach_copy_": _foreach_copy, "equal": _equal}
