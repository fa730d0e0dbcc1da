"""Device tensors as the CPU's kernels see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)

# Size, stride and dtype of a result; None for a result that is absent or no tensor.
Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def alias(t: Tensor) -> Tensor:
    """The CPU tensor in the same memory. It owns nothing: `t` has to live on."""
    storage = t.untyped_storage()
    at = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    return torch.empty(0, dtype=t.dtype).set_(at, t.storage_offset(), t.size(), t.stride())


def region(t: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's storage."""
    return t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples, in order."""
    return [t for t in flat(value) if isinstance(t, Tensor)]


def flat(value: Any) -> list[Any]:
    """Nested lists and tuples laid out in order."""
    if isinstance(value, list | tuple):
        return [inner for v in value for inner in flat(v)]
    return [value]


def widen(value: Any) -> Any:
    """`value` with its half-precision tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if isinstance(value, list | tuple):
        return [widen(v) for v in value]
    return value


class Placement:
    """Takes an operator's arguments to the host, and learns which GPU the operator runs on."""

    def __init__(self, operator: str, *, host_tensors: bool) -> None:
        self.operator, self.host_tensors = operator, host_tensors
        self.device: int | None = None

    def to_host(self, value: Any) -> Any:
        """`value` with aliases for device tensors.

        Raises RuntimeError for tensors on different devices, as the device's operators do. Numbers (tensors without
        dimensions) may lie on the host; others only for an operator that allows `host_tensors`.
        """
        if isinstance(value, Tensor):
            if value.is_cuda:
                self._on(value.device)
                return alias(value)
            if value.dim() and not self.host_tensors:
                raise RuntimeError(
                    f"softgpu: {self.operator}: expected all tensors to be on the same device, but found one on the "
                    f"{value.device} of shape {tuple(value.shape)}"
                )
            return value
        if isinstance(value, list | tuple):
            return [self.to_host(v) for v in value]
        if isinstance(value, torch.device) and value.type == "cuda":
            self._on(value)
            return CPU
        return value

    def _on(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        if self.device is None:
            self.device = index
        elif index != self.device:
            raise RuntimeError(
                f"softgpu: {self.operator}: expected all tensors to be on the same device, but found at least two, "
                f"cuda:{self.device} and cuda:{index}"
            )


def to_device(
    result: Any, forms: Sequence[Form | None] | None, device: int, views: list[Tensor | None]
) -> Any:
    """CPU results as new tensors on the GPU `device`, in the form that `forms` says where it is known.

    `views` gets an alias of each new tensor, in order, None for a result that is absent.
    """
    if isinstance(result, Tensor):
        form = forms[len(views)] if forms and len(views) < len(forms) else None
        size, stride, dtype = form or (tuple(result.shape), result.stride(), result.dtype)
        if not result.numel() and 0 not in size:  # what the CPU leaves out: statistics in evaluation mode
            result = torch.full(size, float("nan"))
        if size != tuple(result.shape):
            raise RuntimeError(f"softgpu: a result of {tuple(result.shape)} where CUDA gives {size}")
        made = torch.empty_strided(size, stride, dtype=dtype, device=torch.device("cuda", device))
        views.append(alias(made).copy_(result))
        return made
    if isinstance(result, list | tuple):
        return type(result)(to_device(r, forms, device, views) for r in result)
    if result is None:
        views.append(None)
    return result


def again(views: Sequence[Tensor | None], results: Sequence[Any]) -> None:
    """Writes results into the places that `to_device` gave their like before."""
    with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
        for view, result in zip(views, results, strict=True):
            if view is not None and result.numel():  # the CPU leaves out statistics in evaluation mode
                view.copy_(result)


def fill(out: Tensor, result: Tensor) -> None:
    """Writes a result into the device tensor given as `out`, which takes its shape as in any out= operator."""
    if out.shape != result.shape:
        out.resize_(result.shape)
        if out.stride() != result.stride():
            out.as_strided_(result.shape, result.stride())
    alias(out).copy_(result)


def random_generator(given: torch.Generator | None, device: int) -> torch.Generator:
    """A CPU generator for one operator, from the CUDA generator's seed and offset, which moves on."""
    source = given if given is not None else torch.cuda.default_generators[device]
    state = source.get_state()
    numbers = state.view(torch.int64)  # seed, offset
    made = torch.Generator()
    made.manual_seed(int(numbers[0] * 1_000_003 + numbers[1]) & (2**63 - 1))
    numbers[1] += 4
    source.set_state(state)
    return made
