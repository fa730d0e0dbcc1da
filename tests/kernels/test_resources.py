"""Cross-compiled for every architecture of the launch table: registers, memory, tensor-core instructions, copies."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastnet_kernels import Stage, fused_backward, fused_forward, gemm, launch, packing
from fastnet_kernels.plan import (
    BATCH_TILE,
    LAUNCH,
    SHARED_KB,
    SPLIT_SHARED_KB,
    Plan,
    plan,
    programs_per_sm,
)
from ptxrun import Resources, cross_compile

BF16, FP32 = torch.bfloat16, torch.float32
PAPER = (Stage(4, 64, 196), Stage(8, 64, 49))
# Of the others, make test has that with the least shared memory.
MARKS = {90: [], 86: [pytest.mark.slow]}
ARCHS = [pytest.param(arch, marks=MARKS.get(arch, [pytest.mark.long, pytest.mark.slow])) for arch in LAUNCH]
# One stage of every other row of the launch table, in one launch.
OTHERS = (Stage(1, 8, 16), Stage(1, 8, 256), Stage(1, 8, 1024))


def plans(stages: tuple[Stage, ...], dtype: torch.dtype, arch: int, split: bool = False) -> tuple[Plan, ...]:
    return plan(stages, dtype, arch, save=True, split=split)


@cache
def forward(stages: tuple[Stage, ...], dtype: torch.dtype, arch: int, split: bool = False) -> Resources:
    constants = {"STATES": True, "GATES": True, "R": BATCH_TILE}
    return cross_compile(
        fused_forward.forward_kernel,
        arch,
        {"gates": dtype, "h": dtype, "c": FP32, "packed": dtype, "out": dtype},
        {"PLANS": plans(stages, dtype, arch, split), **constants},
        **launch.recurrent_options(dtype, forward=True, split=split),
    )


@cache
def backward(stages: tuple[Stage, ...], dtype: torch.dtype, arch: int, split: bool = False) -> Resources:
    return cross_compile(
        fused_backward.backward_kernel,
        arch,
        dict.fromkeys(("gates", "packed", "dout", "dgates"), dtype) | dict.fromkeys(("c", "carry"), FP32),
        {"PLANS": plans(stages, dtype, arch, split), "R": BATCH_TILE},
        **launch.recurrent_options(dtype, forward=False, split=split),
    )


def assert_launchable(r: Resources, arch: int) -> None:
    assert r.stack == 0 and r.local == 0 and r.count("(LDL|STL)") == 0
    assert r.shared <= SHARED_KB[arch] * 1024


@pytest.mark.parametrize("arch", ARCHS)
def test_network_of_the_paper(arch: int) -> None:
    f, b = forward(PAPER, BF16, arch), backward(PAPER, BF16, arch)
    for r in (f, b):
        assert_launchable(r, arch)
    assert f.registers <= 128 and b.registers <= 168
    large = SHARED_KB[arch] > 99
    assert f.shared <= (130_000 if large else 99_000) and b.shared <= (123_000 if large else 99_000)
    # Per warp, m16n8k16: 52 for a chunk of H = 196 (K = 208), 32 for a step of H = 49 (K = 64, 256 columns).
    assert f.count("HMMA.16816") == 52 + 32
    # 56 for a chunk of H = 196 (N = 224), that loop unrolled over its 7 chunks or not, 32 for a step of H = 49.
    assert b.count("HMMA.16816") in (56 + 32, 7 * 56 + 32)
    # What is streamed per step in the forward, W_hh among it, is copied 16 bytes at a time; in the backward the
    # only narrower copies are the resident stage's gates, a quarter chunk wide.
    assert set(re.findall(r"LDGSTS\.\S+", f.sass)) == {"LDGSTS.E.BYPASS.128"}
    assert set(re.findall(r"LDGSTS\.\S+", b.sass)) <= {"LDGSTS.E.BYPASS.128", "LDGSTS.E.64"}


def assert_resident(r: Resources, arch: int) -> None:
    """As many programs as the plan counts on fit a multiprocessor: 64 K registers, given out 8 a thread at a time."""
    assert_launchable(r, arch)
    assert r.shared <= SPLIT_SHARED_KB * 1024
    together = programs_per_sm(arch)
    assert together * 128 * (-(-r.registers // 8) * 8) <= 65536
    assert together * (r.shared + 1024) <= (SHARED_KB[arch] + 1) * 1024


@pytest.mark.parametrize("arch", ARCHS)
def test_split_network_of_the_paper(arch: int) -> None:
    f, b = forward(PAPER, BF16, arch, split=True), backward(PAPER, BF16, arch, split=True)
    for r in (f, b):
        assert_resident(r, arch)
    # Per warp: one chunk of the 7 that a streamed program takes one after the other, and the step of H = 49.
    assert f.count("HMMA.16816") == 52 + 32 and b.count("HMMA.16816") == 56 + 32
    # Whatever is read from global memory, but the counter, comes 16 bytes at a time.
    narrow = [load for load in re.findall(r"LDG\.\S+", f.sass) if ".128" not in load]
    assert set(narrow) == {"LDG.E.STRONG.GPU"}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("stages", [(Stage(1, 8, 256),), OTHERS], ids=["256", "others"])
@pytest.mark.parametrize("arch", LAUNCH)
def test_split(arch: int, stages: tuple[Stage, ...]) -> None:
    assert_resident(forward(stages, BF16, arch, split=True), arch)
    assert_resident(backward(stages, BF16, arch, split=True), arch)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("arch", LAUNCH)
def test_split_float32(arch: int) -> None:
    stages = (Stage(1, 8, 16), Stage(1, 8, 784))
    assert_resident(forward(stages, FP32, arch, split=True), arch)
    assert_resident(backward(stages, FP32, arch, split=True), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_streamed_backward_copies(arch: int) -> None:
    """Without the resident stage every copy of the backward is 16 bytes wide."""
    alone = backward((Stage(1, 8, 256),), BF16, arch)
    assert_launchable(alone, arch)
    assert set(re.findall(r"LDGSTS\.\S+", alone.sass)) == {"LDGSTS.E.BYPASS.128"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_other_rows_of_the_table(arch: int) -> None:
    assert_launchable(forward(OTHERS, BF16, arch), arch)
    assert_launchable(backward(OTHERS, BF16, arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_float32(arch: int) -> None:
    stages = (Stage(1, 8, 16), Stage(1, 8, 784))
    assert_launchable(forward(stages, FP32, arch), arch)
    assert_launchable(backward(stages, FP32, arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_gemms(arch: int) -> None:
    """The feature map [B, S, G*T] of conv4 and everything else is copied 16 bytes at a time, along the steps."""
    ps, both, floats = plans(PAPER, BF16, arch), (BF16, BF16), (FP32, FP32)
    tiles: dict[str, Any] = launch.gemm_tiles(BF16)
    project = cross_compile(
        gemm.project_kernel,
        arch,
        {"x": both, "packed": BF16, "bias_ih": floats, "bias_hh": floats, "h": BF16, "gates": BF16},
        {"PLANS": ps, "RECOMPUTE": True, "ROWS": tiles.pop("ROWS"), "MOST": tiles.pop("MOST")},
        **tiles,
    )
    tiles = launch.weight_gradient_tiles(BF16)
    weight = cross_compile(
        gemm.weight_gradient_kernel,
        arch,
        {"dgates": BF16, "x": both, "h": BF16, "partial": FP32},
        {"PLANS": ps, "ROWS": tiles.pop("ROWS"), "MOST": tiles.pop("MOST")},
        **tiles,
    )
    for r in (project, weight):
        assert_launchable(r, arch)
        assert set(re.findall(r"LDGSTS\.\S+", r.sass)) == {"LDGSTS.E.BYPASS.128"}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_packing(arch: int) -> None:
    constants = {"PLANS": plans(PAPER, BF16, arch), "BK": launch.PACK_INPUTS}
    floats = (FP32, FP32)
    pack = cross_compile(
        packing.pack_kernel, arch, {"ih": floats, "hh": floats, "packed": BF16}, constants, num_warps=4
    )
    gradients = dict.fromkeys(("d_ih", "d_hh", "d_bias_ih", "d_bias_hh"), floats)
    unpack = cross_compile(
        packing.unpack_kernel, arch, {"partial": FP32, **gradients}, constants, num_warps=4
    )
    assert_launchable(pack, arch)
    assert_launchable(unpack, arch)


def test_padded_work() -> None:
    """Tensor-core work over the paper's 12 LSTMs, relative to the useful: at most 1.27 forward, 1.351 backward."""
    useful = sum(s.groups * 4 * s.hidden**2 for s in PAPER)
    ps = plans(PAPER, BF16, 80)
    streamed, resident = ps
    assert (streamed.chunks, streamed.pieces, streamed.wide) == (
        7,
        ((0, 128), (128, 64), (192, 16)),
        ((0, 128), (128, 64), (192, 32)),
    )
    rest = resident.groups * 4 * resident.padded**2
    forward_work = streamed.groups * 4 * streamed.padded * sum(w for _, w in streamed.pieces) + rest
    backward_work = streamed.groups * 4 * streamed.padded * sum(w for _, w in streamed.wide) + rest
    assert forward_work <= 1.27 * useful and backward_work <= 1.351 * useful


@pytest.mark.parametrize(
    "kernel", [fused_forward.forward_kernel, fused_backward.backward_kernel, gemm.project_kernel]
)
def test_one_binary_for_every_batch_size(kernel: Any) -> None:
    """The batch is no part of what a launch is specialised on."""
    backend = make_backend(GPUTarget("cuda", 80, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    constants = {"PLANS", "STATES", "GATES", "R", "ROWS", "MOST", "RECOMPUTE"}
    sizes = {"batch", "padded_batch"}
    specialised = []
    for batch in (1, 5, 16, 17, 256):
        values = {
            n: batch if n in sizes else 1 if n in constants else torch.empty(16) for n in kernel.arg_names
        }
        specialised.append(bind(*values.values(), debug=False)[1])
    assert all(s == specialised[0] for s in specialised)
