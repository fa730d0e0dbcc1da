"""The networks: what they compute, what they leave alone when frozen, and whose weights they take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor

from fastnet.config import Config
from fastnet.errors import InputError
from fastnet.network.network import Network
from fastnet.network.weights import load_backbone
from fastnet.training import checkpoint


def images(config: Config, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = config.image_size
    return torch.randn(batch, 3, size, size, generator=generator).to(memory_format=torch.channels_last)


def torchvision_stages(network: Network, depth: int, x: Tensor) -> dict[str, Tensor]:
    resnet = torchvision.models.get_model(f"resnet{depth}").eval()
    resnet.load_state_dict(
        network.backbone.state_dict(), strict=False
    )  # the network drops what it does not use
    return create_feature_extractor(resnet, {f"layer{i}": f"conv{i + 1}" for i in (1, 2, 3, 4)})(x)


def test_baseline_is_torchvisions_resnet_with_another_last_layer() -> None:
    torch.manual_seed(0)
    network = Network(Config(image_size=64), classes=7).eval()
    resnet = torchvision.models.resnet18(num_classes=7).eval()
    resnet.load_state_dict(
        {
            **network.backbone.state_dict(),
            **{f"fc.{k}": v for k, v in network.classifier.state_dict().items()},
        }
    )
    x = images(Config(image_size=64))
    torch.testing.assert_close(network(x), resnet(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "stages", "seq_len"),
    [(18, ("conv4", "conv5"), 64), (18, ("conv3", "conv4"), 128), (50, ("conv5",), 64)],
)
def test_lstm_network_is_an_lstm_per_group_of_channels(
    depth: int, stages: tuple[str, ...], seq_len: int
) -> None:
    """Against the paper's words: groups of channels, a step per channel, the last hidden states side by side."""
    config = Config(network="lstm", depth=depth, image_size=64, stages=stages, seq_len=seq_len)
    torch.manual_seed(0)
    network = Network(config, classes=7).eval()
    x = images(config)
    assert network.lstm is not None
    lstms = iter(network.lstm.to_lstms())
    with torch.no_grad():
        maps = torchvision_stages(network, depth, x)
        states = []
        for stage in sorted(stages):
            for group in maps[stage].flatten(2).split(seq_len, dim=1):  # [B, T, H*W]
                _, (h, _) = next(lstms)(group)
                states.append(h[0])
        expected = nn.functional.linear(
            torch.cat(states, 1), network.classifier.weight, network.classifier.bias
        )
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    assert next(lstms, None) is None


@pytest.mark.parametrize(
    ("depth", "stages"), [(18, ("conv4",)), (18, ("conv2", "conv3", "conv5")), (50, ("conv3", "conv4"))]
)
def test_linear_network_reads_the_averages_of_the_stages(depth: int, stages: tuple[str, ...]) -> None:
    """The stages behind the last one that is read are not there."""
    config = Config(network="linear", depth=depth, image_size=64, stages=stages)
    torch.manual_seed(0)
    network = Network(config, classes=7).eval()
    x = images(config)
    with torch.no_grad():
        maps = torchvision_stages(network, depth, x)
        averages = torch.cat(
            [maps[stage].flatten(2).sum(2) / maps[stage][0, 0].numel() for stage in stages], 1
        )
        expected = nn.functional.linear(averages, network.classifier.weight, network.classifier.bias)
        torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    assert hasattr(network.backbone, "layer4") == ("conv5" in stages)


def test_the_baseline_is_a_linear_network_of_conv5() -> None:
    torch.manual_seed(0)
    baseline = Network(Config(image_size=64), 7).eval()
    linear = Network(Config(network="linear", image_size=64, stages=("conv5",)), 7).eval()
    linear.load_state_dict(baseline.state_dict())
    x = images(Config(image_size=64))
    assert torch.equal(linear(x), baseline(x))


def test_paper_sizes() -> None:
    config = Config(network="lstm")
    assert config.lstm_stages == [(4, 64, 196), (8, 64, 49)]
    assert Network(config, 200).classifier.in_features == 1176


def test_frozen_backbone_stays_and_has_no_backward() -> None:
    torch.manual_seed(0)
    config = Config(network="lstm", image_size=32)
    network = Network(config, classes=3)
    network.freeze("conv5")
    network.train()
    before = {k: v.clone() for k, v in network.backbone.state_dict().items()}
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        loss = network(images(config, 4)).square().sum()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in network.backbone.state_dict().items())
    assert all(p.grad is None for p in network.backbone.parameters())
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)

    network.freeze("none")
    network(images(config, 4)).sum().backward()
    assert not torch.equal(network.backbone.state_dict()["bn1.running_mean"], before["bn1.running_mean"])
    assert all(p.grad is not None for p in network.parameters())


def test_first_convolution_reads_the_given_memory() -> None:
    """No copy, whatever its kind, between the pipeline's images and the first convolution."""
    config = Config(image_size=64)
    network, x = Network(config, 3).eval(), images(config)
    with torch.no_grad(), OperatorsOn(x) as seen:
        network(x)
    assert seen.names == ["aten.convolution.default"]
    with pytest.raises(ValueError, match="channels_last"):
        network(x.contiguous())


