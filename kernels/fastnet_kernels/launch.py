"""Forward and backward of a whole call: packing, the parallel GEMMs, the recurrent launches.

Works on GPU tensors, and on CPU tensors in Triton's interpreter. Legend in plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from . import fused, gemm
from .naive import Stage, Weights
from .plan import BATCH_TILE, Plan, pack, padded_batch, plans_for, sizes, unpack

_PARTS = 16  # at most so many partial sums of a weight gradient, each over at least so many rows:
_PART_ROWS = 1024


def gemm_tiles(dtype: torch.dtype, p: Plan) -> dict[str, Any]:
    """Rows and K of a GEMM tile and how to run it; float32 runs on the FMA units, in smaller tiles."""
    if dtype == torch.float32:
        return {"ROWS": 32, "BK": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 192}
    return {"ROWS": 128, "BK": min(32, p.padded), "num_warps": 8, "num_stages": 3, "maxnreg": 192}


def recurrent_options(dtype: torch.dtype, *, forward: bool) -> dict[str, int]:
    """Warps, and registers per thread: the compiler left alone takes more or spills a few to stay at 128."""
    registers = 255 if dtype == torch.float32 else 128 if forward else 168
    return {"num_warps": 4, "maxnreg": registers}


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _stage_slices(buffer: Tensor, plans: Sequence[Plan], batch: int, what: str) -> list[Tensor]:
    """Each stage's part of a flat buffer, from its beginning."""
    bp = padded_batch(batch)
    return [buffer[getattr(p, what) * bp :] for p in plans]


