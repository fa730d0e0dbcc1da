"""The ResNet weights that training starts from: torchvision's, or those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torchvision

from fastnet.errors import InputError
from fastnet.network.network import Network
from fastnet.network.stored import Unreadable, misfit, read_safetensors, read_stored


def load_backbone(network: Network, depth: int, weights: str, *, partial: bool = False) -> str:
    """Loads weights into `network.backbone`. `weights` is `imagenet` (torchvision's), `none`, or a file.

    A file contains tensors under the names of torchvision's ResNet, as a PyTorch state dict or as safetensors, or is a
    fastnet checkpoint. What `load_state_dict` fills in by itself may be missing: torchvision's published files have no
    `num_batches_tracked`. With `partial`, tensors that are missing or do not fit are left as they are; then what is
    returned says how many came and which did not, else it is empty. Raises InputError if the weights cannot be read or
    downloaded, or do not fit; with `partial`, if none fits.
    """
    if weights == "none":
        return ""
    state = _imagenet_state(depth) if weights == "imagenet" else _file_state(Path(weights))
    own = network.backbone.state_dict()
    problems = {name: misfit(own[name], state[name]) for name in own if name in state}
    fitting = {name: state[name] for name, problem in problems.items() if not problem}
    missing = network.backbone.load_state_dict(fitting, strict=False).missing_keys
    if partial and fitting:
        left = ", ".join(_modules(missing)) or "none"
        return f"--weights {weights}: took {len(fitting)} tensors, left at random: {left}"
    for name, problem in problems.items():
        if problem:
            cure = "" if partial else ", or --weights-partial to start what does not fit at random"
            raise InputError(
                f"--weights {weights}: {name} {problem}; give the weights of a ResNet-{depth}{cure}"
            )
    if missing:
        raise InputError(
            f"--weights {weights}: has no tensor {missing[0]}; give the weights of a ResNet-{depth}, or "
            "--weights-partial to start the missing ones at random"
        )
    return ""


def _modules(tensors: list[str]) -> list[str]:
    """The modules that tensors belong to, each once: layer4.0.conv1 for layer4.0.conv1.weight."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))


def _imagenet_state(depth: int) -> dict[str, Any]:
    enum = torchvision.models.get_model_weights(f"resnet{depth}")
    try:
        return dict(enum.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"--weights imagenet: cannot download the weights of ResNet-{depth} ({error}); "
            "give a local file with --weights FILE, or --weights none"
        ) from error


def _file_state(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"--weights {path}: no such file; give imagenet, none, or a file")
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
    try:
        if kind == "safetensors":
            return dict(read_safetensors(path)[0])
        loaded = read_stored(path)
    except Unreadable as error:
        raise InputError(f"--weights {path}: not a readable {kind} file: {error}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("model"), dict):
        prefix = "backbone."
        result = loaded["average"] if isinstance(loaded.get("average"), dict) else loaded["model"]
        loaded = {
            str(name).removeprefix(prefix): value
            for name, value in result.items()
            if str(name).startswith(prefix)
        }
    if not isinstance(loaded, dict):
        raise InputError(
            f"--weights {path}: does not contain a state dict; give imagenet, none, or another file"
        )
    return loaded
