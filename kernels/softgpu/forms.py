"""Which sizes, strides and dtypes CUDA's operators give: told by torch's own fake CUDA tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from softgpu.host import Form, flat

unknown: Counter[str] = Counter()  # operators whose forms fake tensors could not tell: theirs are the CPU's

_known: dict[Any, list[Form | None] | None] = {}


def forms(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Form | None] | None:
    """The forms of `op`'s results on CUDA, in order; None where torch cannot tell, which `unknown` counts."""
    key = (op, _key(args), tuple((name, _key(value)) for name, value in kwargs.items()))
    try:
        if key in _known:
            return _known[key]
    except TypeError:  # an argument without a hash
        return _ask(op, args, kwargs)
    return _known.setdefault(key, _ask(op, args, kwargs))


def _ask(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Form | None] | None:
    try:
        with FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False):
            results = flat(op(*_fake(args), **{name: _fake(value) for name, value in kwargs.items()}))
        return [_form(r) if isinstance(r, Tensor) else None for r in results]
    except Exception:  # whatever an operator without a fake implementation raises
        unknown[str(op)] += 1
        return None


def _form(t: Tensor) -> Form:
    return tuple(map(int, t.shape)), tuple(map(int, t.stride())), t.dtype


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.device
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _fake(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    if isinstance(value, list | tuple):
        return [_fake(v) for v in value]
    return value
