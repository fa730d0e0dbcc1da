"""softgpu itself: devices, memory, waits, operators, loss scaling, random numbers. Two GPUs with 512 MB each."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import softgpu
from softgpu import forms


def test_devices() -> None:
    assert torch.cuda.device_count() == 2 and torch.cuda.get_device_capability() == (8, 0)
    x = torch.ones(3, device="cuda:1")
    assert (x + 1).device.index == 1 and torch.cuda.current_device() == 0
    assert x.to("cuda:0").tolist() == [1, 1, 1]


def test_the_current_device_belongs_to_a_thread() -> None:
    seen = []
    with torch.cuda.device(1):
        thread = threading.Thread(target=lambda: seen.append(torch.empty(1, device="cuda").device.index))
        thread.start()
        thread.join()
    assert seen == [0]


def test_installing_after_torch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="before torch is imported"):
        softgpu.install()


def test_memory_is_pinned_or_not() -> None:
    assert torch.zeros(3).pin_memory().is_pinned() and not torch.zeros(3).is_pinned()


def test_memory_has_a_limit() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(600 << 20, dtype=torch.uint8, device="cuda")


def test_unwritten_memory_is_nan() -> None:
    assert torch.empty(1 << 20, device="cuda:1").isnan().any()


def test_waits_are_told_with_their_lines() -> None:
    x = torch.ones(3, device="cuda")
    with softgpu.watch() as seen:
        total = (x * 2).sum()
    assert not seen.waits and "waits" not in seen.counts
    with softgpu.watch() as seen:
        total.item()
    assert seen.counts["waits"] == 1 and "total.item()" in seen.waits[0]
    with softgpu.watch() as seen:
        torch.nonzero(x)
        x[x > 0]
        torch.equal(x, x)
    assert seen.counts["waits"] == len(seen.waits) == 3


def test_waits_of_autograds_thread_are_told() -> None:
    x = torch.ones(3, device="cuda", requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: grad.sum().item() * grad)
    with softgpu.watch() as seen:
        y.sum().backward()
    assert len(seen.waits) == 1 and "grad.sum().item()" in seen.waits[0]


def test_copies_from_pageable_memory_are_counted() -> None:
    with softgpu.watch() as seen:
        torch.ones(3).to("cuda", non_blocking=True)
    assert seen.counts["h2d"] == seen.counts["pageable"] == 1 and seen.counts["h2d_bytes"] == 12
    with softgpu.watch() as seen:
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert seen.counts["h2d"] == 1 and not seen.counts["pageable"] and not seen.waits


def test_a_copy_into_pageable_memory_waits_and_one_into_pinned_does_not() -> None:
    x, pageable, pinned = torch.ones(3, device="cuda"), torch.empty(3), torch.empty(3).pin_memory()
    with softgpu.watch() as seen:
        pageable.copy_(x, non_blocking=True)
    assert len(seen.waits) == seen.counts["waits"] == 1
    with softgpu.watch() as seen:
        pinned.copy_(x, non_blocking=True)
    assert not seen.waits and pinned.tolist() == [1, 1, 1]


def test_watch_keeps_operands() -> None:
    x = torch.ones(2, 3, device="cuda")
    with softgpu.watch(operands=True) as seen:
        x.T + 1
    (call,) = seen.calls
    assert call.name == "add.Tensor" and call.operands[0].stride == (1, 3)
    assert seen.operators == {"add.Tensor": 1}


def test_operands_on_different_devices_are_refused() -> None:
    """As torch's own kernels do; numbers and indices may lie on the host."""
    x = torch.ones(3, device="cuda:0")
    for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
        with pytest.raises(RuntimeError, match="same device"):
            x + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.equal(x, other)
    assert (x + torch.tensor(2.0))[torch.tensor([0, 2])].tolist() == [3, 3]


