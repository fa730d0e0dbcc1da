"""Reading files of tensors that anyone may have made, without running code from them."""

from __future__ import annotations

import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnet.errors import InputError

# torch.save does not compress: it has not made a file that unpacks to much more than its size.
MAX_INFLATION = 2
MAX_HEADER = 1 << 24  # bytes; the names and places of a ResNet's tensors take some 10 KB


class Unreadable(Exception):
    """The file is not of the kind that it should be. The message says why."""


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


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, mapped into memory, and its metadata.

    Raises Unreadable if it is not such a file, InputError if the package that reads it is not installed.
    """
    safetensors = load_extra("safetensors", str(path))
    if not path.is_file():
        raise Unreadable("not a regular file")
    try:
        with path.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > MAX_HEADER:
            raise Unreadable(f"its header has {header:,} bytes")
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise Unreadable(" ".join(str(error).split())[:200]) from error


def load_extra(package: str, what: str) -> Any:
    """Imports a package of the extra `export`. Raises InputError, beginning with `what`, if it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        raise InputError(
            f"{what}: needs the package {package.partition('.')[0]}; install the extra export: pip install '.[export]'"
        ) from error


def misfit(own: Tensor, stored: Any) -> str:
    """Why `stored` cannot take the place of the parameter `own`, as the end of a sentence; "" if it can."""
    if not isinstance(stored, Tensor):
        return f"is a {type(stored).__name__}, not a tensor"
    if stored.shape != own.shape:
        return f"is {list(stored.shape)}, not {list(own.shape)}"
    if stored.layout != torch.strided or stored.is_meta or stored.is_quantized:
        return "is sparse, quantised or has no data"
    # A format of a byte or less does not stand for weights without scales beside it.
    tiny = stored.is_floating_point() and stored.itemsize < 2
    if stored.is_floating_point() != own.is_floating_point() or stored.is_complex() or tiny:
        return f"is {stored.dtype}, not {own.dtype}"
    return ""
