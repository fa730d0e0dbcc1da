"""The networks: ResNets whose stages are read by a linear layer or by channel-group LSTMs.

Legend: B batch, S image size, C channels, H and W height and width of a stage, D width of the classifier's input,
K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn

from fastnet.config import Config, stage_channels
from fastnet.errors import InputError
from fastnet.network.convolution import replace_convolutions
from fastnet.profiling import span
from fastnet_kernels import ChannelGroupLSTM, op

LAYERS = {"conv2": "layer1", "conv3": "layer2", "conv4": "layer3", "conv5": "layer4"}


class Network(nn.Module):
    """A ResNet (He et al. 2016) with one of three heads, all ending in a linear layer.

    baseline: the global average of conv5. linear: the global averages of the stages of `config.stages`, side by side.
    lstm: each of these stages is cut along its channels into groups, an LSTM per group runs over the group's channels,
    and their last hidden states are put side by side.

    Takes images [B, 3, S, S] in channels_last and returns logits [B, K] in float32.
    """

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        self.image_size, self.flip_average = config.image_size, config.flip_average
        self.frozen: list[str] = []  # stages
        self.stages = config.read_stages
        resnet = torchvision.models.get_model(f"resnet{config.depth}", weights=None)
        resnet.fc = nn.Identity()
        if config.stem == "small":
            resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
            resnet.maxpool = nn.Identity()
        for stage, layer in LAYERS.items():
            if stage > self.stages[-1]:
                delattr(resnet, layer)
        replace_convolutions(resnet)
        self.backbone = resnet
        self.lstm: ChannelGroupLSTM | None = None
        if config.network == "lstm":
            self.lstm = ChannelGroupLSTM(config.lstm_stages, backend=config.backend)
            width = sum(groups * hidden for groups, _, hidden in config.lstm_stages)
        else:
            width = sum(stage_channels(config.depth, stage) for stage in self.stages)
        self.classifier = nn.Linear(width, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """[B, 3, S, S] -> [B, K]; or what `frozen_outputs` gave for the images.

        Raises ValueError unless images are channels_last; converting them would cost a copy.
        """
        if not isinstance(x, Tensor):
            return self.head(self.after_frozen(x))
        if not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError("the images must be channels_last, as the input pipeline delivers them")
        logits = self.head(self.features(x))  # [B, K]
        if self.flip_average and not self.training:
            logits = (logits + self.head(self.features(x.flip(3)))) / 2
        return logits

    def head(self, features: Sequence[Tensor]) -> Tensor:
        """The outputs of the stages that the head reads, each [B, C, H, W] -> logits [B, K] float32."""
        with span("lstm" if self.lstm else "pool", features[-1].device):
            if self.lstm is not None:
                z = self.lstm(features)  # [B, D]
            else:
                averages = [stage.mean(dim=(2, 3)) for stage in features]  # [B, C] each
                z = averages[0] if len(averages) == 1 else torch.cat(averages, dim=1)  # [B, D]
        return self.classifier(z).float()  # [B, K]

    def features(self, x: Tensor) -> list[Tensor]:
        """Images -> the outputs of the stages that the head reads, from shallow to deep."""
        with span("backbone", x.device):
            with self.no_grad_if(bool(self.frozen)):
                x = self.stem(x)
            outputs = self.through(x, list(LAYERS))
            return [outputs[stage] for stage in self.stages]

    def stem(self, x: Tensor) -> Tensor:
        """[B, 3, S, S] -> the input of conv2's blocks [B, 64, H, W]."""
        net = self.backbone
        return net.maxpool(net.relu(net.bn1(net.conv1(x))))

    def through(self, x: Tensor, stages: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of `stages` by name, as far as the head needs them; `x` is the input of the first one."""
        outputs = {}
        for stage in stages:
            if stage > self.stages[-1]:
                break
            with self.no_grad_if(stage in self.frozen):
                outputs[stage] = x = getattr(self.backbone, LAYERS[stage])(x)
        return outputs

    def kept_stages(self) -> list[str]:
        """The frozen stages whose outputs decide all that follows: those that the head reads, and the last one."""
        frozen = [stage for stage in self.frozen if stage <= self.stages[-1]]
        return [stage for stage in frozen if stage in self.stages or stage == frozen[-1]]

    @torch.no_grad()
    def frozen_outputs(self, x: Tensor) -> list[Tensor]:
        """Images -> the outputs of `kept_stages`, each [B, C, H, W]."""
        outputs = self.through(self.stem(x), self.frozen)
        return [outputs[stage] for stage in self.kept_stages()]

    def after_frozen(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """What `frozen_outputs` gave -> the outputs of the stages that the head reads."""
        outputs = dict(zip(self.kept_stages(), kept, strict=True))
        deeper = [stage for stage in LAYERS if stage not in self.frozen]
        outputs |= self.through(kept[-1], deeper)
        return [outputs[stage] for stage in self.stages]

    @staticmethod
    def no_grad_if(frozen: bool) -> contextlib.AbstractContextManager:
        return torch.no_grad() if frozen else contextlib.nullcontext()

    def freeze(self, last: str) -> None:
        """Freezes the convolutions and batch norms up to and with a stage, and unfreezes the others; "none" of them.

        Frozen ones get no gradients and stay in evaluation mode.
        """
        self.frozen = [stage for stage in LAYERS if last != "none" and stage <= last]
        self.backbone.requires_grad_(True)
        for module in self.frozen_modules():
            module.requires_grad_(False)
        self.train(self.training)

    def frozen_modules(self) -> list[nn.Module]:
        if not self.frozen:
            return []
        layers = [LAYERS[stage] for stage in self.frozen if stage <= self.stages[-1]]
        return [getattr(self.backbone, name) for name in ("conv1", "bn1", *layers)]

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self


def lstm_backend(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """What computes the LSTMs on `device` in `dtype`; "none" for a network without LSTMs.

    Raises InputError if the backend asked for cannot run there.
    """
    if config.network != "lstm":
        return "none"
    try:
        largest = max(hidden for _, _, hidden in config.lstm_stages)
        return op.choose(config.backend, device, dtype, largest)
    except RuntimeError as error:
        raise InputError(f"--backend {config.backend}: {error}") from error
