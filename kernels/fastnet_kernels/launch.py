"""Forward and backward of a whole call: packing, the parallel GEMMs, the recurrent launches.

Works on GPU tensors, and on CPU tensors in Triton's interpreter. Legend in plan.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import fused_backward, fused_forward, gemm, packing
from .naive import Stage, Weights
from .plan import BATCH_TILE, Plan, is_split, padded_batch, plans_for, programs, sizes

PACK_INPUTS = 32  # inputs in a tile of packing and unpacking
_PARTS = 16  # at most so many partial sums of a weight gradient, each over at least so many rows:
_PART_ROWS = 1024

_said = False


def gemm_tiles(dtype: torch.dtype) -> dict[str, int]:
    """Rows of a GEMM tile, the most of K in one, and how to run it; float32 runs on the FMA units, in smaller tiles."""
    if dtype == torch.float32:
        return {"ROWS": 32, "MOST": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 192}
    return {"ROWS": 128, "MOST": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 192}


def weight_gradient_tiles(dtype: torch.dtype) -> dict[str, int]:
    """The same for the weights' gradients, where rows are K; MOST is of positions."""
    return gemm_tiles(dtype) | (
        {"ROWS": 16, "MOST": 32} if dtype == torch.float32 else {"ROWS": 32, "MOST": 64}
    )


def recurrent_options(dtype: torch.dtype, *, forward: bool, split: bool) -> dict[str, Any]:
    """Warps, registers per thread (the compiler left alone takes more or spills a few to stay at 128), kind of launch.

    Split kernels hold their part of W_hh in registers, and need all programs on the GPU at once.
    """
    registers = 255 if split or dtype == torch.float32 else 128 if forward else 168
    return {"num_warps": 4, "maxnreg": registers, "launch_cooperative_grid": split}


