"""The kernel that makes batches of training images: against DALI's CPU operators, and what it asks of a GPU.

Shapes: B images of a batch, S image size, H and W of one image.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastnet.input.draws import MEAN, STD
from fastnet_kernels import images
from fastnet_kernels.images import COLUMNS, ROW, ROWS, Images, Normalisation
from fastnet_kernels.plan import LAUNCH
from ptxrun import Resources, Stats, cross_compile, execute_ptx
from tests.support.resize import SAMPLES, Sample, assert_resized, sample

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NORMALISATION = Normalisation(MEAN, STD)


def by_kernel(
    samples: list[Sample],
    size: int,
    dtype: torch.dtype,
    *,
    module: ModuleType = images,
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of the second of two steps of a table, after a row that belongs to another micro-batch. The set holds the
    images in the opposite order.
    """
    table = torch.zeros(2, len(samples) + 1, ROW, dtype=torch.int32)
    for n, (image, box, mirror) in enumerate(samples):
        row = [len(samples) - 1 - n, *box.view(np.int32).tolist(), int(mirror), *image.shape[:2]]
        table[1, n + 1] = torch.tensor(row, dtype=torch.int32)
    stored = [s.image.ravel() for s in reversed(samples)]
    ends = np.cumsum([len(pixels) for pixels in stored])
    decoded = Images(
        torch.from_numpy(np.concatenate(stored)).to(device),
        torch.from_numpy(np.concatenate([[0], ends[:-1]])).to(device),
        torch.arange(len(samples), device=device) * 7 - 1,
    )
    return module.make_batch(
        decoded,
        table.to(device),
        torch.tensor([1], device=device),
        first=1,
        count=len(samples),
        image_size=size,
        dtype=dtype,
        normalisation=NORMALISATION,
    )


def assert_as_dali(x: torch.Tensor, y: torch.Tensor, samples: list[Sample], size: int) -> None:
    assert y.tolist() == [7 * n - 1 for n in reversed(range(len(samples)))]
    assert_resized(x, samples, size)


@cache
def interpreted() -> ModuleType:
    """The kernel's module with Triton's interpreter, which Triton chooses when a kernel is defined."""
    spec = importlib.util.spec_from_file_location("interpreted_images", images.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_interpreter(dtype: torch.dtype) -> None:
    chosen = [SAMPLES[1], SAMPLES[3], SAMPLES[7]]
    assert_as_dali(*by_kernel(chosen, 32, dtype, module=interpreted()), chosen, 32)


def assert_clean(stats: Stats) -> None:
    assert not stats.races and not stats.cta_races and not stats.uninit


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_as_dali(dtype: torch.dtype) -> None:
    """The compiled kernel, in one launch."""
    with execute_ptx(images, schedule="random", seed=1) as runs:
        x, y = by_kernel(SAMPLES, 32, dtype)
    (stats,) = runs["images_kernel"]
    assert_clean(stats)
    assert_as_dali(x, y, SAMPLES, 32)


def test_columns_that_do_not_fill_their_tiles() -> None:
    """3 * 96 columns in three tiles of 128."""
    samples = [sample(64, 64, (5.5, 2.25, 60, 61), mirror=True), sample(110, 130)]
    with execute_ptx(images) as runs:
        x, y = by_kernel(samples, 96, BF16)
    assert_clean(runs["images_kernel"][0])
    assert_as_dali(x, y, samples, 96)


def test_traffic_of_the_paper() -> None:
    """64 -> 224 px: every store is 16 bytes wide, every byte is stored once, and a row of the image is resized across
    once for each tile that needs it.
    """
    size, box = 224, (7.0, 11.5, 51.0, 60.0)
    with execute_ptx(images) as runs:
        x, y = by_kernel([sample(64, 64, box)], size, BF16)
    (stats,) = runs["images_kernel"]
    assert_clean(stats)
    assert_as_dali(x, y, [sample(64, 64, box)], size)
    stores = [op for op in stats.ops if op.startswith("st.global")]
    assert sorted(stores) == ["st.global.b64", "st.global.v4.b32"]  # the label, and the pixels
    assert stats.unique["x"] == (0, x.nbytes) and stats.unique["y"] == (0, 8)
    assert stats.global_store_bytes == x.nbytes + 8
    across, down = -(-3 * size // COLUMNS), size // ROWS
    scale = (box[2] - box[0]) / size
    centres = box[0] + (np.arange(size).reshape(down, ROWS) + 0.5) * scale - 0.5
    rows = np.floor(centres[:, -1] + 1) - np.ceil(centres[:, 0] - 1) + 1  # two taps: one pixel to either side
    assert stats.ops["ld.global.b8"] == rows.sum() * across * 2 * (COLUMNS // 32)  # warps' instructions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("size", [32, 96, 224])
def test_on_a_gpu(size: int, dtype: torch.dtype) -> None:
    x, y = by_kernel(SAMPLES, size, dtype, device="cuda")
    assert_as_dali(x.cpu(), y.cpu(), SAMPLES, size)


@cache
def compiled(arch: int, dtype: torch.dtype) -> Resources:
    long = dict.fromkeys(("starts", "labels", "counter", "y"), torch.int64)
    return cross_compile(
        images.images_kernel,
        arch,
        {"pixels": torch.uint8, "table": torch.int32, "x": dtype, **long},
        {"SIZE": 224, "NORMALISATION": NORMALISATION, "ROWS": ROWS, "COLUMNS": COLUMNS},
        num_warps=1,
    )


@pytest.mark.parametrize("arch", [pytest.param(a, marks=() if a == 80 else pytest.mark.slow) for a in LAUNCH])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_resources(arch: int, dtype: torch.dtype) -> None:
    """Nothing spills, 16 warps fit an SM (65,536 registers), and images are stored 16 bytes at a time."""
    r = compiled(arch, dtype)
    assert r.stack == 0 and r.local == 0 and r.count("(LDL|STL)") == 0
    assert r.registers <= 128 and r.shared <= 2048
    wide, all_stores = r.count(r"STG\.E\S*\.128"), r.count("STG")
    assert wide == ROWS * COLUMNS * dtype.itemsize // (32 * 16) and all_stores == wide + 1  # and the label


def test_one_binary_for_every_batch() -> None:
    """Steps, rows and the first row are no part of what a launch is specialised on."""
    kernel: Any = images.images_kernel
    backend = make_backend(GPUTarget("cuda", 80, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    specialised = []
    for number in (0, 1, 5, 16, 390):
        values = {n: number if n in ("steps", "rows_per_step", "first") else 1 for n in kernel.arg_names}
        specialised.append(bind(*values.values(), debug=False)[1])
    assert all(s == specialised[0] for s in specialised)
