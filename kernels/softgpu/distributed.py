"""NCCL's place is taken by gloo, which copies CUDA tensors through pinned memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """From here on a process group that asks for NCCL uses gloo; `device_id` has to be the current device."""
    given = dist.init_process_group

    def init_process_group(backend: str | None = None, *, device_id: Any = None, **kwargs: Any) -> None:
        if backend == "nccl":
            current = torch.device("cuda", torch.cuda.current_device())
            if device_id not in (None, current):
                raise RuntimeError(f"softgpu: NCCL bound to {device_id}, current is {current}")
            backend, device_id = "gloo", None
        given(backend, device_id=device_id, **kwargs)

    dist.init_process_group = init_process_group  # type: ignore[assignment]
