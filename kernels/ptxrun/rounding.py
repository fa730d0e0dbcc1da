"""Number formats and conversions that NumPy does not have, on arrays."""

from __future__ import annotations

import numpy as np

U16, U32, U64, I64 = np.uint16, np.uint32, np.uint64, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
DIRECTED = ("rz", "rm", "rp")


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32."""
    return (bits.astype(U32) << U32(16)).view(F32)


def round_to_odd(x: np.ndarray) -> np.ndarray:
    """float64 -> float32 such that rounding the result again to fewer bits is right."""
    y = x.astype(F32)
    bits = y.view(U32) - (np.abs(y.astype(F64)) > np.abs(x))  # toward zero
    return (bits | (y != x)).astype(U32).view(F32)


def to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """float -> bfloat16 bits, rounded once, to nearest even or toward zero."""
    y = np.ascontiguousarray(round_to_odd(x) if x.dtype == F64 else x.astype(F32, copy=False))
    u = y.view(U32)
    if mode == "rn":
        u = u + (U32(0x7FFF) + (u >> U32(16) & U32(1)))
    return np.where(np.isnan(y), U16(0x7FFF), (u >> U32(16)).astype(U16))


def directed(x: np.ndarray, dtype: type[np.generic], mode: str) -> np.ndarray:
    """float64 -> dtype, rounding toward zero (rz), down (rm) or up (rp)."""
    y = x.astype(dtype)
    over = {"rz": np.abs(y) > np.abs(x), "rm": y > x, "rp": y < x}[mode]
    return np.where(over, np.nextafter(y, dtype({"rz": 0, "rm": -np.inf, "rp": np.inf}[mode])), y)


def flush(x: np.ndarray, t: str) -> np.ndarray:
    """Subnormal numbers of type t -> signed zero."""
    smallest = 2.0**-14 if t[:3] == "f16" else 2.0**-126
    return np.where(np.abs(x) < x.dtype.type(smallest), np.copysign(x.dtype.type(0), x), x)


def to_int(x: np.ndarray, dtype: type[np.integer], nan: int = 0) -> np.ndarray:
    """Rounded float -> integer, saturating."""
    info = np.iinfo(dtype)
    unknown = np.isnan(x)
    x = np.where(unknown, 0, x).astype(F64)
    low, high = x <= float(info.min), x >= float(info.max)
    y = np.where(low | high, 0, x).astype(U64 if dtype == U64 else I64).astype(dtype)
    y = np.where(low, dtype(info.min), np.where(high, dtype(info.max), y))
    return np.where(unknown, dtype(nan), y) if nan else y


def mul_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """High half of a 64-bit product."""
    if a.dtype == I64:
        high = mul_high(a.view(U64), b.view(U64)).view(I64)
        return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)
    mask, half = U64(0xFFFFFFFF), U64(32)
    al, ah, bl, bh = a & mask, a >> half, b & mask, b >> half
    mid = ah * bl + (al * bl >> half)
    return ah * bh + (mid >> half) + ((al * bh + (mid & mask)) >> half)