def forward(
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    stages: Sequence[Stage],
    *,
    save: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output and what backward needs.

    Args:
        features: per stage [B, G*T, h, w] channels_last, all in the dtype of the computation.
        save: keep the packed weights, gates, h and c for backward, without the gates if `recompute`.

    Returns:
        out [B, sum(G*H)], packed weights, gates, h (all flat, dtype of the features), c (flat, float32); what is not
        kept is empty.
    """
    x = features[0]
    batch, bp = x.shape[0], padded_batch(x.shape[0])
    plans = plans_for(x, stages, save=save)
    size = sizes(plans, bp)
    out = x.new_empty(batch, plans[0].outputs)
    gates = x.new_empty(size.gates)
    h = x.new_empty(size.states)
    c = x.new_empty(size.states, dtype=torch.float32)
    keep_gates = save and not recompute
    if is_split(plans):
        _say_split(plans, batch)
    with torch.cuda.device_of(x):
        packed = pack(weights, plans, x.dtype)
        _project(features, weights, plans, packed=packed, h=h, gates=gates, recompute=False)
        recurrent_forward(
            plans, gates=gates, h=h, c=c, packed=packed, out=out, states=save, keep_gates=keep_gates
        )
    return (
        out,
        packed if save else x.new_empty(0),
        gates if keep_gates else x.new_empty(0),
        h if save else x.new_empty(0),
        c if save else x.new_empty(0, dtype=torch.float32),
    )


def backward(
    dout: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    stages: Sequence[Stage],
    packed: Tensor,
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    *,
    needs_dx: bool,
) -> tuple[list[Tensor], list[Weights]]:
    """Gradients of the features (none unless `needs_dx`) and of the weights, each in its own dtype."""
    x = features[0]
    bp = padded_batch(x.shape[0])
    plans = plans_for(x, stages, save=True)
    size = sizes(plans, bp)
    with torch.cuda.device_of(x):
        if gates.numel() == 0:
            gates = x.new_empty(size.gates)
            _project(features, weights, plans, packed=packed, h=h, gates=gates, recompute=True)
        dgates = torch.empty_like(gates)
        carry = x.new_empty(size.carry, dtype=torch.float32)
        recurrent_backward(
            plans, gates=gates, c=c, packed=packed, dout=dout.contiguous(), dgates=dgates, carry=carry
        )
        d_weights = _weight_gradients(features, weights, plans, h=h, dgates=dgates)
        d_features = _input_gradients(features, plans, packed=packed, dgates=dgates) if needs_dx else []
    return d_features, d_weights


def pack(weights: Sequence[Weights], plans: tuple[Plan, ...], dtype: torch.dtype) -> Tensor:
    """The weights of all stages in one flat buffer, as plan.py lays them out."""
    packed = weights[0].ih.new_empty(sizes(plans, 0).weights, dtype=dtype)
    packing.pack_kernel[(sum(_blocks(p.padded, PACK_INPUTS) * p.chunks * p.groups * 2 for p in plans),)](
        ih=tuple(w.ih.contiguous() for w in weights),
        hh=tuple(w.hh.contiguous() for w in weights),
        packed=packed,
        PLANS=plans,
        BK=PACK_INPUTS,
        num_warps=4,
    )
    return packed


def unpack(partial: Tensor, gradients: Sequence[Weights], plans: tuple[Plan, ...], parts: int) -> None:
    """Adds up the `parts` partial sums of each stage into its `gradients`, which are laid out as nn.LSTM's."""
    d_ih, d_hh, d_bias_ih, d_bias_hh = zip(*gradients, strict=True)
    packing.unpack_kernel[(sum(_blocks(p.hidden, PACK_INPUTS) * p.chunks * p.groups * 2 for p in plans),)](
        partial=partial,
        d_ih=d_ih,
        d_hh=d_hh,
        d_bias_ih=d_bias_ih,
        d_bias_hh=d_bias_hh,
        parts=parts,
        PLANS=plans,
        BK=PACK_INPUTS,
        num_warps=4,
    )


def recurrent_forward(
    plans: tuple[Plan, ...],
    *,
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    packed: Tensor,
    out: Tensor,
    states: bool,
    keep_gates: bool,
) -> None:
    batch = out.shape[0]
    fused_forward.forward_kernel[_recurrent_grid(plans, batch)](
        gates=gates,
        h=h,
        c=c,
        packed=packed,
        out=out,
        batch=batch,
        PLANS=plans,
        STATES=states,
        GATES=keep_gates,
        R=BATCH_TILE,
        **recurrent_options(h.dtype, forward=True, split=is_split(plans)),
    )


def recurrent_backward(
    plans: tuple[Plan, ...],
    *,
    gates: Tensor,
    c: Tensor,
    packed: Tensor,
    dout: Tensor,
    dgates: Tensor,
    carry: Tensor,
) -> None:
    batch = dout.shape[0]
    fused_backward.backward_kernel[_recurrent_grid(plans, batch)](
        gates=gates,
        c=c,
        packed=packed,
        dout=dout,
        dgates=dgates,
        carry=carry,
        batch=batch,
        PLANS=plans,
        R=BATCH_TILE,
        **recurrent_options(gates.dtype, forward=False, split=is_split(plans)),
    )


def _say_split(plans: Sequence[Plan], batch: int) -> None:
    global _said
    if not _said and os.environ.get("RANK", "0") == "0":
        _said = True
        parts = ", ".join(f"{p.parts} for {p.hidden} units" for p in plans)
        print(f"channel-group LSTM: batches of {batch} split over programs ({parts})", file=sys.stderr)


def _recurrent_grid(plans: Sequence[Plan], batch: int) -> tuple[int]:
    return (programs(plans) * (padded_batch(batch) // BATCH_TILE),)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _project(
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    plans: tuple[Plan, ...],
    *,
    packed: Tensor,
    h: Tensor,
    gates: Tensor,
    recompute: bool,
) -> None:
    batch, tiles = features[0].shape[0], gemm_tiles(packed.dtype)
    bp, rows = padded_batch(batch), tiles["ROWS"]
    gemm.project_kernel[(sum(_blocks(bp * p.steps, rows) * p.chunks * p.groups for p in plans),)](
        x=tuple(features),
        packed=packed,
        bias_ih=tuple(w.bias_ih.contiguous() for w in weights),
        bias_hh=tuple(w.bias_hh.contiguous() for w in weights),
        h=h,
        gates=gates,
        batch=batch,
        padded_batch=bp,
        PLANS=plans,
        RECOMPUTE=recompute,
        **tiles,
    )


def _input_gradients(
    features: Sequence[Tensor], plans: tuple[Plan, ...], *, packed: Tensor, dgates: Tensor
) -> list[Tensor]:
    batch, tiles = features[0].shape[0], gemm_tiles(packed.dtype)
    dx = [torch.empty_like(f, memory_format=torch.channels_last) for f in features]
    programs = (
        _blocks(batch * p.steps, tiles["ROWS"]) * p.groups * _blocks(p.hidden, p.positions) for p in plans
    )
    gemm.input_gradient_kernel[(sum(programs),)](
        dgates=dgates,
        packed=packed,
        dx=tuple(dx),
        batch=batch,
        padded_batch=padded_batch(batch),
        PLANS=plans,
        **tiles,
    )
    return dx


def _weight_gradients(
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    plans: tuple[Plan, ...],
    *,
    h: Tensor,
    dgates: Tensor,
) -> list[Weights]:
    batch, tiles = features[0].shape[0], weight_gradient_tiles(h.dtype)
    bp, most = padded_batch(batch), tiles["MOST"]
    parts = max(1, min(_PARTS, bp * max(p.steps for p in plans) // _PART_ROWS))
    partial = h.new_empty(parts * sizes(plans, 0).partial, dtype=torch.float32)
    programs = (_blocks(p.hidden, min(p.positions, most)) * p.chunks * p.groups * parts for p in plans)
    gemm.weight_gradient_kernel[(2 * sum(programs),)](
        dgates=dgates,
        x=tuple(features),
        h=h,
        partial=partial,
        batch=batch,
        padded_batch=bp,
        parts=parts,
        PLANS=plans,
        **tiles,
    )
    gradients = [
        Weights(*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in w)) for w in weights
    ]
    unpack(partial, gradients, plans, parts)
    return gradients
