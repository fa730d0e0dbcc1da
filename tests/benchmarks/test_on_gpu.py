"""The command for a first hour on a GPU: its parts run whatever becomes of the others, and end in time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import kernels, on_gpu
from fastnet.errors import InputError


def test_parts_run_whatever_becomes_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catches = "import signal, time\nsignal.signal(signal.SIGINT, lambda *_: print('cut off', flush=True))\n"
    scripts = {
        "fails": "import sys; sys.exit('no')",
        "hangs": catches + "while True: time.sleep(60)",
        "works": "print(1)",
    }
    monkeypatch.setattr(on_gpu, "PATIENCE", 1)
    for name, text in scripts.items():
        (tmp_path / f"part_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = on_gpu.run_parts({name: ([f"part_{name}"], 2) for name in scripts}, tmp_path)
    assert [part["exit_code"] for part in outcome.values()] == [1, None, 0]
    assert [(tmp_path / f"gpu-{name}.txt").read_text() for name in scripts] == ["no\n", "cut off\n", "1\n"]


def test_all_parts_end_within_ten_minutes() -> None:
    assert sum(limit + on_gpu.PATIENCE for _, limit in on_gpu.PARTS.values()) < 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    for command in (on_gpu.main, kernels.main):
        with pytest.raises(InputError, match="needs a GPU"):
            command([])
