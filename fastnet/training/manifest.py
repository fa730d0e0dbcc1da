"""manifest.json, the facts of a run. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from fastnet.errors import InputError


class Manifest(msgspec.Struct):
    """The contents of manifest.json: settings, data, and a session for each start of the run."""

    config: dict[str, Any]
    data: dict[str, Any]
    sessions: list[dict[str, Any]]


def read_manifest(run_dir: Path) -> Manifest:
    """Raises InputError if the run has no manifest, or it is damaged."""
    path = run_dir / "manifest.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}: missing or damaged ({error}); remove it or restore it from a copy"
        ) from error