def compare(f: Callable[..., Tensor], *tensors: Tensor, grad: bool = True) -> None:
    """`f` and its gradients on CUDA against the CPU's: the same kernels, but for the order of sums."""
    results: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        given = [t.to(device).detach().requires_grad_(grad) for t in tensors]
        y = f(*given)
        if grad:
            y.float().square().sum().backward()
        results.append([y.detach(), *(t.grad for t in given if t.grad is not None)])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert on_cuda.is_cuda
        torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


def test_operators() -> None:
    g = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    compare(lambda x, w: F.conv2d(x, w, stride=2, padding=1), r(2, 3, 9, 9), r(4, 3, 3, 3))
    compare(lambda x: F.max_pool2d(x, 3, 2, 1), r(2, 3, 9, 9))
    compare(lambda x: F.batch_norm(x, None, None, training=True), r(4, 3, 5, 5))
    compare(lambda x, w, b: F.layer_norm(x, (5,), w, b), r(4, 5), r(5), r(5))
    compare(lambda x, w, b: F.linear(x, w, b), r(4, 5), r(3, 5), r(3))
    compare(lambda x: F.cross_entropy(x, torch.tensor([0, 2], device=x.device), label_smoothing=0.1), r(2, 3))
    compare(lambda x: x[x > 0], r(7))
    compare(lambda x: torch.cat([x.T, x.T * 2]).softmax(0).cumsum(1), r(4, 6))
    compare(lambda x: x.sort(dim=1).values.topk(2).values, r(4, 6), grad=False)
    compare(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), r(1, 2, 4, 4))
    compare(lambda x: torch.stack(torch._foreach_mul([x, x + 1], 3.0)), r(4))
    assert not forms.unknown


def test_lstm() -> None:
    g = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(s, generator=g) for s in ((3, 2, 5), (28, 5), (28, 7), (28,), (28,)))

    def lstm(x: Tensor, *weights: Tensor) -> Tensor:
        zeros = x.new_zeros(1, 2, 7)
        return torch._VF.lstm(x, (zeros, zeros), list(weights), True, 1, 0.0, True, False, False)[0]

    compare(lstm, x, *weights)


def test_what_only_cudnn_does_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="softgpu: aten::_cudnn_rnn_flatten_weight"):
        torch.nn.LSTM(5, 7).cuda()


def test_out_variants_grow() -> None:
    x = torch.empty(0, device="cuda")
    torch.add(torch.ones(2, 3, device="cuda"), 1, out=x)
    assert x.shape == (2, 3) and x.sum().item() == 12


def test_memory_formats_and_dtypes_under_autocast() -> None:
    conv = torch.nn.Conv2d(3, 4, 3).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.float16):
        y = conv(x)
    assert y.dtype == torch.float16 and y.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_products_are_rounded_once() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=g).bfloat16() for shape in ((64, 512), (512, 64)))
    assert torch.equal((a.cuda() @ b.cuda()).cpu(), (a.float() @ b.float()).bfloat16())


def test_loss_scaling_skips_infinite_steps_and_does_not_wait() -> None:
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    scaler.scale((p * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [1, 1, 1] and scaler.get_scale() == 2.0
    optimizer.zero_grad()
    with softgpu.watch() as seen:
        scaler.scale(p.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not seen.waits, seen.waits
    assert all(v < 1 for v in p.tolist())


def test_random_numbers_obey_seed_and_state() -> None:
    torch.cuda.manual_seed(3)
    a, b = torch.randn(5, device="cuda"), torch.randn(5, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(a, torch.randn(5, device="cuda")) and not torch.equal(a, b)
    state = torch.cuda.get_rng_state()
    c = torch.rand(5, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(c, torch.rand(5, device="cuda"))


def test_events_measure() -> None:
    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    a.record()
    torch.ones(3, device="cuda")
    b.record()
    torch.cuda.synchronize()
    assert a.elapsed_time(b) > 0


def test_no_kernel_of_torch_ran() -> None:
    """One that softgpu does not compute fails instead of giving wrong numbers."""
    assert softgpu.counters()["kernels"] == 0
