"""Cross-compile a Triton kernel for any GPU, without one, and read what its machine code takes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Resources(NamedTuple):
    """Registers a thread, bytes of stack, local and shared memory, and the machine code."""

    registers: int
    stack: int
    local: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        """How many instructions match the pattern."""
        return len(re.findall(rf"\b{instruction}", self.sass))


def cross_compile(
    kernel: Any,
    arch: int,
    pointers: Mapping[str, torch.dtype | tuple[torch.dtype, ...]],
    constants: Mapping[str, Any],
    **options: Any,
) -> Resources:
    """Compile for sm_`arch` as a launch with 16-byte aligned pointers and any sizes would.

    Args:
        pointers: the element type of each argument that is a pointer, or those of a tuple of pointers; other arguments
            are 32-bit integers.
        constants: the values of the constexpr arguments.
        options: Triton's: num_warps, num_stages, maxnreg.
    """
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    for at, name in enumerate(kernel.arg_names):
        kind = pointers.get(name)
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(at,)] = constants[name]
        elif isinstance(kind, tuple):
            signature[name] = tuple(POINTERS[one] for one in kind)
            attrs |= {(at, n): [["tt.divisibility", 16]] for n in range(len(kind))}
        elif kind is not None:
            signature[name] = POINTERS[kind]
            attrs[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            arguments = [str(tools / command[0]), *command[1:], file.name]
            return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", tool("cuobjdump", "-res-usage"))
        if usage is None:
            raise RuntimeError("cuobjdump -res-usage says nothing of registers")
        registers, stack, local = map(int, usage.groups())
        return Resources(registers, stack, local, binary.metadata.shared, tool("nvdisasm", "-c"))
