"""A whole run, for the tests that compare others with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import run_here


@pytest.fixture(scope="module")
def whole(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end in one process."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert run_here(tiny_set, run)["done"]
    return run
