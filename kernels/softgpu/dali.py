"""DALI's GPU pipelines, run by DALI on the CPU; the batches are copied to the device from pinned memory.

A pipeline that is made for a GPU is built without one: its operators become the CPU's, mixed decoders included, and
moving a node to the GPU does nothing. Everything around the graph runs unchanged: external sources, outputs bound to
a stream, `as_tensor`, DLPack.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from nvidia.dali import Pipeline, ops
from nvidia.dali.data_node import DataNode

DEVICE = "softgpu_device"  # the attribute of a pipeline that was made for a GPU


class _Batch:
    """A pipeline's output as a TensorListGPU shows it, as far as dense batches go."""

    def __init__(self, host: Any, device: int) -> None:
        images = torch.from_dlpack(host.as_tensor())
        self.tensor = images.pin_memory().to(torch.device("cuda", device), non_blocking=True)

    def as_tensor(self) -> torch.Tensor:
        return self.tensor


def _is_on_gpu() -> bool:
    """Whether the graph that is being defined is of a pipeline made for a GPU."""
    return hasattr(Pipeline.current(), DEVICE)


def install() -> None:
    """From here on pipelines with a `device_id` are run on the CPU."""
    init, outputs, gpu = Pipeline.__init__, Pipeline._outputs, DataNode.gpu
    signature = inspect.signature(init)

    def made(self: Pipeline, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        device = bound.arguments.get("device_id")
        if device is not None and device >= 0:
            setattr(self, DEVICE, device)
            bound.arguments["device_id"] = None
        init(*bound.args, **bound.kwargs)

    def given_out(self: Pipeline, cuda_stream: Any = None) -> Any:
        if not hasattr(self, DEVICE):
            return outputs(self, cuda_stream)
        return tuple(_Batch(batch, getattr(self, DEVICE)) for batch in outputs(self))

    def moved(self: DataNode) -> DataNode:
        return self if _is_on_gpu() else gpu(self)

    def defined(cls: type, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_on_gpu():
            kwargs["device"] = "cpu"
        return type.__call__(cls, *args, **kwargs)

    operator = type(ops.Resize)  # the metaclass of all operators
    for owner, name, value in (
        (made, "__signature__", signature),  # pipeline_def reads it
        (Pipeline, "__init__", made),
        (Pipeline, "_outputs", given_out),
        (DataNode, "gpu", moved),
        (operator, "__call__", defined),
    ):
        setattr(owner, name, value)
