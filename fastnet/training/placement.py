"""Where a run's images are decoded, and whether the decoded set lies in GPU memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastnet.config import Config
from fastnet.data.holdout import divide
from fastnet.data.prepared import PreparedSet, Split
from fastnet.distributed.ranks import Runtime
from fastnet.errors import InputError
from fastnet.input.decoded import decoded_bytes, why_not_decoded
from fastnet.input.device import unsupported, why_not_compiled
from fastnet.input.jpegs import jpeg_decoder
from fastnet.input.spec import resolve_decode

# How much of the free memory the set may take: where it is asked for, and where auto decides.
ASKED, AUTO = 0.75, 0.25


def splits_read(data: PreparedSet, holdout: float) -> list[Split]:
    """The splits whose images a run decodes: with a holdout val too, at the end."""
    division = divide(data, holdout)
    last = [] if division.val is data.splits["val"] else [data.splits["val"]]
    return [division.train, division.val, *last]


def place(config: Config, splits: Sequence[Split], runtime: Runtime) -> dict[str, str]:
    """What `--decode` means for a run that reads `splits`: {"decode": device, gpu, cpu or raw}. For auto on a GPU
    it also says why, as "decode_reason", and for cpu on a CPU which library decodes where DALI does not, as
    "jpeg_decoder".

    Collective: all ranks decode in the same place, and each asks its own GPU. Raises InputError where --decode cannot
    be.
    """
    device, obstacle = runtime.device, None
    auto = config.decode == "auto" and device.type == "cuda"
    with runtime.agree():
        decode = "device" if auto else resolve_decode(config.decode, device)
        if decode == "device":
            obstacle = _obstacle(config, splits, runtime, AUTO if auto else ASKED)
        if obstacle and not auto:
            raise InputError(f"--decode device: {obstacle}; use gpu, cpu, raw or auto")
        decoder = {"jpeg_decoder": jpeg_decoder()} if decode == device.type == "cpu" else {}
    if not auto:
        return {"decode": decode, **decoder}
    obstacle = runtime.first_of(obstacle)
    if obstacle:
        return {"decode": resolve_decode("auto", device), "decode_reason": obstacle}
    return {"decode": "device", "decode_reason": f"the decoded set takes {_needed(splits, device)}"}


def streamed_decode(decode: str, device: torch.device) -> str:
    """Where images are decoded that a run takes besides those of a step: as `--decode` says, but not into the GPU's
    memory, where the set may lie already."""
    return resolve_decode("auto" if decode == "device" else decode, device)


def image_dtype(decode: str, runtime: Runtime) -> torch.dtype:
    """The type of a batch: what the first convolution computes in, unless DALI makes it, which has no bfloat16."""
    return runtime.dtype if decode == "device" else runtime.image_dtype


def _obstacle(config: Config, splits: Sequence[Split], runtime: Runtime, share: float) -> str | None:
    """Why the decoded splits cannot lie in this rank's GPU, within this share of its free memory, and be used there."""
    device = runtime.device
    lacking = unsupported(config.augment)
    if lacking:
        return f"the kernel has no {lacking}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU is older than compute capability 8.0"
    if _bytes(splits) > share * _free(device):
        return f"the decoded set takes {_needed(splits, device)}, over {share:.0%}"
    return why_not_decoded(splits) or why_not_compiled(
        config.image_size, image_dtype("device", runtime), device
    )


def _needed(splits: Sequence[Split], device: torch.device) -> str:
    return f"{_bytes(splits) / 2**30:.3g} of {_free(device) / 2**30:.3g} GiB free on the GPU"


def _bytes(splits: Sequence[Split]) -> int:
    return sum(map(decoded_bytes, splits))


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
