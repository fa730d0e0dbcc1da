"""The kernel that makes batches of training images: against DALI's CPU operators, and what it asks of a GPU.

Shapes: B images of a batch, S image size, H and W of one image.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def
from nvidia.dali.types import DALIDataType
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fastnet_kernels import images
from fastnet_kernels.images import COLUMNS, ROW, ROWS, Images, Normalisation
from fastnet_kernels.plan import LAUNCH
from ptxrun import Resources, Stats, cross_compile, execute_ptx

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NORMALISATION = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # ImageNet's
LEVELS = 256


class Sample(NamedTuple):
    """An image [H, W, 3] and what is done to it; the box is (top, left, bottom, right)."""

    image: NDArray[np.uint8]
    box: NDArray[np.float32]
    mirror: bool


def sample(height: int, width: int, box: tuple[float, ...] | None = None, mirror: bool = False) -> Sample:
    """Noise, in which every wrong pixel shows; the whole image without a box."""
    noise = np.random.default_rng(1000 * height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Sample(noise, np.array(box or (0, 0, height, width), np.float32), mirror)


def grey(height: int, width: int) -> Sample:
    plain = sample(height, width, mirror=True)
    return plain._replace(image=np.repeat(plain.image[:, :, :1], 3, axis=2))


SAMPLES = [
    sample(64, 64),  # every pixel of the result from 4 x 4
    sample(40, 95, (3.3, 20.7, 37.1, 80.2), mirror=True),  # smaller in both directions
    sample(64, 48, (30.25, 0, 48.5, 20.125)),  # larger, at the left edge
    sample(33, 64, (14.5, 44.4, 33, 64), mirror=True),  # larger, in a corner
    sample(20, 70, (0, 1.5, 20, 69.5)),  # larger down, smaller across
    sample(150, 32, (10, 0, 149, 31)),  # much smaller down
    grey(50, 41),
    sample(1, 1, mirror=True),
    sample(1, 9),
    sample(37, 2, (36.2, 0.1, 36.9, 1.7)),  # less than a pixel
]


@pipeline_def(num_threads=1, prefetch_queue_depth=1)
def dali_graph(source: Callable[[], Any], size: int) -> Any:
    given: Any = fn.external_source(source, num_outputs=4, batch=True)
    image, start, end, mirror = given
    resized: Any = fn.resize(image, size=[size, size], roi_start=start, roi_end=end, dtype=DALIDataType.FLOAT)
    return fn.crop_mirror_normalize(
        resized,
        mean=list(NORMALISATION.mean),
        std=list(NORMALISATION.std),
        mirror=mirror,
        output_layout="HWC",
    )


def by_dali(samples: list[Sample], size: int) -> torch.Tensor:
    """[B, 3, S, S] float32."""
    given = (
        [s.image for s in samples],
        [s.box[:2] for s in samples],
        [s.box[2:] for s in samples],
        [np.array(s.mirror, np.int32) for s in samples],
    )
    (batch,) = dali_graph(lambda: given, size, batch_size=len(samples), device_id=None).run()
    return torch.from_numpy(np.array(batch.as_tensor())).permute(0, 3, 1, 2)


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
    """To the roundings of float32, on both sides, and of `x`'s own type.

    A pixel's place in the image follows from its box by four operations on numbers up to the image's length E, so two
    implementations differ by up to 2 * 4 * E * eps / 2 pixels in each of two directions; a pixel's shift is worth 256
    levels at most. What is added then (4 * E products at most) is rounded less.
    """
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert y.tolist() == [7 * n - 1 for n in reversed(range(len(samples)))]
    expected = by_dali(samples, size)
    for n, one in enumerate(samples):
        extent = max(one.image.shape)
        levels = 2 * (2 * 4 * extent + 4 * extent) * torch.finfo(FP32).eps / 2 * LEVELS
        bound = levels / min(NORMALISATION.std) + expected[n].abs() * torch.finfo(x.dtype).eps / 2
        assert ((x[n].float() - expected[n]).abs() <= bound).all(), f"sample {n}"


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
