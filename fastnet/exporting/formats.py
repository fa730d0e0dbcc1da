"""The formats of an export: how a file of each is written, and read back as its users would read it.

Shapes: N images, K classes, S image size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnet.errors import InputError
from fastnet.network.stored import load_extra, read_safetensors

FACTS = "fastnet"  # the name under which a file holds the facts about it, as JSON
ONNX_LIMIT = (1 << 31) - (1 << 20)  # bytes of weights: a protobuf message ends at 2 GiB


class Loaded(NamedTuple):
    """What a file gives: a function from images [N, 3, S, S] to logits [N, K], both float32, and the facts."""

    logits: Callable[[Tensor], Tensor]
    facts: str


class Format(NamedTuple):
    """`write(network, image_size, facts, path)` and `read(path, blank)`.

    blank: a plain network of the same structure, which takes the weights of a file that has nothing else. needs: the
    packages of the extra `export` that the two import.
    """

    file: str
    needs: tuple[str, ...]
    write: Callable[[nn.Module, int, str, Path], None]
    read: Callable[[Path, nn.Module], Loaded]


def write_torch(network: nn.Module, image_size: int, facts: str, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(traced(network, image_size), file, extra_files={FACTS: facts})


def read_torch(path: Path, blank: nn.Module) -> Loaded:
    extra: dict[str, Any] = {FACTS: ""}
    with path.open("rb") as file:
        program = torch.export.load(file, extra_files=extra)
    return Loaded(program.module(), extra[FACTS])


def traced(network: nn.Module, image_size: int) -> torch.export.ExportedProgram:
    """The network as a program of torch's own operators, for any number of images."""
    example = torch.zeros(2, 3, image_size, image_size)
    with warnings.catch_warnings():
        # nn.LSTM has its parameters in a second list, of which torch.export warns.
        warnings.filterwarnings("ignore", "The tensor attributes? self.lstms")
        program = torch.export.export(
            network, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has the paths of files on this machine
    return program


def write_onnx(network: nn.Module, image_size: int, facts: str, path: Path) -> None:
    if sum(tensor.nbytes for tensor in network.state_dict().values()) > ONNX_LIMIT:
        raise InputError(
            "--format onnx: the network has more than the 2 GiB of weights that an ONNX file can hold; use torch or "
            "safetensors"
        )
    program = torch.onnx.export(
        traced(network, image_size),
        (),
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model: Any = program.model_proto
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.value_info, *graph.output):
        del value.metadata_props[:]
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == symbol:
                size.dim_param = "batch"
    for node in graph.node:
        del node.metadata_props[:]  # has the paths of files on this machine
    model.metadata_props.add(key=FACTS, value=facts)
    path.write_bytes(model.SerializeToString())


def read_onnx(path: Path, blank: nn.Module) -> Loaded:
    onnxruntime = load_extra("onnxruntime", "--format onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def logits(images: Tensor) -> Tensor:
        (result,) = session.run(["logits"], {"images": images.contiguous().numpy()})
        return torch.from_numpy(result)

    return Loaded(logits, session.get_modelmeta().custom_metadata_map[FACTS])


def write_safetensors(network: nn.Module, image_size: int, facts: str, path: Path) -> None:
    safetensors = load_extra("safetensors.torch", "--format safetensors")
    # Hub libraries look at `format`.
    path.write_bytes(safetensors.save(network.state_dict(), metadata={"format": "pt", FACTS: facts}))


def read_weights(path: Path, blank: nn.Module) -> Loaded:
    tensors, metadata = read_safetensors(path)
    blank.load_state_dict(tensors)
    return Loaded(blank, metadata[FACTS])


FORMATS = {
    "torch": Format("model.pt2", (), write_torch, read_torch),
    "onnx": Format("model.onnx", ("onnx", "onnxscript", "onnxruntime"), write_onnx, read_onnx),
    "safetensors": Format("model.safetensors", ("safetensors",), write_safetensors, read_weights),
}
