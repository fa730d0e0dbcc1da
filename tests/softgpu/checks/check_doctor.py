"""The doctor command on a machine with two GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastnet import doctor
from fastnet.diagnosis import kernels, ranks, software
from fastnet.diagnosis.findings import Failed, Skipped


def test_every_check_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # torchrun starts its ranks by this, with -u before the module.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -m softgpu --devices 2 "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON_EXEC", str(python))
    result = doctor.main(["--data", str(tmp_path), "--runs", str(tmp_path)])
    lines = capsys.readouterr().out
    assert [check["outcome"] for check in result["checks"]] == ["ok"] * len(result["checks"]), lines
    assert "2 x softgpu" in lines and "2 over NCCL" in lines and "compiles for sm_80" in lines


def test_one_gpu_has_no_ranks_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Skipped, match="one GPU trains in one process"):
        ranks.ranks()


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "14.1")
    with pytest.raises(
        Failed, match=r"for CUDA 13.0 and older, and PyTorch was built with CUDA 14.1"
    ) as error:
        software.driver()
    assert error.value.remedy == "update the driver, or install a PyTorch for CUDA 13"


def test_kernels_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.channel_group_lstm
    monkeypatch.setattr(kernels, "channel_group_lstm", lambda *a, **b: right(*a, **b) * 1.0001)
    with pytest.raises(Failed, match=r"the LSTM kernels are off by 2.0e-04 on cuda:0"):
        kernels.lstm()
