"""The decoded set in the memory of a GPU of 512 MB: where it is placed, and what its batches ask of the device."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import softgpu
from fastnet.config import Augment, Config, sample
from fastnet.data.prepared import Split, open_set
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input.device import DeviceTrainStream
from fastnet.input.spec import InputSpec
from fastnet.input.streams import TrainStream
from fastnet.training.placement import place
from tests.kernels.test_images import test_on_a_gpu as on_a_gpu
from tests.softgpu.trainers import begin, tiny_trainer
from tests.support.resize import resize_bound

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
STEPS = 5  # of 8 images, of 42


@pytest.fixture
def split(tiny_set: Path) -> Split:
    return open_set(tiny_set).splits["train"]


def device_stream(split: Split, dtype: torch.dtype, **options: Any) -> DeviceTrainStream:
    spec = InputSpec(32, CUDA, dtype, "device", 1)
    return DeviceTrainStream(split, spec, Augment(), **{"batch_size": 8, "seed": 3, **options})


def test_what_a_step_asks_for(split: Split) -> None:
    """A launch a batch and one for the counter; at an epoch's first step also the table, from pinned memory."""
    stream = device_stream(split, torch.bfloat16, accumulate=2)
    for step in range(2 * STEPS):
        with softgpu.watch() as seen:
            next(stream)
            next(stream)
        assert seen.counts["triton"] == 2 and not seen.waits
        first = step % STEPS == 0
        copies = {"copy_": 1, "fill_.Scalar": 1} if first else {}
        assert seen.operators == {"add_.Tensor": 1, **copies}
        assert seen.counts["h2d"] == first and seen.counts["pageable"] == 0
    stream.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_captured_batch_is_another_at_each_replay(split: Split, dtype: torch.dtype) -> None:
    """The batches of the CPU, over the end of an epoch."""
    expected = TrainStream(
        split, InputSpec(32, CPU, torch.float32, "cpu", 1), Augment(), batch_size=8, seed=3, step=3
    )
    stream = device_stream(split, dtype, step=3)
    stream.advance()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            x, y = stream.make(0)
            stream.count()
        for step in range(4):
            if step:
                stream.advance()
            graph.replay()
            theirs = next(expected)
            assert x.dtype == dtype and y.tolist() == theirs.y.tolist()
            np.testing.assert_array_equal(stream.index(0), theirs.index)
            near = resize_bound(split.sizes.max()) + theirs.x.abs() * torch.finfo(dtype).eps / 2
            assert ((x.cpu().float() - theirs.x).abs() <= near).all()
    stream.close()
    expected.close()


def test_the_test_for_gpus() -> None:
    on_a_gpu(32, torch.bfloat16)


def larger(split: Split, side: int) -> Split:
    """The split, were its 42 images of this size."""
    return replace(split, sizes=np.full_like(split.sizes, side))


def wants(decode: str, augment: Augment | None = None) -> Config:
    return replace(sample("baseline"), decode=decode, augment=augment or Augment())


def test_auto_takes_a_quarter_of_the_free_memory_and_device_three(split: Split) -> None:
    """42 images of 1200 x 1200 px are 0.169 GiB, of 2000 x 2000 px 0.469 GiB."""
    runtime, middle, large = Runtime(CUDA, amp=torch.bfloat16), larger(split, 1200), larger(split, 2000)
    chosen = place(wants("auto"), (split, split), runtime)
    assert chosen["decode"] == "device"
    takes = r"the decoded set takes 0.00024 of 0\.\d+ GiB free on the GPU"
    assert re.fullmatch(takes, chosen["decode_reason"])
    chosen = place(wants("auto"), (middle,), runtime)
    assert chosen["decode"] == "gpu"
    assert re.fullmatch(r"the decoded set takes 0\.169 of 0\.\d+ GiB .*, over 25%", chosen["decode_reason"])
    assert place(wants("device"), (middle,), runtime) == {"decode": "device"}
    with pytest.raises(InputError, match=r"--decode device: .* 0\.469 of 0\.\d+ GiB .*, over 75%; use gpu"):
        place(wants("device"), (large,), runtime)
    held = torch.empty(384 << 20, dtype=torch.uint8, device=CUDA)
    with pytest.raises(InputError, match=r"0\.169 of 0\.1\d+ GiB .*, over 75%"):
        place(wants("device"), (middle,), runtime)
    del held
    torch.cuda.empty_cache()


class OtherRank(Runtime):
    """A rank beside one whose GPU is full."""

    def first_of(self, value: object) -> object:  # type: ignore[override]
        return value or "no room"

    def agree(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def test_an_averages_batch_norms_see_the_images_of_the_epoch(tiny_set: Path, tmp_path: Path) -> None:
    """They are streamed beside the decoded set, in the type that DALI makes."""
    seen = []
    # On the CPU too DALI makes them, since it erases, although no image is hit.
    for device, amp, decode, erase in (("cuda", torch.bfloat16, "device", 0.0), ("cpu", None, "cpu", 1e-12)):
        here: dict[str, Any] = {"decode": decode, "augment": Augment(erase=erase), "average_last": 1}
        with tiny_trainer("baseline", device, amp, tiny_set, tmp_path, head_epochs=0, **here) as made:
            begin(made, 0)
            seen.append([x.cpu() for x in made.inputs.once_more(made.phase, 0, "batch norms")])
    assert len(seen[0]) == len(seen[1]) == STEPS
    for mine, theirs in zip(*seen, strict=True):
        assert mine.dtype == torch.float16 and mine.is_contiguous(memory_format=torch.channels_last)
        assert ((mine.float() - theirs).abs() <= theirs.abs() * torch.finfo(torch.float16).eps).all()


def test_auto_passes_it_over(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(CUDA)

    def reason(runtime: Runtime = runtime, split: Split = split, augment: Augment | None = None) -> str:
        chosen = place(wants("auto", augment), (split,), runtime)
        assert chosen["decode"] == "gpu"
        return chosen["decode_reason"]

    for augment, flag in (
        (Augment(policy="rand"), "--augment rand"),
        (Augment(erase=0.25), "--erase 0.25"),
    ):
        assert reason(augment=augment) == f"the kernel has no {flag}"
        with pytest.raises(InputError, match=f"--decode device: the kernel has no {flag}; use gpu, cpu, raw"):
            place(wants("device", augment), (split,), runtime)
    assert reason(OtherRank(CUDA)) == "no room"
    elsewhere = replace(split, path=tmp_path / "missing" / "train.arrow")
    assert "train.raw is missing and cannot be written" in reason(split=elsewhere)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        assert "older than compute capability 8.0" in reason()
    with monkeypatch.context() as patch:
        (tmp_path / "file").touch()
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
        larger_images = replace(wants("auto"), image_size=96)  # for which nothing is compiled yet
        chosen = place(larger_images, (split,), runtime)
        assert chosen["decode"] == "gpu" and str(tmp_path / "file") in chosen["decode_reason"]
    for decode in ("gpu", "cpu", "raw"):
        assert place(wants(decode), (split,), runtime) == {"decode": decode}
    assert place(wants("auto"), (split,), Runtime(CPU)) == {"decode": "cpu"}
    with pytest.raises(InputError, match="--decode device: there is no GPU here; use cpu, raw or auto"):
        place(wants("device"), (split,), Runtime(CPU))
