"""Other projects' training steps, for benchmarks.step: torchvision's references/classification and timm's train.py.

Neither script is part of its package, so their steps are written out here in the same order, over their own transforms
and with what their packages have. Both train ResNet-18 from the same JPEGs with Nesterov's SGD and label smoothing,
without weight decay: torchvision's as with --opt sgd_nesterov --label-smoothing 0.1 --wd 0 --use-v2.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from benchmarks.pipeline import Batches, to_device
from benchmarks.pipeline_peers import RATIO, SCALE

Step = Callable[[Tensor, Tensor], None]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMOOTHING = 0.1


def amp(device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision on a GPU, as either script has it with --amp; float32 on the CPU."""
    return torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")


def torchvision_images(folder: Path, size: int) -> ImageFolder:
    """ClassificationPresetTrain: PIL, bilinear."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(
                size, scale=SCALE, ratio=RATIO, interpolation=InterpolationMode.BILINEAR, antialias=True
            ),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(MEAN, STD),
            v2.ToPureTensor(),
        ]
    )
    return ImageFolder(folder, transform)


def torchvision_step(classes: int, device: torch.device) -> Step:
    """train_one_epoch of its train.py, with the accuracies that it takes in each step."""
    model = resnet18(num_classes=classes).to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
    model.train()

    def step(x: Tensor, y: Tensor) -> None:
        with amp(device):
            output = model(x)
            loss = criterion(output, y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.inference_mode():
            right = output.topk(min(5, classes), dim=1).indices == y[:, None]
            right[:, :1].sum().item(), right.sum().item(), loss.item()

    return step


def timm_images(folder: Path, size: int) -> ImageFolder:
    """create_transform without its colour jitter, up to uint8, as its prefetcher takes images."""
    from timm.data import create_transform

    transform = create_transform(
        size,
        is_training=True,
        scale=SCALE,
        ratio=RATIO,
        color_jitter=None,
        interpolation="bilinear",
        use_prefetcher=True,
    )
    return ImageFolder(folder, transform)


def timm_collate(samples: list[Any]) -> Any:
    from timm.data.loader import fast_collate

    return fast_collate(samples)


def timm_prefetcher(batches: Batches, device: torch.device) -> Batches:
    """Normalises on the device, in a stream of its own where that is a GPU; a batch ahead."""
    from timm.data.loader import PrefetchLoader

    return PrefetchLoader(batches, MEAN, STD, device=device)


def timm_step(classes: int, device: torch.device) -> Step:
    """train_one_epoch of its train.py with --channels-last, whose loss it reads in each step."""
    from timm import create_model
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import NativeScaler

    model = create_model("resnet18", num_classes=classes).to(device)
    model = model.to(memory_format=torch.channels_last)
    criterion = LabelSmoothingCrossEntropy(SMOOTHING)
    optimizer = create_optimizer_v2(model, "sgd", lr=1e-3, momentum=0.9, weight_decay=0.0)
    scaler = NativeScaler(device=device.type) if device.type == "cuda" else None
    model.train()

    def step(x: Tensor, y: Tensor) -> None:
        x = x.contiguous(memory_format=torch.channels_last)
        with amp(device):
            loss = criterion(model(x), y)
        if scaler:
            scaler(loss, optimizer, parameters=model.parameters())
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


@dataclass(frozen=True)
class Peer:
    """make, collate, arrive: as benchmarks.pipeline.loader takes them; ahead: how many batches `arrive` holds."""

    step: Callable[[int, torch.device], Step]
    make: Callable[[Path, int], ImageFolder]
    collate: Callable | None = None
    arrive: Callable[[Batches, torch.device], Batches] = to_device
    ahead: int = 0


def peers() -> dict[str, Peer]:
    """timm only where it is installed."""
    made = {"torchvision's reference": Peer(torchvision_step, torchvision_images)}
    if find_spec("timm"):
        made["timm"] = Peer(timm_step, timm_images, timm_collate, timm_prefetcher, ahead=1)
    return made
