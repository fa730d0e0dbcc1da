"""Two ranks: what they find out of each other, and how they end when memory runs out or one has no device."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.support.ranks import start_ranks

CODE = """
import sys
import torch
from fastnet.cli import run_command
from fastnet.distributed.memory import memory_for
from fastnet.distributed.ranks import joined

def main(argv):
    with joined(30, "cpu") as runtime:
        first = [runtime.is_first_with(key) for key in ("same", f"own of {runtime.rank}")]
        print(f"first: {runtime.rank} {first}", file=sys.stderr)
        with memory_for(f"rank {runtime.rank}: all of it", runtime.device, "take less"):
            torch.empty(1 << 50)

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_memory_that_runs_out_on_all_ranks_is_told_once() -> None:
    ranks = start_ranks([[sys.executable, "-c", CODE]] * 2)
    said = [line for rank in ranks for line in rank.communicate(timeout=60)[1].splitlines()]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    (line,) = [line for line in said if line.startswith("error: ")]
    assert ": all of it: out of memory on this machine" in line and line.endswith("; take less")
    assert not any("Traceback" in line for line in said)
    assert sorted(line for line in said if line.startswith("first: ")) == [
        "first: 0 [True, True]",
        "first: 1 [False, True]",
    ]


APART = """
import sys
from pathlib import Path
import torch
from fastnet.cli import run_command
from fastnet.distributed import ranks
from fastnet.distributed.storage import ranks_sharing

def main(argv):
    with ranks.joined(30, "cpu") as runtime:
        # As on GPUs of two generations.
        ranks.choose_precision = lambda choice, device: (torch.bfloat16, torch.float16)[runtime.rank]
        precision = ranks.agreed_precision("auto", runtime)
        own, shared = Path(argv[runtime.rank]), Path(argv[2])
        print(precision, ranks_sharing(own, runtime), ranks_sharing(shared, runtime), file=sys.stderr)

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_a_precision_for_all_and_the_disk_of_each(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second", "shared")]
    ranks = start_ranks([[sys.executable, "-c", APART, *map(str, folders)]] * 2)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said == ["torch.float16 [0] [0, 1]\n", "torch.float16 [1] [0, 1]\n"]
    assert not any(file for folder in folders for file in folder.iterdir())


WITHOUT_DEVICE = """
import os
from pathlib import Path
from fastnet.cli import run_command
from fastnet.distributed import device
from fastnet.distributed.ranks import joined

def main(argv):
    # On some ranks a GPU's file, and no CUDA that works.
    devices = argv[0] if os.environ["RANK"] in argv[1:] else f"{argv[0]}/none"
    device.NVIDIA_DEVICES = (Path(devices), "nvidia[0-9]*")
    with joined(10, "auto"):
        raise AssertionError("the ranks met")

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("without", [("1",), ("0", "1")])
def test_a_rank_without_a_device_is_told_at_once(without: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    commands = [[sys.executable, "-c", WITHOUT_DEVICE, str(tmp_path), *without]] * 2
    ranks = start_ranks(commands, CUDA_VISIBLE_DEVICES="99")  # no machine has it
    said = [line for rank in ranks for line in rank.communicate(timeout=60)[1].splitlines()]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    (line,) = said
    where = f"rank 1 on {socket.gethostname()}: " if len(without) == 1 else ""
    assert line.startswith(f"error: {where}--device auto: CUDA does not work")


ALONE = """
import sys
import torch.distributed as dist
from fastnet.cli import run_command
from fastnet.distributed.ranks import joined
from fastnet.errors import ImageError, InputError, LostError

def main(argv):
    kind = {"image": ImageError, "input": InputError, "stop": LostError}[argv[0]]
    try:
        with joined(30, "cpu"):
            raise kind("seen")
    finally:
        print(f"in the group: {dist.is_initialized()}", file=sys.stderr)

run_command(main)
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("kind", "stays"),
    [
        ("image", True),
        pytest.param("input", False, marks=pytest.mark.long),
        pytest.param("stop", False, marks=pytest.mark.long),
    ],
)
def test_a_rank_with_an_error_of_its_own_does_not_wait_for_the_others(kind: str, stays: bool) -> None:
    """With NCCL, leaving the group would."""
    ranks = start_ranks([[sys.executable, "-c", ALONE, kind]] * 2)
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert all(f"in the group: {stays}\n" in text for text in said), said
