"""cuDNN's LSTMs, by the CPU's in float32: one layer, one direction, with biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from softgpu import graphs, watching
from softgpu.host import again, alias, to_device

LSTM_MODE = 2  # cuDNN's number for it

# A thread outside autograd's and autocast's guards.
_clean = ThreadPoolExecutor(1, thread_name_prefix="softgpu")


def _run(t: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, B, H], h and c [1, B, H] of x, h, c and four weights."""
    y, h, c = torch._VF.lstm(t[0], (t[1], t[2]), list(t[3:]), True, 1, 0.0, False, False, False)
    return y, h, c


def _time_first(x: Tensor, batch_first: bool) -> Tensor:
    return x.transpose(0, 1) if batch_first else x


def _forward(x: Tensor, hx: Tensor, cx: Tensor, weight: Sequence[Tensor], batch_first: bool) -> list[Tensor]:
    t = [a.float() for a in (_time_first(x, batch_first), hx, cx, *weight)]

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _run(t)

    y, h, c = _clean.submit(run).result()
    return [a.to(x.dtype) for a in (_time_first(y, batch_first), h, c)]


def _backward(
    x: Tensor,
    hx: Tensor,
    cx: Tensor,
    weight: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    batch_first: bool,
) -> list[Tensor]:
    """Gradients of x, hx, cx and the weights from those of output, h and c."""
    t = [a.float() for a in (_time_first(x, batch_first), hx, cx, *weight)]
    dy, *d_states = (None if a is None else a.float() for a in gradients)
    d = [None if dy is None else _time_first(dy, batch_first), *d_states]

    def run() -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [a.detach().requires_grad_() for a in t]
            pairs = [(o, g) for o, g in zip(_run(leaves), d, strict=True) if g is not None]
            return torch.autograd.grad(
                [o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True
            )

    found = zip(t, _clean.submit(run).result(), strict=True)
    dx, *rest = (torch.zeros_like(a) if g is None else g for a, g in found)
    return [g.to(x.dtype) for g in (_time_first(dx, batch_first), *rest)]


def cudnn_rnn(
    x: Tensor,
    weight: list[Tensor],
    stride0: int,
    buffer: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    mode: int,
    hidden: int,
    proj: int,
    layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    sizes: list[int],
    state: Tensor | None,
) -> tuple[Tensor, ...]:
    """aten::_cudnn_rnn. Raises NotImplementedError for what is not a plain LSTM."""
    if mode != LSTM_MODE or proj or sizes or cx is None:
        raise _unsupported()
    _check(stride0, layers, bidirectional)
    y, h, c = _forward(x, hx, cx, weight, batch_first)
    return y, h, c, torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=x.dtype)


def cudnn_rnn_backward(
    x: Tensor,
    weight: list[Tensor],
    stride0: int,
    buffer: Tensor,
    hx: Tensor,
    cx: Tensor,
    output: Tensor,
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    mode: int,
    hidden: int,
    proj: int,
    layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    sizes: list[int],
    state: Tensor | None,
    reserve: Tensor,
    mask: list[bool],
) -> tuple[Any, ...]:
    """aten::_cudnn_rnn_backward, of what `cudnn_rnn` took."""
    dx, d_hx, d_cx, *d_weight = _backward(x, hx, cx, weight, [dy, dh, dc], batch_first)
    return dx, d_hx, d_cx, d_weight


class _Differentiable(torch.autograd.Function):
    """torch.lstm, whose way to cuDNN asks cuDNN for a handle before any operator."""

    @staticmethod
    def forward(ctx: Any, batch_first: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.batch_first = batch_first
        return _on_device(batch_first, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        watching.note_operator(
            "lstm_backward", [*ctx.saved_tensors, *(g for g in gradients if g is not None)]
        )
        x, hx, cx, *weight = map(alias, ctx.saved_tensors)
        d = [None if g is None else alias(g) for g in gradients]
        device = ctx.saved_tensors[0].device.index
        return None, *_computed(lambda: _backward(x, hx, cx, weight, d, ctx.batch_first), device)


def _on_device(batch_first: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    watching.note_operator("lstm", tensors)
    x, hx, cx, *weight = map(alias, tensors)
    return tuple(_computed(lambda: _forward(x, hx, cx, weight, batch_first), tensors[0].device.index))


def _computed(compute: Callable[[], list[Tensor]], device: int) -> list[Tensor]:
    """The results of `compute` on the GPU `device`, and those of each replay in the same places."""
    views: list[Tensor | None] = []
    with torch._C._AutoDispatchBelowAutograd():
        made = to_device(compute(), None, device, views)
    if graph := graphs.capturing(device):
        graphs.record(graph, lambda: again(views, compute()))
    return made


def _input(compute: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """aten::lstm.input by `compute`."""

    def lstm(
        x: Tensor,
        hx: list[Tensor],
        weight: list[Tensor],
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        _check(len(weight) if biases else 0, layers, bidirectional)
        return compute(batch_first, x, *hx, *weight)

    return lstm


differentiable, forward = _input(_Differentiable.apply), _input(_on_device)


def _check(weights: int, layers: int, bidirectional: bool) -> None:
    if weights != 4 or layers != 1 or bidirectional:
        raise _unsupported()


def _unsupported() -> NotImplementedError:
    return NotImplementedError("softgpu: of cuDNN's RNNs only one-layer LSTMs with biases are computed")
