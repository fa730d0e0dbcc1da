"""The channel-group LSTM as a function: the custom operator, and which backend computes it.

The Triton kernels are one operator forward and one backward, opaque to autograd, torch.compile and torch.export,
which see their fake implementations. torch's own LSTMs (oneDNN, cuDNN) need no operator.

Legend: B batch, G groups, T steps, S input size = H hidden size.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .naive import Stage, Weights, naive
from .plan import architecture, padded_batch, plan, sizes

Backend = Literal["auto", "triton", "torch"]

LARGEST_HIDDEN = 1024  # of the Triton kernels: their launch table ends there

_announced = False


def channel_group_lstm(
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    stages: Sequence[Stage],
    *,
    backend: Backend = "auto",
    recompute: bool = False,
) -> Tensor:
    """The last hidden states of all groups of all stages (see naive.py for the equations).

    Under autocast the computation runs in autocast's dtype, otherwise in that of the features; the weights
    are cast to it, their gradients arrive in their own dtype. Twice differentiable with the torch backend only.

    Args:
        features: per stage [B, G*T, h, w] with h*w = H, best channels_last; float32, float16 or bfloat16.
        weights: per stage, usually float32 parameters.
        backend: "auto" is Triton on a GPU that it supports, else torch.
        recompute: save less for backward (hidden and cell states only), compute the gates again.

    Returns:
        [B, sum(G*H)] in the dtype of the computation.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown backend.
        RuntimeError: the backend asked for cannot run here.
    """
    used = select(features, weights, stages, backend)
    return compute(features, weights, stages, backend=used, recompute=recompute)


def select(
    features: Sequence[Tensor], weights: Sequence[Weights], stages: Sequence[Stage], backend: Backend
) -> Backend:
    """The backend that computes this call. Raises what channel_group_lstm does."""
    check(features, weights, stages)
    x = features[0]
    return choose(backend, x.device, compute_dtype(x), max(s.hidden for s in stages))


def compute(
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    stages: Sequence[Stage],
    *,
    backend: Backend,
    recompute: bool,
) -> Tensor:
    """channel_group_lstm by a backend that `select` gave for these arguments."""
    dtype = compute_dtype(features[0])
    cast = [f.to(dtype) for f in features]
    if backend == "torch":
        with torch.autocast(features[0].device.type, enabled=False):
            return _torch(cast, weights, stages)
    flat = [p for w in weights for p in w]
    numbers = [n for s in stages for n in s]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (*cast, *flat))
    return _forward(cast, flat, numbers, save, recompute)[0]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype if autocast is on for x's device, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check(features: Sequence[Tensor], weights: Sequence[Weights], stages: Sequence[Stage]) -> None:
    """Raises ValueError unless there are one feature map and one set of weights per stage, of the stage's shapes and on
    one device."""
    if len(features) != len(stages) or len(weights) != len(stages):
        raise ValueError(f"{len(stages)} stages need as many feature maps, got {len(features)}")
    for n, (x, s) in enumerate(zip(features, stages, strict=True)):
        if x.dim() != 4 or x.shape[1] != s.groups * s.seq_len or x.shape[2] * x.shape[3] != s.hidden:
            raise ValueError(
                f"feature map {n} is {list(x.shape)}; stage {n} needs [batch, {s.groups}*{s.seq_len}, h, w] "
                f"with h*w = {s.hidden}"
            )
        if (x.shape[0], x.dtype, x.device) != (features[0].shape[0], features[0].dtype, features[0].device):
            raise ValueError(f"feature map {n} differs from feature map 0 in batch, dtype or device")
        matrix, bias = (s.groups, 4 * s.hidden, s.hidden), (s.groups, 4 * s.hidden)
        if [tuple(w.shape) for w in weights[n]] != [matrix, matrix, bias, bias]:
            shapes = ", ".join(str(list(w.shape)) for w in weights[n])
            raise ValueError(
                f"the weights of stage {n} are {shapes}; it needs two of {list(matrix)} and two of {list(bias)}"
            )
        if any(w.device != x.device for w in weights[n]):
            raise ValueError(f"the weights of stage {n} are not on {x.device}, where its feature map is")
    if features[0].shape[0] == 0:
        raise ValueError("the batch is empty")


@torch.compiler.assume_constant_result
def choose(backend: Backend, device: torch.device, dtype: torch.dtype, hidden: int) -> Backend:
    """The backend that runs on `device` for LSTMs of up to `hidden` units; what auto picks is said once on stderr."""
    global _announced
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is not one of {', '.join(get_args(Backend))}")
    if backend == "torch":
        return "torch"
    obstacle = _obstacle(device, dtype, hidden)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(f"backend='triton' cannot run: {obstacle}")
        return "triton"
    used: Backend = "triton" if device.type == "cuda" and not obstacle else "torch"
    if not _announced and os.environ.get("RANK", "0") == "0":
        _announced = True
        print(f"channel-group LSTM: backend {used}{f' ({obstacle})' if obstacle else ''}", file=sys.stderr)
    return used


def _obstacle(device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """Why the Triton kernels cannot run on `device`, if so."""
    missing = _without_triton()
    if missing:
        return missing
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is not float32, float16 or bfloat16"
    if hidden > LARGEST_HIDDEN:
        return f"{hidden} hidden units, the kernels take up to {LARGEST_HIDDEN}"
    if device.type == "cpu":
        from triton import knobs

        if knobs.runtime.interpret:
            return None
        return "CPU tensors run in Triton's interpreter only, TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"there are no kernels for {device.type} tensors"
    if architecture(device) < 80:
        return f"{device} is older than compute capability 8.0"
    return None


@cache
def _without_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def _torch(features: Sequence[Tensor], weights: Sequence[Weights], stages: Sequence[Stage]) -> Tensor:
    """One call of torch's LSTM per group: oneDNN on the CPU, cuDNN on a GPU.

    torch.compile cannot trace the backward of that call (oneDNN saves absent tensors); it gets the plain loop.
    """
    if torch.compiler.is_compiling():
        dtype = features[0].dtype
        return naive(features, [Weights(*(p.to(dtype) for p in w)) for w in weights], stages)
    outputs = []
    for feature, w, (groups, seq_len, hidden) in zip(features, weights, stages, strict=True):
        batch, dtype = feature.shape[0], feature.dtype
        x = feature.reshape(batch, groups, seq_len, hidden)  # [B, G, T, S]
        zeros = x.new_zeros(1, batch, hidden)
        for g in range(groups):
            flat = [p[g].to(dtype) for p in w]
            last = torch._VF.lstm(
                x[:, g].transpose(0, 1),
                (zeros, zeros),
                flat,
                True,
                1,
                0.0,
                torch.is_grad_enabled(),
                False,
                False,
            )[1]  # [1, B, H]
            outputs.append(last[0])
    return torch.cat(outputs, dim=1)


def _kernels() -> ModuleType:
    from . import launch  # not at import: needs triton, and TRITON_INTERPRET is read then

    return launch


def _stages(numbers: Sequence[int]) -> list[Stage]:
    return [Stage(*numbers[n : n + 3]) for n in range(0, len(numbers), 3)]


def _weights(flat: Sequence[Tensor]) -> list[Weights]:
    return [Weights(*flat[n : n + 4]) for n in range(0, len(flat), 4)]


def _channels_last(features: Sequence[Tensor]) -> list[Tensor]:
    return [f.contiguous(memory_format=torch.channels_last) for f in features]


@torch.library.custom_op("fastnet::channel_group_lstm", mutates_args=())
def _forward(
    features: list[Tensor], weights: list[Tensor], stages: list[int], save: bool, recompute: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """stages: (groups, seq_len, hidden) one after the other. Returns what launch.forward does."""
    return _kernels().forward(
        _channels_last(features), _weights(weights), _stages(stages), save=save, recompute=recompute
    )


@_forward.register_fake
def _(
    features: list[Tensor], weights: list[Tensor], stages: list[int], save: bool, recompute: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, batch = features[0], features[0].shape[0]
    # Split or not: all the same here.
    plans = plan(_stages(stages), x.dtype, architecture(x.device), save=save)
    size = sizes(plans, padded_batch(batch))
    return (
        x.new_empty(batch, plans[0].outputs),
        x.new_empty(size.weights if save else 0),
        x.new_empty(size.gates if save and not recompute else 0),
        x.new_empty(size.states if save else 0),
        x.new_empty(size.states if save else 0, dtype=torch.float32),
    )


@torch.library.custom_op("fastnet::channel_group_lstm_backward", mutates_args=())
def _backward(
    dout: Tensor, features: list[Tensor], weights: list[Tensor],
    packed: Tensor, gates: Tensor, h: Tensor, c: Tensor, stages: list[int], needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients of the features, if needed, then of the weights."""
    d_features, d_weights = _kernels().backward(
        dout,
        _channels_last(features),
        _weights(weights),
        _stages(stages),
        packed,
        gates,
        h,
        c,
        needs_dx=needs_dx,
    )
    return [*d_features, *(d for w in d_weights for d in w)]


