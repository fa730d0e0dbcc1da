"""Triton: the compiler, and the project's kernels against float64."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastnet.diagnosis.findings import Failed, Skipped
from fastnet_kernels import Stage, Weights, channel_group_lstm, naive
from fastnet_kernels.op import choose

TARGET = 90  # sm_90, where there is no GPU to compile for
STAGES = [Stage(2, 5, 49), Stage(1, 4, 16)]
BATCH = 3


@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


def compiler() -> str:
    """Triton and the ptxas it brings make machine code, and a C compiler is there for its launchers."""
    arch, found = _architecture()
    source = ASTSource(
        fn=double, signature={"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constexprs={(2,): 128}
    )
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    if not made.asm["cubin"]:
        raise Failed(f"Triton makes no machine code for sm_{arch}")
    if not _c_compiler():
        missing = "gcc and Python's headers, which are not all here"
        if found:
            raise Failed(f"compiles for sm_{arch}, but its launchers need {missing}")
        return f"compiles for sm_{arch}; on a GPU it would need {missing}"
    return f"compiles for sm_{arch}{'' if found else ', as an example'}; C compiler {_c_compiler()}"


def lstm() -> str:
    """The channel-group LSTM in float32 on each GPU."""
    if not torch.cuda.is_available():
        raise Skipped("no GPU")
    try:
        choose("triton", torch.device("cuda", 0), torch.float32, max(s.hidden for s in STAGES))
    except RuntimeError as obstacle:  # training takes PyTorch's LSTMs here
        raise Skipped(" ".join(str(obstacle).split())) from obstacle
    worst = max(_error(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return f"the LSTM kernels agree with float64 to {worst:.1e}"


def _error(device: torch.device) -> float:
    """The largest error of the outputs and weights' gradients, relative to the largest value; of random numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.5

    features = [random(BATCH, s.groups * s.seq_len, s.hidden, 1) for s in STAGES]
    weights = [
        Weights(
            random(s.groups, 4 * s.hidden, s.hidden) * s.hidden**-0.5,
            random(s.groups, 4 * s.hidden, s.hidden) * s.hidden**-0.5,
            random(s.groups, 4 * s.hidden),
            random(s.groups, 4 * s.hidden),
        )
        for s in STAGES
    ]
    for w in weights:
        w.hh.requires_grad_()
    expected = naive(features, weights, STAGES)
    gradients = torch.autograd.grad(expected.square().sum(), [w.hh for w in weights])
    x = [f.to(device, torch.float32) for f in features]
    own = [Weights(*(p.detach().to(device, torch.float32) for p in w)) for w in weights]
    for w in own:
        w.hh.requires_grad_()
    out = channel_group_lstm(x, own, STAGES, backend="triton")
    own_gradients = torch.autograd.grad(out.square().sum(), [w.hh for w in own])
    error = max(
        ((a.cpu().double() - b).abs().max() / b.abs().max()).item()
        for a, b in zip((out, *own_gradients), (expected, *gradients), strict=True)
    )
    # Sums of some 50 products, which err by a few roundings each, in five steps that build on each other.
    most = 64 * torch.finfo(torch.float32).eps
    if not error <= most:
        raise Failed(f"the LSTM kernels are off by {error:.1e} on {device} ({most:.1e} is allowed)")
    return error


def _architecture() -> tuple[int, bool]:
    """Compute capability of the GPU times ten, and whether there is one."""
    if not torch.cuda.is_available():
        return TARGET, False
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor, True


def _c_compiler() -> str:
    """Its name, if Python's headers are there too, without which it is of no use."""
    scheme = sysconfig.get_default_scheme()
    # As Triton takes them: Debian's scheme for what its users install has no headers.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    named = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or ""
    return named if headers.exists() else ""
