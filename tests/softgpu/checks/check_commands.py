"""Training, evaluation, ensemble and predictions on "cuda", from start to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import softgpu
from fastnet import ensemble, evaluate, predict, train
from fastnet.cli import run_command
from fastnet.errors import InputError
from fastnet.training.checkpoint import load
from fastnet.training.trainer import Trainer
from tests.softgpu.trainers import begin, tiny_trainer
from tests.support.runs import assert_equal, assert_same_end, events

# Two phases of one epoch, five steps each.
FLAGS = ["--image-size", "32", "--batch-size", "8", "--head-epochs", "1", "--epochs", "1", "--lr", "0.005"]
FLAGS += ["--log-every", "2", "--threads", "1", "--cuda-graph", "off"]


def run_here(data: Path, run: Path, *flags: str) -> dict[str, Any]:
    return train.main(["sample", *FLAGS, "--data", str(data), "--run-dir", str(run), *flags])


@pytest.fixture(scope="module")
def baseline(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp16 with loss scaling, in one go, replayed as CUDA graphs; the runs below make plain steps."""
    run = tmp_path_factory.mktemp("runs") / "baseline"
    flags = ("--network", "baseline", "--precision", "fp16", "--cuda-graph", "on")
    assert run_here(tiny_set, run, *flags)["done"]
    return run


