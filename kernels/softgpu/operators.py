"""torch's operators on "cuda" tensors, computed by the CPU's kernels in the same memory.

Each aten operator that has a CUDA kernel gets a kernel in Python instead: it sits below autograd, autocast, fake
tensors and torch.compile, and serves every thread (autograd's device thread, gloo's), which a TorchDispatchMode would
not. Results have the strides and dtypes that torch's own fake tensors give for CUDA. What only manages memory or
makes views (`NATIVE`) stays torch's own, and so do copies between host and device: they reach cuda/memory.c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softgpu import determinism, graphs, library, lstm, rewritten, watching
from softgpu.forms import forms
from softgpu.host import (
    Placement,
    again,
    alias,
    fill,
    flat,
    random_generator,
    region,
    tensors_in,
    to_device,
    widen,
)

aten = torch.ops.aten


def _names(text: str) -> set[str]:
    return set(text.split())


# Left to torch: no kernel runs in them.
NATIVE = _names(
    """
    empty.memory_format empty_strided resize_ set_ set_.source_Storage set_.source_Tensor
    set_.source_Storage_storage_offset is_set_to view as_strided _reshape_alias unfold alias record_stream
    view_as_real view_as_complex _local_scalar_dense _efficientzerotensor _nested_view_from_buffer _conj_physical
    _pin_memory is_pinned _to_copy _has_same_storage_numel
    """
)
# CompositeExplicitAutograd operators that start CUDA kernels without another operator in between.
ALSO = {"copy_", "convolution", "convolution_backward", "_foreach_copy_"}
# In half precision these are computed in float32 and rounded once, as tensor cores and cuDNN do.
WIDE = _names(
    """
    mm addmm bmm baddbmm addmv dot addbmm _addmm_activation convolution convolution_backward native_batch_norm
    native_batch_norm_backward _native_batch_norm_legit _batch_norm_with_update cudnn_batch_norm
    cudnn_batch_norm_backward _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward linalg_vector_norm
    _foreach_norm avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward
    """
)
# The host waits for these on a GPU, as the size or the outcome depends on the data.
WAITING = _names(
    """
    nonzero masked_select equal _unique _unique2 unique_dim unique_consecutive is_nonzero repeat_interleave.Tensor
    unique_dim_consecutive histc bincount
    """
)
# What cuBLAS and cuDNN compute, which start their kernels by themselves.
LIBRARIES = _names(
    """
    mm addmm bmm baddbmm addmv dot addbmm _addmm_activation convolution convolution_backward cudnn_batch_norm
    cudnn_batch_norm_backward
    """
)
# Indexed by a mask, these have to count it.
INDEXING = {"index", "index_put_", "_index_put_impl_"}
# Some batch norms write these without saying so in their schema.
STATISTICS = ("running_mean", "running_var")

_library: torch.library.Library | None = None


class Operator:
    """One aten operator on the device: `compute`, else its CPU kernel, on aliases of the arguments."""

    def __init__(self, op: Any, compute: Callable[..., Any] | None = None) -> None:
        schema = op._schema
        self.op, self.base = op, schema.name.removeprefix("aten::")
        self.name = f"{self.base}.{schema.overload_name}" if schema.overload_name else self.base
        self.arguments = [a.name for a in schema.arguments]
        self.changed = [
            a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ]
        self.outs = [a.name for a in schema.arguments if a.is_out and "[" not in str(a.type)]
        # For each result the argument that it is, or None for a new tensor.
        self.returns = [_same_argument(schema, result) for result in schema.returns]
        self.waits = self.name in WAITING or self.base in WAITING
        self.compute = compute or op
        name = f"aten::{self.name}"
        if compute is None and not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CPU"):
            self.compute = _not_there(name)
        if self.base in WIDE and not self.changed:
            self.compute = _in_float32(self.compute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        determinism.check(self.base)
        given = dict(zip(self.arguments, args, strict=False), **kwargs)
        watching.note_operator(self.name, tensors_in(list(given.values())))
        placement = Placement(self.name, host_tensors=self.base in INDEXING)
        host_args = [placement.to_host(value) for value in args]
        host_kwargs = {
            name: placement.to_host(value) for name, value in kwargs.items() if name != "pin_memory"
        }
        device = placement.device or 0
        if "generator" in self.arguments:
            host_args = host_args[: self.arguments.index("generator")]
            host_kwargs["generator"] = random_generator(given.get("generator"), device)
        waits = self.waits or (self.base in INDEXING and _has_mask(given["indices"]))
        if waits:
            torch.cuda.current_stream(device).synchronize()
        for name in self.outs:  # may have to grow, which an alias cannot
            host_kwargs[name] = torch.empty(0, dtype=given[name].dtype)
        graph = graphs.capturing(device)
        if graph:
            changed = [given.get(name) for name in (*self.changed, *STATISTICS)]
            graphs.keep(graph, map(region, tensors_in(changed)))

        with torch._C._AutoDispatchBelowAutograd():
            results = self._results(host_args, host_kwargs)
            for name in self.outs:
                fill(given[name], host_kwargs[name])
            told = None if waits or not self.returns or any(self.returns) else forms(self.op, args, kwargs)
            views: list[Tensor | None] = []  # of the new tensors
            answers = [
                given[name] if name else to_device(result, told, device, views)
                for name, result in zip(self.returns, results, strict=True)
            ]
        if graph:
            targets = {name: alias(given[name]) for name in self.outs}
            graphs.record(graph, lambda: self._again(host_args, host_kwargs, targets, views))
        return tuple(answers) if len(answers) > 1 else answers[0] if answers else None

    def _results(self, args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        result = self.compute(*args, **kwargs)
        return list(result) if len(self.returns) > 1 else [result] * len(self.returns)

    def _again(
        self, args: list[Any], kwargs: dict[str, Any], outs: dict[str, Tensor], views: list[Tensor | None]
    ) -> None:
        """Computes once more, on what the same memory holds now."""
        with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
            results = self._results(args, kwargs)
            for name, target in outs.items():
                target.copy_(kwargs[name])
            new = [result for name, result in zip(self.returns, results, strict=True) if name is None]
            again(views, flat(new))


def _same_argument(schema: Any, result: Any) -> str | None:
    if result.alias_info is None:
        return None
    same = [
        a.name
        for a in schema.arguments
        if a.alias_info is not None and a.alias_info.before_set == result.alias_info.before_set
    ]
    return same[0] if same else None


def _in_float32(compute: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: compute(*widen(args), **{name: widen(v) for name, v in kwargs.items()})


def _not_there(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"softgpu: {name} cannot be computed: the CPU has no kernel of that name")

    return refuse


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


def _dropped(op: Any) -> Callable[..., Any]:
    """`op` without its work: results of the right form, one launch counted."""

    def drop(*args: Any, **kwargs: Any) -> Any:
        watching.note_operator(op._schema.name.removeprefix("aten::"), tensors_in([*args, *kwargs.values()]))
        device = tensors_in(args)[0].device
        library.library().softgpu_count_kernel(torch._C._cuda_getCurrentRawStream(device.index))
        if "out" in kwargs:
            return kwargs["out"]
        made = [
            None if form is None else torch.empty_strided(form[0], form[1], dtype=form[2], device=device)
            for form in forms(op, args, kwargs) or []
        ]
        return tuple(made) if len(made) > 1 else made[0]

    return drop


def install(mode: str) -> None:
    """Gives every aten operator with a CUDA kernel its kernel on the host; others that start CUDA kernels fail.

    In the mode null torch's own kernels are counted and dropped, and so is what the libraries compute.
    """
    global _library
    if mode not in ("exact", "null"):
        raise ValueError(f"operators={mode!r}: must be exact or null")
    _library = torch.library.Library("aten", "IMPL")
    if mode == "null":
        for name in sorted(LIBRARIES):
            for overload in {"default", "out"} & set(getattr(aten, name).overloads()):
                op = getattr(getattr(aten, name), overload)
                _library.impl(op._name.removeprefix("aten::"), _dropped(op), "CUDA")
        return
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    names = {name.removeprefix("aten::") for name in registered if name.startswith("aten::")} | ALSO
    for name in sorted(names - NATIVE):
        base, _, overload = name.partition(".")
        op = getattr(getattr(aten, base), overload or "default")
        _library.impl(name, rewritten.WHOLE.get(name) or Operator(op, rewritten.COMPUTED.get(name)), "CUDA")
    _library.impl("lstm.input", lstm.differentiable, "AutogradCUDA")
    _library.impl("lstm.input", lstm.forward, "CUDA")
    library.library().softgpu_refuse_kernels(1)
