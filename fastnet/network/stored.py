"""Tensors from PyTorch files that anyone may have made: read without running code, checked before use."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_INFLATION = (
    2  # torch.save does not compress; a file that unpacks to much more than its size is not its work
)


class Unreadable(Exception):
    """The file is not one that `torch.save` made. The message says why."""


def read_stored(path: Path) -> Any:
    """What `torch.save` put into the file, on the CPU. Raises Unreadable."""
    if not path.is_file():
        raise Unreadable("no regular file")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(info.file_size for info in archive.infolist())
            if size > MAX_INFLATION * path.stat().st_size:
                raise Unreadable(f"it would unpack to {size:,} bytes")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Unreadable:
        raise
    except Exception as error:  # the unpickler raises all kinds of errors on files that are not torch's
        raise Unreadable(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from error


def misfit(own: Tensor, stored: Any) -> str:
    """Why `stored` cannot take the place of `own`, "" if it can."""
    if not isinstance(stored, Tensor):
        return f"is of type {type(stored).__name__} and no tensor"
    if stored.shape != own.shape:
        return f"is {list(stored.shape)}, not {list(own.shape)}"
    if stored.layout != torch.strided or stored.is_meta or stored.is_quantized:
        return "is sparse, quantised or without data"
    if stored.is_floating_point() != own.is_floating_point() or stored.is_complex():
        return f"is {stored.dtype}, not {own.dtype}"
    return ""
