"""Packages, the NVIDIA driver, and the GPUs that PyTorch can use."""

from __future__ import annotations

import ctypes
import platform
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

import fastnet
from fastnet.diagnosis.findings import Failed, Skipped
from fastnet.distributed.device import has_nvidia_device, why_no_cuda
from fastnet.provenance import DALI, dali_packages, installed_version

NAMED = ("torch", "torchvision", "triton", "numpy", "pyarrow")
DRIVER = Path("/proc/driver/nvidia/version")


def packages() -> str:
    """Versions, which are those that fastnet asks for."""
    wrong = [problem for requirement in _requirements() if (problem := _misfit(requirement))]
    if wrong:
        raise Failed("; ".join(wrong))
    versions = {"fastnet": fastnet.__version__, "python": platform.python_version()}
    versions |= {name: found for name in NAMED if (found := installed_version(name))}
    return ", ".join(f"{name} {version}" for name, version in (versions | dali_packages()).items())


def dali_package() -> str:
    """One of DALI's two packages."""
    found = dali_packages()
    if not found:
        raise Failed("DALI is not installed", f"pip install {DALI[0]}")
    if len(found) > 1:
        raise Failed(
            f"{' and '.join(found)} are both installed, and both own the folder nvidia/dali",
            f"pip uninstall -y {' '.join(DALI)}, then install one of them",
        )
    ((name, version),) = found.items()
    return f"{name} {version}"


def driver() -> str:
    """The NVIDIA driver, and that it is new enough for PyTorch."""
    if not has_nvidia_device() and not torch.cuda.is_available():
        raise Skipped("no GPU")
    reply = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(reply))
    except OSError as error:
        raise Failed(f"there is an NVIDIA device, but no driver library ({error})") from error
    if status:
        raise Failed(f"the driver does not say its version (error {status})")
    newest = (reply.value // 1000, reply.value % 1000 // 10)
    built = torch.version.cuda
    if built is None:
        raise Failed("this PyTorch was built without CUDA", "install PyTorch's CUDA build")
    if newest[0] < int(built.partition(".")[0]):
        raise Failed(
            f"it is for CUDA {newest[0]}.{newest[1]} and older, and PyTorch was built with CUDA {built}",
            f"update the driver, or install a PyTorch for CUDA {newest[0]}",
        )
    return f"{_driver_version()} for CUDA {newest[0]}.{newest[1]}; PyTorch was built with CUDA {built}"


def cuda() -> str:
    """The GPUs, each of which adds two numbers."""
    if not torch.cuda.is_available():
        if not has_nvidia_device():
            raise Skipped("no GPU")
        raise Failed(why_no_cuda())
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        if (torch.ones(1, device=f"cuda:{index}") + 1).item() != 2:
            raise Failed(f"GPU {index} ({properties.name}) computes 1 + 1 wrongly")
        capability = f"sm_{properties.major}{properties.minor}"
        found.append(f"{properties.name} ({capability}, {properties.total_memory / 2**30:.1f} GiB)")
    kinds = {kind: found.count(kind) for kind in found}
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _driver_version() -> str:
    words = DRIVER.read_text(encoding="utf-8").split() if DRIVER.exists() else []
    return next((word for word in words if word[:1].isdigit() and "." in word), "of unknown version,")


def _requirements() -> list[Requirement]:
    """What fastnet needs on this machine; nothing where it runs from a checkout and is not installed."""
    try:
        lines = metadata.requires("fastnet") or []
    except metadata.PackageNotFoundError:
        return []
    needed = [Requirement(line) for line in lines]
    return [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _misfit(requirement: Requirement) -> str:
    """Why the installed package is not what is required; DALI has a check of its own."""
    if requirement.name in DALI:
        return ""
    version = installed_version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} {version} is not {requirement.specifier}"
