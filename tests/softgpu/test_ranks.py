"""Two ranks on two software GPUs, against two ranks on the CPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from fastnet.training.checkpoint import load
from fastnet.training.manifest import read_manifest
from tests.softgpu.process import PATH, needs_compiler, run_python
from tests.support.ranks import start_ranks
from tests.support.runs import events

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("ranks"),
    needs_compiler,
]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", "--"]
# The frozen phase's five steps and one of the whole network, in float32.
FLAGS = ["sample", "--network", "baseline", "--image-size", "32", "--batch-size", "8", "--head-epochs", "1"]
FLAGS += ["--epochs", "1", "--max-steps", "6", "--precision", "fp32", "--log-every", "1", "--threads", "1"]
FLAGS += ["--cuda-graph", "off"]
FLAGS += ["--erase", "0.25"]  # so that DALI makes the images on the CPU, too


@pytest.mark.timeout(600)
def test_two_ranks(tiny_set: Path, tmp_path: Path) -> None:
    on = {"cuda": ["-m", "softgpu", "--devices", "2"], "cpu": []}
    flags = [*FLAGS, "--decode", "cpu"]  # the same pixels for both
    for device, under in on.items():
        train = ["-m", "fastnet.train", *flags, "--data", str(tiny_set), "--run-dir", str(tmp_path / device)]
        run_python([*TORCHRUN, sys.executable, *under, *train])
    cuda, cpu = (events(tmp_path / device, "step") for device in on)
    eps = torch.finfo(torch.float32).eps
    assert len(cuda) == 6
    for mine, theirs in zip(cuda, cpu, strict=True):
        # A few roundings a step, in five steps that train one linear layer.
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=32 * eps), mine
    a, b = (load(tmp_path / device / "last.pt").model for device in on)
    weights = [name for name, t in a.items() if t.is_floating_point() and "running" not in name]
    apart = math.hypot(*((a[name] - b[name]).norm().item() for name in weights))
    assert apart <= 4 * eps * math.hypot(*(b[name].norm().item() for name in weights))


@pytest.mark.parametrize("check", ["summed", "broken_off"])
def test_gradients_are_summed_in_the_graph(check: str, tiny_set: Path, tmp_path: Path) -> None:
    """And where one rank's capture breaks off, both go on with plain steps."""
    inside = ["-m", "softgpu", "--devices", "2", "-m", "tests.softgpu.captured_ranks", check]
    run_python([*TORCHRUN, sys.executable, *inside, str(tiny_set), str(tmp_path)])


def test_full_memory_of_one_rank_ends_both(tiny_set: Path, tmp_path: Path) -> None:
    """The other one waits for its gradients. One line for both, and exit code 2 from each."""
    # ResNet-18's weights, momentum and gradients are 45 MB each, and activations come on top.
    train = ["-m", "fastnet.train", *FLAGS, "--data", str(tiny_set), "--run-dir", str(tmp_path)]
    commands = [
        [
            sys.executable,
            "-m",
            "softgpu",
            "--devices",
            "2",
            "--memory-mb",
            memory,
            *train,
            "--head-epochs",
            "0",
        ]
        for memory in ("2000", "160")
    ]
    ranks = start_ranks(commands, PYTHONPATH=PATH)
    said = [line for rank in ranks for line in rank.communicate(timeout=240)[1].splitlines()]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    (line,) = [line for line in said if line.startswith("error: ")]
    assert line.startswith("error: rank 1: 4 images at 32 px at once: out of memory on cuda:1 (")
    assert not any("Traceback" in line for line in said)


def test_accumulate_auto_takes_what_the_fullest_rank_needs(tiny_set: Path, tmp_path: Path) -> None:
    """16 images of a rank take 38 MB at 64 px in a network that ends with conv2."""
    flags = ["sample", "--network", "linear", "--stages", "conv2", "--image-size", "64", "--batch-size", "32"]
    flags += ["--head-epochs", "0", "--max-steps", "1", "--precision", "fp32", "--threads", "1"]
    flags += ["--cuda-graph", "off", "--decode", "cpu", "--accumulate", "auto"]
    train = ["-m", "fastnet.train", *flags, "--data", str(tiny_set), "--run-dir", str(tmp_path)]
    softgpu = [sys.executable, "-m", "softgpu", "--devices", "2", "--memory-mb"]
    ranks = start_ranks([[*softgpu, memory, *train] for memory in ("2000", "40")], PYTHONPATH=PATH)
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    (session,) = read_manifest(tmp_path).sessions
    assert session["accumulate"] > 1


def test_gpus_of_two_generations_train_the_lstm_network(tiny_set: Path, tmp_path: Path) -> None:
    """Of which one has the Triton kernels, and the other PyTorch's operators."""
    flags = [*FLAGS, "--network", "lstm", "--decode", "cpu", "--max-steps", "1"]
    train = ["-m", "fastnet.train", *flags, "--data", str(tiny_set), "--run-dir", str(tmp_path)]
    softgpu = [sys.executable, "-m", "softgpu", "--devices", "2", "--capability"]
    ranks = start_ranks([[*softgpu, capability, *train] for capability in ("80", "75")], PYTHONPATH=PATH)
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "lstm_backend triton" in said[0] and "1 compiled" not in said[1]


def test_hosts_with_and_without_a_gpu(tiny_set: Path, tmp_path: Path) -> None:
    train = ["-m", "fastnet.train", *FLAGS, "--data", str(tiny_set), "--run-dir", str(tmp_path)]
    commands = [[sys.executable, *train], [sys.executable, "-m", "softgpu", "--devices", "2", *train]]
    ranks = start_ranks(commands, PYTHONPATH=PATH)
    said = [line for rank in ranks for line in rank.communicate(timeout=120)[1].splitlines()]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    (line,) = [line for line in said if line.startswith("error: ")]
    assert line.startswith("error: --device auto: rank 1 on ") and "has none; use hosts alike" in line
