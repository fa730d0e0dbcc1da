"""Reading PyTorch files that anyone may have made, without running code from them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# torch.save does not compress: it has not made a file that unpacks to much more than its size.
MAX_INFLATION = 2


class Unreadable(Exception):
    """The file was not made by `torch.save`. The message says why."""


def read_stored(path: Path) -> Any:
    """What `torch.save` put into the file, on the CPU. Raises Unreadable if it did not make the file."""
    if not path.is_file():
        raise Unreadable("not a regular file")
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
    """Why `stored` cannot take the place of the parameter `own`, as the end of a sentence; "" if it can."""
    if not isinstance(stored, Tensor):
        return f"is a {type(stored).__name__}, not a tensor"
    if stored.shape != own.shape:
        return f"is {list(stored.shape)}, not {list(own.shape)}"
    if stored.layout != torch.strided or stored.is_meta or stored.is_quantized:
        return "is sparse, quantised or has no data"
    if stored.is_floating_point() != own.is_floating_point() or stored.is_complex():
        return f"is {stored.dtype}, not {own.dtype}"
    return ""