def test_bf16_autocast_casts_the_batch_once() -> None:
    """DALI has no bfloat16: the batch arrives in float16, and its layout survives the one cast."""
    config = Config(image_size=64)
    network, x = Network(config, 3).eval(), images(config).half()
    with torch.no_grad(), OperatorsOn(x) as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        network(x)
    assert seen.names == ["aten._to_copy.default"] and seen.results[0].dtype == torch.bfloat16
    with (
        OperatorsOn(seen.results[0]) as of_the_copy,
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        network(seen.results[0])
    assert of_the_copy.names == ["aten.convolution.default"]


class OperatorsOn(TorchDispatchMode):
    """The operators that take `x`'s memory as their first argument, and what they return."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.address = x.data_ptr()
        self.names: list[str] = []
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(args[0], Tensor) and args[0].data_ptr() == self.address:
            self.names.append(str(func))
            self.results.append(result)
        return result


# The number of tensors in torchvision's published IMAGENET1K_V1 files, which have no num_batches_tracked.
PUBLISHED = {18: 102, 34: 182, 50: 267}


@pytest.mark.parametrize("depth", PUBLISHED)
@pytest.mark.parametrize("form", ["tensors", "parameters"])
def test_published_weights_load(depth: int, form: str, tmp_path: Path) -> None:
    source = torchvision.models.get_model(f"resnet{depth}")
    state = source.state_dict(keep_vars=form == "parameters")
    published = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert len(published) == PUBLISHED[depth]
    torch.save(published, tmp_path / "resnet.pth")
    network = Network(Config(image_size=64, depth=depth), 5)
    load_backbone(network, depth, str(tmp_path / "resnet.pth"))
    own = network.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in published.items() if name in own)
    assert int(own["bn1.num_batches_tracked"]) == 0


def test_weights_from_a_torchvision_file(tmp_path: Path) -> None:
    source = torchvision.models.resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    network = Network(Config(network="lstm", image_size=64), 5)
    load_backbone(network, 18, str(tmp_path / "resnet.pth"))
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name])


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    network = Network(Config(image_size=64), 5)
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "deep.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "fc.pth")
    (tmp_path / "noise.pth").write_bytes(b"PK\x03\x04 not a zip")
    cases = {
        "deep.pth": r"layer1.0.conv1.weight is \[64, 64, 1, 1\], not \[64, 64, 3, 3\]; give the weights of a ResNet-18",
        "fc.pth": "has no tensor conv1.weight",
        "noise.pth": "not a readable PyTorch file",
        "none.pth": "no such file",
    }
    for file, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_backbone(network, 18, str(tmp_path / file))


def test_partial_weights_say_what_is_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet18().state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("layer4.1.")}
    torch.save({**kept, "layer4.0.conv1.weight": torch.zeros(1)}, tmp_path / "part.pth")
    network = Network(Config(image_size=64), 5)
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    with pytest.raises(InputError, match=r"layer4\.0\.conv1\.weight"):
        load_backbone(network, 18, str(tmp_path / "part.pth"))
    note = load_backbone(network, 18, str(tmp_path / "part.pth"), partial=True)
    left = "layer4.0.conv1, layer4.1.conv1, layer4.1.bn1, layer4.1.conv2, layer4.1.bn2"
    assert note.endswith(f"took {len(kept) - 3} tensors, left at random: {left}")
    for name, value in network.backbone.state_dict().items():
        at_random = name.startswith(("layer4.1.", "layer4.0.conv1."))
        assert torch.equal(value, before[name] if at_random else state[name]), name
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"has no tensor conv1\.weight"):
        load_backbone(network, 18, str(tmp_path / "other.pth"), partial=True)


def test_the_small_stem_keeps_the_resolution() -> None:
    """conv2 sees each pixel, and the LSTMs' sizes follow."""
    config = Config(network="lstm", image_size=32, stem="small")
    assert config.lstm_stages == [(4, 64, 64), (8, 64, 16)]
    network, x = Network(config, 3).eval(), images(config)
    assert [tuple(f.shape[2:]) for f in network.features(x)] == [(8, 8), (4, 4)]
    assert network(x).shape == (len(x), 3)


def test_mirrored_images_have_the_same_averaged_scores() -> None:
    network = Network(Config(image_size=64, flip_average=True), 5).eval()
    x = images(Config(image_size=64))
    mirrored = x.flip(3)
    assert torch.equal(network(x), network(mirrored)) and not torch.equal(
        network.head(network.features(x)), network(x)
    )
    network.train()
    assert not torch.equal(network(x), network(mirrored))


def test_checkpoint_of_another_network_is_named(tmp_path: Path) -> None:
    baseline = Network(Config(image_size=64), 5)
    lstm = Network(Config(network="lstm", image_size=64), 5)
    with pytest.raises(InputError, match=r"x\.pt: a checkpoint of another network: lstm"):
        checkpoint.load_model(lstm, tmp_path / "x.pt", baseline.state_dict())