@_backward.register_fake
def _(
    dout: Tensor, features: list[Tensor], weights: list[Tensor],
    packed: Tensor, gates: Tensor, h: Tensor, c: Tensor, stages: list[int], needs_dx: bool,
) -> list[Tensor]:  # fmt: skip
    d_features = [torch.empty_like(f, memory_format=torch.channels_last) for f in features if needs_dx]
    return [*d_features, *(torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, weights, stages, save, _ = inputs
    ctx.stages, ctx.n, ctx.save = stages, len(features), save
    ctx.save_for_backward(*features, *weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward fills zeros of the size of all that is saved


def _gradient(ctx: Any, dout: Tensor, *_: Any) -> tuple[Any, ...]:
    if not ctx.save:
        raise RuntimeError(
            "fastnet::channel_group_lstm was called with save=False and cannot be differentiated"
        )
    *tensors, packed, gates, h, c = ctx.saved_tensors
    features, weights = tensors[: ctx.n], tensors[ctx.n :]
    needs_dx = any(ctx.needs_input_grad[0])
    gradients = _backward(dout, features, weights, packed, gates, h, c, ctx.stages, needs_dx)
    split = ctx.n if needs_dx else 0
    return gradients[:split] if needs_dx else [None] * ctx.n, gradients[split:], None, None, None


def _no_second_gradient(*_: Any) -> None:
    raise RuntimeError("the Triton channel-group LSTM has no second derivative; use backend='torch' for that")


_forward.register_autograd(_gradient, setup_context=_setup)
_backward.register_autograd(_no_second_gradient)