def forward(
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    stages: Sequence[Stage],
    *,
    save: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output and what backward needs.

    Args:
        features: per stage [B, G*T, h, w] channels_last, all in the dtype of the computation.
        save: keep gates, h and c for backward, without the gates if `recompute`.

    Returns:
        out [B, sum(G*H)], gates, h (both flat, dtype of the features), c (flat, float32); what is not kept is empty.
    """
    x = features[0]
    batch, bp = x.shape[0], padded_batch(x.shape[0])
    plans = plans_for(x, stages, save=save)
    size = sizes(plans, bp)
    gates = x.new_empty(size.gates)
    h = x.new_empty(size.states)
    c = x.new_empty(size.states, dtype=torch.float32)
    out = x.new_empty(batch, plans[0].outputs)
    with on_device(x):
        packed = [pack(w, p, x.dtype) for w, p in zip(weights, plans, strict=True)]
        for feature, (w_ih, w_hh, bias), p, part in zip(
            features, packed, plans, _stage_slices(gates, plans, batch, "gates_at"), strict=True
        ):
            _project(feature, w_ih, bias, part, w_hh, part, p, recompute=False)
        w_hh = torch.cat([hh.flatten() for _, hh, _ in packed])
        grid = (sum(p.groups for p in plans) * (bp // BATCH_TILE),)
        keep_gates = save and not recompute
        fused.forward_kernel[grid](
            gates,
            h,
            c,
            w_hh,
            out,
            batch,
            PLANS=plans,
            STATES=save,
            GATES=keep_gates,
            R=BATCH_TILE,
            **recurrent_options(x.dtype, forward=True),
        )
    return (
        out,
        gates if keep_gates else x.new_empty(0),
        h if save else x.new_empty(0),
        c if save else x.new_empty(0, dtype=torch.float32),
    )


def backward(
    dout: Tensor,
    features: Sequence[Tensor],
    weights: Sequence[Weights],
    stages: Sequence[Stage],
    gates: Tensor,
    h: Tensor,
    c: Tensor,
    *,
    needs_dx: bool,
) -> tuple[list[Tensor], list[Weights]]:
    """Gradients of the features (none unless `needs_dx`) and of the weights, each in its own dtype."""
    x = features[0]
    batch, bp = x.shape[0], padded_batch(x.shape[0])
    plans = plans_for(x, stages, save=True)
    size = sizes(plans, bp)
    with on_device(x):
        packed = [pack(w, p, x.dtype) for w, p in zip(weights, plans, strict=True)]
        h_parts = _stage_slices(h, plans, batch, "states_at")
        if gates.numel() == 0:
            gates = x.new_empty(size.gates)
            parts = _stage_slices(gates, plans, batch, "gates_at")
            for feature, (w_ih, w_hh, bias), p, part, h_part in zip(
                features, packed, plans, parts, h_parts, strict=True
            ):
                _project(feature, w_ih, bias, h_part, w_hh, part, p, recompute=True)
        dgates = torch.empty_like(gates)
        dh, dc = (x.new_empty(size.carry, dtype=torch.float32) for _ in range(2))
        w_hh = torch.cat([hh.flatten() for _, hh, _ in packed])
        grid = (sum(p.groups for p in plans) * (bp // BATCH_TILE),)
        fused.backward_kernel[grid](
            gates,
            c,
            w_hh,
            dout.contiguous(),
            dgates,
            dh,
            dc,
            batch,
            PLANS=plans,
            R=BATCH_TILE,
            **recurrent_options(x.dtype, forward=False),
        )
        d_parts = _stage_slices(dgates, plans, batch, "gates_at")
        d_weights = [
            _weight_gradients(f, h_part, d, w, p)
            for f, h_part, d, w, p in zip(features, h_parts, d_parts, weights, plans, strict=True)
        ]
        d_features = []
        if needs_dx:
            for f, (w_ih, _, _), d, p in zip(features, packed, d_parts, plans, strict=True):
                d_features.append(_input_gradient(f, w_ih, d, p))
    return d_features, d_weights


def _project(
    x: Tensor, w_ih: Tensor, bias: Tensor, h: Tensor, w_hh: Tensor, gates: Tensor, p: Plan, *, recompute: bool
) -> None:
    batch, bp, tiles = x.shape[0], padded_batch(x.shape[0]), gemm_tiles(x.dtype, p)
    grid = (triton.cdiv(bp * p.steps, tiles["ROWS"]) * p.chunks * p.groups,)
    gemm.project_kernel[grid](x, w_ih, bias, h, w_hh, gates, batch, bp, P=p, RECOMPUTE=recompute, **tiles)


def _input_gradient(x: Tensor, w_ih: Tensor, dgates: Tensor, p: Plan) -> Tensor:
    batch, tiles = x.shape[0], gemm_tiles(x.dtype, p)
    block = min(64, triton.next_power_of_2(max(p.hidden, 16)))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    grid = (triton.cdiv(batch * p.steps, tiles["ROWS"]) * p.groups * triton.cdiv(p.hidden, block),)
    gemm.input_gradient_kernel[grid](dgates, w_ih, dx, batch, padded_batch(batch), P=p, BN=block, **tiles)
    return dx


def _weight_gradients(x: Tensor, h: Tensor, dgates: Tensor, weights: Weights, p: Plan) -> Weights:
    batch, bp = x.shape[0], padded_batch(x.shape[0])
    tile = gemm_tiles(x.dtype, p) | {"ROWS": 16 if x.dtype == torch.float32 else 32}
    tile["BK"] = min(32 if x.dtype == torch.float32 else 64, triton.next_power_of_2(max(p.hidden, 16)))
    rows = triton.cdiv(bp * p.steps, tile["ROWS"])
    parts = max(1, min(_PARTS, bp * p.steps // _PART_ROWS))
    grid = (triton.cdiv(p.hidden, tile["BK"]) * p.chunks * p.groups * parts,)
    result = []
    for source, hidden in ((x, False), (h, True)):
        partial = x.new_empty(parts, p.groups, 4 * p.padded, p.hidden, dtype=torch.float32)
        gemm.weight_gradient_kernel[grid](
            dgates, source, partial, batch, bp, triton.cdiv(rows, parts), P=p, HIDDEN=hidden, **tile
        )
        result.append(unpack(partial.sum(0), p))
    d = dgates[: p.groups * p.steps * bp * 4 * p.padded].view(p.groups, p.steps, bp, 4 * p.padded)
    bias = unpack(d.sum((1, 2), dtype=torch.float32)[..., None], p)[..., 0]
    d_ih, d_hh = result
    # A tensor of its own for each bias: the outputs of an operator may not share memory.
    return Weights(
        d_ih.to(weights.ih.dtype),
        d_hh.to(weights.hh.dtype),
        bias.to(weights.bias_ih.dtype),
        bias.to(weights.bias_hh.dtype, copy=True),
    )