@pytest.fixture(scope="module")
def lstm(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bf16, by torch's LSTMs, from images decoded once."""
    run = tmp_path_factory.mktemp("runs") / "lstm"
    assert run_here(tiny_set, run, "--network", "lstm", "--backend", "torch", "--decode", "raw")["done"]
    return run


def test_records(baseline: Path, lstm: Path) -> None:
    for run, precision, decode in ((baseline, "float16", "device"), (lstm, "bfloat16", "raw")):
        assert [(e["phase"], e["step"]) for e in events(run, "epoch")] == [("head", 5), ("full", 10)]
        assert all(e["val_count"] == 10 for e in events(run, "epoch"))
        manifest = (run / "manifest.json").read_text()
        assert all(f'"{value}"' in manifest for value in ("cuda", precision, decode))
        tensors = load(run / "last.pt").model.values()
        assert all(t.device.type == "cpu" and t.isfinite().all() for t in tensors)


def test_a_stopped_run_continues_to_the_bit(
    baseline: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by --max-steps in the first phase and by a signal in the second."""
    flags = ("--network", "baseline", "--precision", "fp16")
    assert not run_here(tiny_set, tmp_path / "run", *flags, "--max-steps", "3")["done"]
    given = Trainer.train_step

    def step(self: Trainer) -> None:
        given(self)
        if self.state.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        assert run_here(tiny_set, tmp_path / "run", *flags)["step"] == 8
    assert run_here(tiny_set, tmp_path / "run", *flags)["done"]
    assert_same_end(tmp_path / "run", baseline)


def test_a_run_of_the_cpu_continues_on_an_older_gpu(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--precision auto means float32 first and then, without bf16, fp16, whose loss scaling begins there."""
    flags = ("--network", "baseline", "--max-steps")
    run_here(tiny_set, tmp_path / "run", *flags, "3", "--device", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert run_here(tiny_set, tmp_path / "run", *flags, "4")["step"] == 4
    assert load(tmp_path / "run" / "last.pt").scaler["scale"] > 0


def test_after_training(baseline: Path, lstm: Path, tiny_set: Path, tmp_path: Path) -> None:
    data = ["--data", str(tiny_set)]
    for run in (baseline, lstm):
        last = events(run, "epoch")[-1]
        scores = evaluate.main([str(run), *data, "--checkpoint", "last"])
        assert scores["count"] == 10 and scores["top1"] == last["val_top1"]
        # The validation ran in batches of another size.
        assert scores["loss"] == pytest.approx(last["val_loss"], rel=torch.finfo(torch.float16).eps)
    both = ensemble.main([str(baseline), str(lstm), *data])
    assert both["count"] == 10 and len(both["runs"]) == 2
    predict.main([str(baseline), str(lstm), *data, "--out", str(tmp_path / "predictions.txt")])
    assert len((tmp_path / "predictions.txt").read_text().splitlines()) == 5


def test_the_window_of_a_profiler(tiny_set: Path, tmp_path: Path) -> None:
    """Opened and closed once, waiting for the device at both ends; another way to decode, too."""
    flags = ("--network", "baseline", "--decode", "cpu", "--profile-steps", "1:3", "--max-steps", "4")
    with softgpu.watch() as seen:
        run_here(tiny_set, tmp_path / "run", *flags)
    assert seen.counts["profiles"] == 1
    assert len([wait for wait in seen.waits if "profiling.py" in wait]) == 2


def test_records_and_validation_read_the_device_once(tiny_set: Path, tmp_path: Path) -> None:
    with tiny_trainer("baseline", "cuda", torch.bfloat16, tiny_set, tmp_path) as trainer:
        begin(trainer, 0)
        trainer.state.logged = [0] * len(trainer.counter.sums)
        trainer.train_step()
        for action in (trainer.interval_record, trainer.evaluate):
            with softgpu.watch() as seen:
                action()
            # A blocking copy of the totals, which CUDA waits for and then torch.
            assert seen.counts["d2h"] == 1 and len(seen.waits) == 2, seen.waits


def test_a_save_waits_once_and_not_in_the_training(tiny_set: Path, tmp_path: Path) -> None:
    """The state goes into pinned memory; the thread that writes it waits for all copies at once."""
    with tiny_trainer("baseline", "cuda", torch.bfloat16, tiny_set, tmp_path) as trainer:
        running = begin(trainer, 1)
        trainer.train_step()
        state = {"model": trainer.network.state_dict(), "optimizer": running.optimizer.state_dict()}
        with softgpu.watch() as seen:
            trainer.writer.save(state, best=False)
            trainer.writer.finish()
        trainer.train_step()
    assert seen.counts["d2h"] > 100 and not seen.counts["pageable"]
    assert len(seen.waits) == 1 and "ready.synchronize()" in seen.waits[0], seen.waits


@pytest.fixture
def as_before() -> Iterator[None]:
    """Takes back what --deterministic sets for good."""
    yield
    del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_a_deterministic_run(
    tiny_set: Path, tmp_path: Path, as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes through, in both phases of both networks, with operators that have no deterministic kernel refused."""
    one, again, two = (tmp_path / name for name in ("baseline", "again", "lstm"))
    given = ["--deterministic", "--cuda-graph", "off", "--max-steps", "6", "--backend", "torch"]
    for run, network in ((one, "baseline"), (again, "baseline"), (two, "lstm")):
        run_here(tiny_set, run, "--network", network, *given)
    assert_equal(load(one / "last.pt").model, load(again / "last.pt").model)
    for run in (one, two):
        assert json.loads((run / "manifest.json").read_text())["config"]["deterministic"] is True
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    x = torch.ones(1, 1, 4, 4, device="cuda", requires_grad=True)
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.nn.functional.adaptive_avg_pool2d(x, 2).sum().backward()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.mm(x[0, 0], x[0, 0])
    with pytest.raises(InputError, match="--deterministic: CUBLAS_WORKSPACE_CONFIG is :0:0; unset it"):
        run_here(tiny_set, one, "--deterministic")


@pytest.fixture
def full_memory() -> Iterator[None]:
    """PyTorch gets no more memory of the GPU than it holds now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(torch.cuda.memory_reserved(), 1 << 20) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_full_memory_is_one_line_and_keeps_the_checkpoint(
    baseline: Path,
    tiny_set: Path,
    tmp_path: Path,
    full_memory: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = shutil.copytree(baseline, tmp_path / "run")
    position = replace(load(run / "last.pt").position, done=False, phase=1, step=5)
    content = torch.load(run / "last.pt")
    torch.save({**content, "position": asdict(position)}, run / "last.pt")
    before = (run / "last.pt").read_bytes()
    train_flags = ["sample", *FLAGS, "--network", "baseline", "--precision", "fp16", "--run-dir", str(run)]
    tried = {
        "rank 0: 8 images at 32 px at once: ": (train.main, train_flags),
        f"{run}: its network: ": (evaluate.main, [str(run)]),
    }
    for start, (command, flags) in tried.items():
        monkeypatch.setattr(sys, "argv", ["fastnet", *flags, "--data", str(tiny_set)])
        with pytest.raises(SystemExit) as ended:
            run_command(command)
        line = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2
        assert line.startswith(f"error: {start}out of memory on cuda:0 (softgpu (no GPU), 80.0 GiB, "), line
    assert (run / "last.pt").read_bytes() == before


def test_one_gpu_more_than_there_is(monkeypatch: pytest.MonkeyPatch, tiny_set: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(Exception, match="more ranks than the 1 GPUs"):
        run_here(tiny_set, tmp_path / "run")
