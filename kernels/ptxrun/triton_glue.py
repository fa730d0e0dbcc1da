"""Compile Triton kernels for sm_80, without a GPU, and run them, alone or inside the program that launches them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ptxrun.launch import MAX_STEPS, launch
from ptxrun.stats import Stats

SM80 = GPUTarget("cuda", 80, 32)


def compile_triton(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    attrs: Mapping[Any, Any] | None = None,
    **options: Any,
) -> tuple[str, Any]:
    """Cross-compile a @triton.jit function -> (ptx, metadata)."""
    types = {n: "constexpr" if n in constexprs else signature[n] for n in fn.arg_names}
    source = ASTSource(fn=fn, signature=types, constexprs=constexprs, attrs=attrs)
    out = triton.compile(source, target=SM80, options=options)
    return out.asm["ptx"], out.metadata


def run_triton(
    fn: Any,
    grid: Sequence[int] | Callable[[Mapping[str, Any]], Sequence[int]],
    *args: Any,
    schedule: str = "lockstep",
    seed: int = 0,
    check_uninit: bool = True,
    resident: int = 1,
    max_steps: int = MAX_STEPS,
    **kwargs: Any,
) -> Stats:
    """Specialise, compile and run fn as fn[grid](*args, **kwargs) would; of a cooperative launch all CTAs are resident.

    Arrays may be NumPy (uint16 is bfloat16) or torch CPU tensors. The Stats also carry .ptx and .metadata.
    """
    if not hasattr(fn, "_pack_args"):
        raise TypeError(
            "pass the @triton.jit function itself, not an autotuner or heuristics wrapper, "
            "and not one defined under TRITON_INTERPRET=1"
        )
    backend = make_backend(SM80)
    bind = create_function_from_signature(fn.signature, fn.params, backend)
    kwargs = {"debug": False, **{k: as_tensor(v) for k, v in kwargs.items()}}
    bound, special, chosen = bind(*map(as_tensor, args), **kwargs)
    options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, special, chosen)
    out = triton.compile(ASTSource(fn, signature, constexprs, attrs), target=SM80, options=options.__dict__)
    given, meta = launch_arguments(signature, bound), out.metadata
    sizes = grid(bound) if callable(grid) else grid
    stats = launch(
        out.asm["ptx"],
        sizes,
        list(given.values()),
        meta.num_warps,
        meta.shared,
        schedule=schedule,
        seed=seed,
        check_uninit=check_uninit,
        resident=math.prod(sizes) if meta.launch_cooperative_grid else resident,
        names=list(given),
        max_steps=max_steps,
        scratch_bytes=meta.global_scratch_size,
        entry=meta.name,
    )
    stats.ptx, stats.metadata = out.asm["ptx"], meta
    return stats


def launch_arguments(signature: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What a launch passes to the compiled kernel, by name: no constants, tuples element by element."""
    flat: dict[str, Any] = {}
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            inner = {f"{name}[{n}]": part for n, part in enumerate(kind)}
            flat |= launch_arguments(inner, dict(zip(inner, values[name], strict=True)))
        elif kind != "constexpr":
            flat[name] = values[name]
    return flat


def as_tensor(x: Any) -> Any:
    """NumPy arrays as tensors that share their memory; the rest as it is."""
    if not (isinstance(x, np.ndarray) and x.ndim):
        return x
    tensor = torch.from_numpy(x)
    return tensor.view(torch.bfloat16) if x.dtype == np.uint16 else tensor


class Executed:
    """Stands in for a kernel: kernel[grid](...) runs its PTX, and the launch's Stats are kept."""

    def __init__(self, kernel: Any, runs: dict[str, list[Stats]], **options: Any) -> None:
        self.kernel, self.runs, self.options = kernel, runs, options

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            stats = run_triton(self.kernel, grid, *args, **kwargs, **self.options)
            self.runs.setdefault(self.kernel.__name__, []).append(stats)

        return run


@contextmanager
def execute_ptx(*modules: ModuleType, **options: Any) -> Iterator[dict[str, list[Stats]]]:
    """Within the block, launches of the modules' kernels (named ..._kernel) run their PTX on CPU tensors.

    Yields kernel name -> Stats of its launches, filled as they come. Options are those of `run_triton`.
    """
    runs: dict[str, list[Stats]] = {}
    found = [(m, name) for m in modules for name in vars(m) if name.endswith("_kernel")]
    kept = [(module, name, getattr(module, name)) for module, name in found]
    for module, name, kernel in kept:
        setattr(module, name, Executed(kernel, runs, **options))
    try:
        yield runs
    finally:
        for module, name, kernel in kept:
            setattr(module, name, kernel)
