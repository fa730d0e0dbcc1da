"""The device that a process computes on, and in what precision."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastnet.errors import InputError

# The first is the only one with which cuDNN's LSTMs (--backend torch) repeat themselves, too (torch.nn.LSTM).
CUBLAS_WORKSPACE, CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":16:8", ":4096:8")
NVIDIA_DEVICES = (Path("/dev"), "nvidia[0-9]*")


def choose_device(choice: str = "auto", local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """The device that `--device` means for this rank: auto is a GPU per rank, or the CPU on a machine without GPUs.

    Raises InputError for another word, if a GPU is asked for, or is there, and CUDA does not work, and for more ranks
    than GPUs.
    """
    if choice not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {choice}: not a device; use auto, cpu or cuda")
    if choice == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if choice == "cuda" or has_nvidia_device():
            raise InputError(
                f"--device {choice}: {why_no_cuda()}; install a driver that fits this PyTorch, or insist on the CPU "
                "with --device cpu"
            )
        return torch.device("cpu")
    if local_world_size > torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node {local_world_size}: more ranks than the {torch.cuda.device_count()} GPUs of this machine"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    return device


def make_deterministic() -> None:
    """Lets this process take only algorithms whose results do not change from run to run (`--deterministic`).

    Call it before the first product on a GPU, since cuBLAS reads its setting when it starts. What has no such
    algorithm raises RuntimeError. https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    given = os.environ.setdefault(CUBLAS_WORKSPACE, CUBLAS_WORKSPACES[0])
    if given not in CUBLAS_WORKSPACES:
        raise InputError(
            f"--deterministic: {CUBLAS_WORKSPACE} is {given}; unset it, or set it to {' or '.join(CUBLAS_WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    # Every operator here writes what it reads later; filling each new tensor first would cost a launch.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def has_nvidia_device() -> bool:
    """Whether this process could see an NVIDIA GPU; an empty $CUDA_VISIBLE_DEVICES hides them on purpose."""
    folder, pattern = NVIDIA_DEVICES
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and any(folder.glob(pattern))


def why_no_cuda() -> str:
    """What CUDA says, where torch.cuda.is_available() is false."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises the latter
        return f"CUDA does not work ({' '.join(str(error).split())})"
    return "CUDA does not work"


def choose_precision(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype that `--precision` means: auto is bf16 on sm_80 and newer, fp16 on older GPUs, and float32
    (None) on the CPU, which computes in bf16 only where it is asked to: not all processors gain by it.
    """
    if device.type == "cpu":
        if choice == "fp16":
            raise InputError("--precision fp16: needs a GPU; use auto, fp32 or bf16 here")
        return torch.bfloat16 if choice == "bf16" else None
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    if choice == "bf16" and not modern:
        raise InputError("--precision bf16: this GPU is older than sm_80; use fp16")
    if choice == "auto":
        choice = "bf16" if modern else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[choice]


def nearest_precision(choice: str, device: torch.device) -> torch.dtype | None:
    """The same for a network that is used: what the `--precision` of its training means on this device, or auto where
    the device lacks that, or has it by slow emulation only."""
    slow = choice == "bf16" and device.type == "cpu" and not has_bf16()
    try:
        return choose_precision("auto" if slow else choice, device)
    except InputError:
        return choose_precision("auto", device)


def has_bf16() -> bool:
    """Whether this processor multiplies in bf16. False only where that is known."""
    capabilities = torch.cpu.get_capabilities()
    known = [capabilities[name] for name in ("amx_bf16", "avx512_bf16", "bf16") if name in capabilities]
    return any(known) or not known


def threads_per_rank() -> int:
    """The cores that this process may use, shared among the ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
