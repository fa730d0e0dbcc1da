"""The LSTM cell on a tile of packed columns: what the recurrent kernels and the parallel GEMMs share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) with e = exp(-2x) is inf / inf for large negative x; this form saturates.
    return 2 * sigmoid(2 * x) - 1


@triton.jit
def split(a, R: tl.constexpr, U: tl.constexpr):
    """[R, 4*U] -> i, f, g, o, each [R, U]. Free with U = 8 * warps: a thread holds all gates of its units."""
    a = tl.permute(tl.reshape(a, (R, 2, 2, U)), (0, 3, 1, 2))  # [R, U, {if, go}, {ig, fo}]
    ig, fo = tl.split(a)
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return i, f, g, o


@triton.jit
def merge(i, f, g, o, R: tl.constexpr, U: tl.constexpr):
    """The inverse of split, so that a tile of gates is stored in one coalesced piece."""
    a = tl.join(tl.join(i, g), tl.join(f, o))
    return tl.reshape(tl.permute(a, (0, 2, 3, 1)), (R, 4 * U))


@triton.jit
def activate(a, R: tl.constexpr, U: tl.constexpr):
    """Pre-activations [R, 4*U] -> gates i, f, g, o, each [R, U]."""
    i, f, g, o = split(a, R, U)
    return sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
