"""What the kernel tests share: inputs, references and error measures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastnet_kernels
from fastnet_kernels import ChannelGroupLSTM, Stage, launch, op
from ptxrun import Stats, execute_ptx

KERNEL_MODULES = (
    "gates",
    "packing",
    "gemm",
    "meeting",
    "tiles",
    "fused_forward",
    "fused_backward",
    "launch",
)  # as they import


@cache
def interpreted() -> ModuleType:
    """fastnet_kernels.launch with its kernels in Triton's interpreter, beside the compiled ones.

    Triton reads TRITON_INTERPRET when a kernel is defined, so the modules are imported a second time.
    """
    names = [f"fastnet_kernels.{name}" for name in KERNEL_MODULES]
    kept = {name: importlib.import_module(name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in names:
            del sys.modules[name]
            delattr(fastnet_kernels, name.rpartition(".")[2])
        module = importlib.import_module("fastnet_kernels.launch")
    for name, compiled in kept.items():
        sys.modules[name] = compiled
        setattr(fastnet_kernels, name.rpartition(".")[2], compiled)
    return module


@pytest.fixture
def triton_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with TRITON_INTERPRET=1 in the environment."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(op, "_kernels", interpreted)
    yield


def side(hidden: int) -> tuple[int, int]:
    """The most square (h, w) with h*w = hidden."""
    h = next(d for d in range(int(hidden**0.5), 0, -1) if hidden % d == 0)
    return h, hidden // h


def feature_maps(
    stages: Sequence[tuple[int, int, int]], batch: int, *, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    """Per stage a channels_last [B, G*T, h, w] in float64, normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for groups, seq_len, hidden in stages:
        x = torch.randn(batch, groups * seq_len, *side(hidden), generator=generator, dtype=torch.float64)
        maps.append((x * scale).contiguous(memory_format=torch.channels_last))
    return maps


def run_lstms(lstms: Sequence[nn.LSTM], features: Sequence[Tensor], stages: Sequence[Stage]) -> Tensor:
    """The output by one nn.LSTM per group: [B, sum(G*H)]."""
    outputs: list[Tensor] = []
    for x, stage in zip(features, stages, strict=True):
        for g in range(stage.groups):
            sequence = x[:, g * stage.seq_len : (g + 1) * stage.seq_len].flatten(2)  # [B, T, S]
            outputs.append(lstms[len(outputs)](sequence)[1][0][0])
    return torch.cat(outputs, dim=1)


def parameters_of(lstms: Sequence[nn.LSTM]) -> list[nn.Parameter]:
    """weight_ih, weight_hh, bias_ih, bias_hh of each."""
    return [p for lstm in lstms for p in lstm.parameters()]


def executed(launch: ModuleType = launch, **options: Any) -> AbstractContextManager[dict[str, list[Stats]]]:
    """Within the block the launch module's kernels run their compiled PTX on the CPU."""
    modules = (launch.packing, launch.gemm, launch.fused_forward, launch.fused_backward)
    return execute_ptx(*modules, **options)


def on_multiprocessors(launch: ModuleType, count: int, patch: pytest.MonkeyPatch) -> None:
    """The launch module decides as on a GPU of so many multiprocessors (sm_80), though its tensors are on the CPU."""
    plan = sys.modules[launch.plans_for.__module__]
    patch.setattr(plan, "multiprocessors", lambda device: count)


class Failure(NamedTuple):
    """A tensor whose error is above its bound."""

    name: str
    error: float
    bound: float


def failures(
    launch: ModuleType,
    stages: Sequence[tuple[int, int, int]],
    batch: int,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> list[Failure]:
    """Runs forward and backward on `device`; compares all results with float64 nn.LSTM, in the 2-norm.

    The bound is the project's: 2 times (output) or 3 times (gradients) the error of eager nn.LSTM in the same
    dtype. Where eager is more exact by chance, the rounding of the result itself (eps) takes its place, or the
    absolute error of the kernels' float32 tanh near zero, float32's eps per element.
    """
    module = ChannelGroupLSTM(stages)
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data.uniform_(-(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5, generator=generator)
    x = [
        f.to(dtype).contiguous(memory_format=torch.channels_last)
        for f in feature_maps(stages, batch, seed=seed, scale=scale)
    ]
    dout = torch.randn(batch, module.out_features, generator=generator).to(dtype)

    def reference(as_dtype: torch.dtype) -> list[Tensor]:
        lstms = [lstm.to(as_dtype) for lstm in module.to_lstms()]
        features = [f.detach().to(as_dtype).requires_grad_() for f in x]
        y = run_lstms(lstms, features, module.stages)
        grads = torch.autograd.grad((y * dout.to(as_dtype)).sum(), [*features, *parameters_of(lstms)])
        stacked, at = [], len(x)
        for s in module.stages:
            own = grads[at : at + 4 * s.groups]
            stacked += [torch.stack(own[n::4]) for n in range(4)]
            at += 4 * s.groups
        return [y.detach(), *grads[: len(x)], *stacked]

    exact, eager = reference(torch.float64), reference(dtype)
    module, x, dout = module.to(device), [f.to(device) for f in x], dout.to(device)
    with torch.no_grad():
        y, *saved = launch.forward(x, module.weights(), module.stages, save=True, recompute=recompute)
        d_x, d_w = launch.backward(dout, x, module.weights(), module.stages, *saved, needs_dx=True)
    names = ["output", *(f"x{n}" for n in range(len(x)))]
    names += [f"{w}{n}" for n in range(len(x)) for w in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    ours = [y, *d_x, *(t for w in d_w for t in w)]
    found = []
    for name, mine, true, theirs in zip(names, ours, exact, eager, strict=True):
        error = (mine.double().cpu() - true).norm().item()
        least = torch.finfo(dtype).eps * true.norm().item()
        least = max(least, torch.finfo(torch.float32).eps * true.numel() ** 0.5)
        bound = (2 if name == "output" else 3) * max((theirs.double() - true).norm().item(), least)
        if not error <= bound:  # also NaN
            found.append(Failure(name, error, bound))
    return found
