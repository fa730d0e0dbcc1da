"""The compiled sm_80 PTX, run on the CPU: numerics in every dtype, races, bounds, work and traffic."""

from __future__ import annotations

import pytest
import torch

from fastnet_kernels import ChannelGroupLSTM, launch
from ptxrun import Stats
from tests.support.kernels import executed, failures, feature_maps

pytestmark = pytest.mark.slow
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


STEP = {
    "pack_kernel",
    "project_kernel",
    "forward_kernel",
    "backward_kernel",
    "weight_gradient_kernel",
    "unpack_kernel",
    "input_gradient_kernel",
}


def assert_clean(runs: dict[str, list[Stats]]) -> None:
    assert set(runs) == STEP
    for name, kernel_runs in runs.items():
        for stats in kernel_runs:
            assert not stats.races, f"{name}: {stats.races[0]}"
            assert not stats.cta_races, f"{name}: {stats.cta_races[0]}"
            assert not stats.uninit, f"{name}: {stats.uninit}"


@pytest.mark.long
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_sizes_of_the_paper(dtype: torch.dtype) -> None:
    """One launch of each kernel; the recurrent work and W_hh traffic exactly as computed from the tiles."""
    steps = 3
    with executed() as runs:
        assert not failures(launch, [(1, steps, 196), (2, steps, 49)], 5, dtype)
    assert_clean(runs)
    assert all(len(kernel_runs) == 1 for kernel_runs in runs.values())
    (forward,), (backward,) = runs["forward_kernel"], runs["backward_kernel"]
    # m16n8k16 instructions. H = 196: 7 chunks of 128 columns, K = 208 forward; N = 224 backward, not at t = 0.
    # H = 49: K = 64, 256 columns, for two groups.
    assert forward.mma == steps * 7 * (208 // 16) * (128 // 8) + 2 * steps * (64 // 16) * (256 // 8)
    assert backward.mma == (steps - 1) * 7 * (128 // 16) * (224 // 8) + 2 * steps * (256 // 16) * (64 // 8)
    # Bytes copied to shared memory: per step and chunk W_hh, the gates (2 bytes), c (4 bytes); resident: the gates.
    assert (
        forward.cp_async_bytes
        == steps * 7 * (208 * 128 * 2 + 16 * 128 * 2 + 16 * 32 * 4) + 2 * steps * 16 * 256 * 2
    )
    # Backward: W_hh and gate gradients; resident: gates, c_t and c_{t-1}.
    streamed = (steps - 1) * 7 * (224 * 128 * 2 + 16 * 128 * 2)
    assert backward.cp_async_bytes == streamed + 2 * steps * (16 * 256 * 2 + 2 * 16 * 64 * 4)


@pytest.mark.parametrize(
    ("stages", "batch", "dtype", "recompute"),
    [
        pytest.param(
            [(1, 2, 100), (1, 2, 16)], 19, FP16, True, id="ragged-recomputed-fp16", marks=pytest.mark.long
        ),
        pytest.param([(1, 2, 68), (1, 2, 37)], 17, BF16, False, id="ragged-bf16"),
        pytest.param([(1, 2, 272)], 2, BF16, False, id="blocked-bf16", marks=pytest.mark.long),
        pytest.param([(1, 2, 37)], 3, FP32, False, id="fp32", marks=pytest.mark.long),
    ],
)
def test_random_schedules(
    stages: list[tuple[int, int, int]], batch: int, dtype: torch.dtype, recompute: bool
) -> None:
    """Warps and thread blocks in random order: a missing barrier gives wrong numbers besides being reported."""
    with executed(schedule="random", seed=1) as runs:
        assert not failures(launch, stages, batch, dtype, recompute=recompute)
    assert_clean(runs)


@pytest.mark.parametrize(
    ("stages", "dtype"),
    [
        pytest.param([(1, 4, 68), (1, 3, 16)], BF16, id="bf16"),
        pytest.param([(1, 3, 37)], FP32, id="blocked-fp32", marks=pytest.mark.long),
    ],
)
def test_inference(stages: list[tuple[int, int, int]], dtype: torch.dtype) -> None:
    """h and c in two slots used in turn: no race, and the output of training to the rounding of the dtype."""
    module = ChannelGroupLSTM(stages)
    x = [f.to(dtype).contiguous(memory_format=torch.channels_last) for f in feature_maps(stages, 17)]
    with torch.no_grad(), executed(schedule="random", seed=2) as runs:
        y, *saved = launch.forward(x, module.weights(), module.stages, save=False, recompute=False)
        expected = launch.forward(x, module.weights(), module.stages, save=True, recompute=False)[0]
    assert all(t.numel() == 0 for t in saved)
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(FP32).eps)
    assert not any(stats.races or stats.cta_races or stats.uninit for stats in runs["forward_kernel"])
