"""A trained network in terms of torchvision's ResNet and nn.LSTM: the same function, under names that others know.

Shapes: B images, C channels, K classes, S image size; T steps and H hidden units of an LSTM.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

from fastnet.config import Config, stage_channels
from fastnet.network.network import LAYERS, Network


# The model card of a file of weights holds one of these classes as it stands here, so they take nothing but torch.
class AveragedStagesResNet(nn.Module):
    """A ResNet up to the last stage that is read, the stages' averages over all positions, and a linear layer.

    channels: of each stage that is read, by torchvision's name of the stage. Images [B, 3, S, S] -> logits [B, K].
    """

    def __init__(self, resnet: nn.Module, channels: dict[str, int], classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.stages: list[str] = []
        for name, child in resnet.named_children():
            self.add_module(name, child)
            self.stages.append(name)
            if name == max(channels):
                break
        self.fc = nn.Linear(sum(channels.values()), classes)

    def forward(self, images: Tensor) -> Tensor:
        x, averages = images, []
        for stage in self.stages:
            x = self.get_submodule(stage)(x)  # [B, C, h, w]
            if stage in self.channels:
                averages.append(x.mean(dim=(2, 3)))  # [B, C]
        return self.fc(torch.cat(averages, dim=1))


class ChannelGroupResNet(nn.Module):
    """A ResNet up to the last stage that LSTMs read, an LSTM per group of channels, and a linear layer.

    lstms: groups and hidden size for each of the stages that are read, by torchvision's name of the stage.
    Images [B, 3, S, S] -> logits [B, K].
    """

    def __init__(self, resnet: nn.Module, lstms: dict[str, tuple[int, int]], classes: int) -> None:
        super().__init__()
        self.stages: list[str] = []
        for name, child in resnet.named_children():
            self.add_module(name, child)
            self.stages.append(name)
            if name == max(lstms):
                break
        self.lstms = nn.ModuleDict(
            {
                name: nn.ModuleList(nn.LSTM(hidden, hidden, batch_first=True) for _ in range(groups))
                for name, (groups, hidden) in lstms.items()
            }
        )
        self.fc = nn.Linear(sum(groups * hidden for groups, hidden in lstms.values()), classes)

    def forward(self, images: Tensor) -> Tensor:
        x, states = images, []
        for stage in self.stages:
            x = self.get_submodule(stage)(x)  # [B, C, h, w]
            if stage in self.lstms:
                lstms = list(self.lstms[stage].children())
                groups = x.flatten(2).chunk(len(lstms), dim=1)  # [B, T, H] each
                for lstm, group in zip(lstms, groups, strict=True):
                    _, (h, _) = lstm(group)
                    states.append(h[0])  # [B, H]
        return self.fc(torch.cat(states, dim=1))


def plain_network(config: Config, classes: int) -> nn.Module:
    """torchvision's ResNet or one of the classes above, in evaluation mode, with random weights that take no
    gradient."""
    network = torchvision.models.get_model(f"resnet{config.depth}", weights=None, num_classes=classes)
    if config.stem == "small":
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    if sizes := lstm_sizes(config):
        network = ChannelGroupResNet(network, sizes, classes)
    if channels := averaged_channels(config):
        network = AveragedStagesResNet(network, channels, classes)
    return network.eval().requires_grad_(False)


def lstm_sizes(config: Config) -> dict[str, tuple[int, int]]:
    """Groups and hidden size of each stage that LSTMs read, by torchvision's name of the stage."""
    if config.network != "lstm":
        return {}
    sizes = zip(config.stages, config.lstm_stages, strict=True)
    return {LAYERS[stage]: (groups, hidden) for stage, (groups, _, hidden) in sizes}


def averaged_channels(config: Config) -> dict[str, int]:
    """Channels of each stage whose average is read, by torchvision's name of the stage; empty for torchvision's own
    head, which reads conv5."""
    if config.network == "lstm" or config.read_stages == ("conv5",):
        return {}
    return {LAYERS[stage]: stage_channels(config.depth, stage) for stage in config.read_stages}


def plain_state(network: Network) -> dict[str, Tensor]:
    """The trained weights as `plain_network` names them.

    torchvision's names for the ResNet, `fc.*` for the linear layer, `lstms.layer4.0.weight_ih_l0` for the LSTM of the
    first group of conv5.
    """
    state = dict(network.backbone.state_dict())
    state |= {f"fc.{name}": tensor for name, tensor in network.classifier.state_dict().items()}
    if network.lstm is not None:
        lstms = iter(network.lstm.to_lstms())
        for stage, (groups, _, _) in zip(network.stages, network.lstm.stages, strict=True):
            for group in range(groups):
                for name, tensor in next(lstms).state_dict().items():
                    state[f"lstms.{LAYERS[stage]}.{group}.{name}"] = tensor
    return state
