"""What made a result: versions, git revision and machine, with the memory that it has."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastnet

# The package of DALI that fastnet installs, and the one that may take its place.
DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "sve", "bf16")
VERSIONED = ("torch", "torchvision", "triton", DALI[0], "numpy", "pyarrow")


def surroundings() -> dict[str, Any]:
    """Versions, git revision and machine, as far as they can be told."""
    versions = {"fastnet": fastnet.__version__, "python": platform.python_version()}
    versions |= {package: installed_version(package) or "absent" for package in VERSIONED}
    return {
        "versions": versions | dali_packages(),
        "git": git_revision(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "cpu": cpu_features(),
    }


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def dali_packages() -> dict[str, str]:
    """The installed packages of DALI and their versions; more than one overwrite each other."""
    return {package: found for package in DALI if (found := installed_version(package))}


def git_revision() -> str | None:
    """The checkout's commit, with + behind it if files differ from it; in an image, what it was built from
    ($FASTNET_REVISION); None where neither is known."""
    root = Path(__file__).resolve().parent.parent
    given = os.environ.get("FASTNET_REVISION") or None
    if not (root / ".git").exists():  # installed, perhaps inside another project's checkout
        return given
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return given
    return done.stdout.strip() or given


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_features() -> str:
    """Features that decide how fast the processor trains, as "avx2 amx_bf16". Its name alone does not tell them."""
    there = torch.cpu.get_capabilities()
    return " ".join(name for name in FEATURES if there.get(name))


def cpu_name() -> str:
    """The processor's model as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
