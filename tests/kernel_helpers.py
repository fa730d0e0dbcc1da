"""What the kernel tests share: inputs, references and error measures."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import fastnet_kernels
import pytest
import torch
import triton
from fastnet_kernels import ChannelGroupLSTM, Stage
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@cache
def interpreted() -> ModuleType:
    """fastnet_kernels.launch with its kernels in Triton's interpreter, beside the compiled ones.

    Triton reads TRITON_INTERPRET when a kernel is defined, so the modules are imported a second time.
    """
    names = [f"fastnet_kernels.{name}" for name in ("gates", "gemm", "fused", "launch")]
    kept = {name: importlib.import_module(name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in names:
            del sys.modules[name]
        module = importlib.import_module("fastnet_kernels.launch")
    for name, compiled in kept.items():
        sys.modules[name] = compiled
        setattr(fastnet_kernels, name.rpartition(".")[2], compiled)
    return module


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


def lstm_reference(module: ChannelGroupLSTM, features: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The output by one nn.LSTM per group, in `dtype`: [B, sum(G*H)]."""
    lstms = iter(module.to_lstms())
    outputs = []
    for x, stage in zip(features, (Stage(*s) for s in module.stages), strict=True):
        for g in range(stage.groups):
            sequence = x[:, g * stage.seq_len : (g + 1) * stage.seq_len].flatten(2).to(dtype)  # [B, T, S]
            outputs.append(next(lstms).to(dtype)(sequence)[1][0][0])
    return torch.cat(outputs, dim=1)


class Resources(NamedTuple):
    """What a cross-compiled kernel takes of a GPU, and its machine code."""

    registers: int
    stack: int
    local: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        """How many instructions match the pattern."""
        return len(re.findall(rf"\b{instruction}", self.sass))


POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def cross_compile(
    kernel: Any, arch: int, pointers: dict[str, torch.dtype], constants: dict[str, Any], **options: Any
) -> Resources:
    """Compiles for sm_`arch` without a GPU, as a launch with 16-byte aligned pointers and any sizes would."""
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else POINTERS[pointers[n]] if n in pointers else "i32" for n in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in pointers},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            arguments = [str(tools / command[0]), *command[1:], file.name]
            return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", tool("cuobjdump", "-res-usage"))
        assert usage is not None
        return Resources(*map(int, usage.groups()), binary.metadata.shared, tool("nvdisasm", "-c"))
