"""The lock while something is made: it follows no link, and goes when its holder does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastnet.data.lock import exclusive
from fastnet.data.preparing import prepare
from fastnet.data.sources import sample_source
from fastnet.errors import InputError


def test_leaves_nothing(tmp_path: Path) -> None:
    with exclusive(tmp_path / "new" / "set"):
        assert [file.name for file in (tmp_path / "new").iterdir()] == [".set.lock"]
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_its_place_is_not_followed(tmp_path: Path, there: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.write_text("precious")
    (tmp_path / ".set.lock").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"\.set\.lock: cannot be written"):
        prepare(sample_source(), tmp_path / "set")
    assert elsewhere.exists() is there and not (tmp_path / "set").exists()
    assert not there or elsewhere.read_text() == "precious"
