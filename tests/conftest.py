"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from fastnet import train
from fastnet.prepare import main as prepare_main
from tests.support.official import jpeg, official_files, write_folder


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs of this machine, except from `pytest -m gpu`: the other tests are about the CPU, or softgpu."""
    if config.option.markexpr != "gpu" and "softgpu" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set in the official layout: 3 classes, 42 train, 10 val and 5 test images of 32 px."""
    directory = tmp_path_factory.mktemp("tiny")
    files = official_files(3, 14, 10, 5, lambda i: jpeg(i, size=32))
    source = write_folder(directory / "source", files) / "tiny-imagenet-200"
    prepare_main([str(source), "--out", str(directory / "set")])
    return directory / "set"


@pytest.fixture(scope="session")
def set_without_test_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_set`, without test images."""
    directory = tmp_path_factory.mktemp("no-test")
    files = official_files(3, 14, 10, 0, lambda i: jpeg(i, size=32))
    source = write_folder(directory / "source", files) / "tiny-imagenet-200"
    prepare_main([str(source), "--out", str(directory / "set")])
    return directory / "set"


@pytest.fixture(scope="session")
def runs(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The baseline and the LSTM network after an epoch of three steps; a test that changes one copies it first."""
    directory = tmp_path_factory.mktemp("runs")
    common = ["sample", "--data", str(tiny_set), "--image-size", "32", "--batch-size", "14"]
    common += ["--head-epochs", "0", "--epochs", "1", "--lr", "0.005"]
    for network in ("baseline", "lstm"):
        train.main([*common, "--network", network, "--run-dir", str(directory / network)])
    return [directory / "baseline", directory / "lstm"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny networks gain nothing from a second thread, and idle threads that spin cost much on a busy machine."""
    torch.set_num_threads(1)
