"""A few PTX instructions as a whole kernel, for the tests."""

from __future__ import annotations

from typing import Any

from ptxrun import Stats, launch


def ptx_kernel(body: str, params: int = 1) -> str:
    """A kernel whose %rd1, %rd2... are its pointer parameters, %r1 the thread id, %rd10 = %rd1 + 4 * tid."""
    ps = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(params))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(params))
    return f"""
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{ps}
)
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<60>;
    .reg .b64 %rd<40>;
    {loads}
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd10, %r1, 4, %rd1;
{body}
}}
"""


def run_ptx(body: str, *arrays: Any, warps: int = 1, shared: int = 1024, **kw: Any) -> Stats:
    return launch(ptx_kernel(body, params=len(arrays)), (1, 1, 1), list(arrays), warps, shared, **kw)
