"""The CPU's pixels against independent implementations, and the form of the DALI graph for a GPU."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from PIL import Image
from torchvision.transforms import v2

from fastnet.config import Augment
from fastnet.data.prepared import Split
from fastnet.input import draws as aug
from fastnet.input import graph
from fastnet.input.spec import InputSpec, decoder_threads, resolve_decode
from fastnet.input.streams import EvalStream
from tests.support.streams import CPU, POLICIES, TRAIN, VAL, by_sample, levels, pil, spec, stream, take

BY_GRAPH = Augment(erase=1e-12)  # no image is: what DALI's graph makes where nothing else is done to images


def test_crop_and_flip_are_those_of_an_independent_resize(train: Split) -> None:
    size = 96  # larger than any stored image, so no filter has to be agreed on
    inputs = aug.train_inputs(Augment(), aug.epoch_draws(TRAIN, 3, 0), train.sizes, size)
    assert 0 < inputs["mirror"].sum() < TRAIN
    for sample, x in by_sample(take(stream(train, how=spec(size)), 4)).items():
        (top, left), (bottom, right) = inputs["start"][sample], inputs["end"][sample]
        channels = [  # in mode F, PIL resizes without rounding
            Image.fromarray(channel).resize(
                (size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
            )
            for channel in np.asarray(pil(train, sample), np.float32).transpose(2, 0, 1).copy()
        ]
        expected = np.stack([np.asarray(channel) for channel in channels], axis=2)
        expected = expected[:, ::-1] if inputs["mirror"][sample] else expected
        # Both in float32: about 10 operations on numbers below 256, and positions of up to 100 pixels.
        assert np.abs(levels(x) - expected).max() < 10 * 256 * 100 * 2**-24


def test_the_graph_rounds_to_grey_levels(train: Split) -> None:
    """Policies work on those; the same images come out but for that."""
    inputs = aug.train_inputs(Augment(), aug.epoch_draws(TRAIN, 3, 0), train.sizes, 32)
    for sample, x in by_sample(take(stream(train, BY_GRAPH, how=spec(32)), 4)).items():
        (top, left), (bottom, right) = inputs["start"][sample], inputs["end"][sample]
        image = pil(train, sample).resize((32, 32), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        expected = np.asarray(image)[:, ::-1] if inputs["mirror"][sample] else np.asarray(image)
        got = levels(x)
        assert np.abs(got - got.round()).max() < 1e-3
        # Filter supports are cut off differently, so single pixels differ by more than roundings do.
        assert np.abs(got - expected).mean() < 1


@pytest.mark.parametrize("size, eval_crop", [(96, 1.0), (96, 0.875), (128, 0.7)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(val: Split, size: int, eval_crop: float) -> None:
    reference = v2.Compose([v2.Resize(round(size / eval_crop), antialias=True), v2.CenterCrop(size)])
    for batch in EvalStream(val, spec(size, eval_crop=eval_crop), batch_size=9):
        for x, sample in zip(batch.x, batch.index, strict=True):
            # One level, by the roundings of two passes as above.
            assert np.abs(levels(x) - np.asarray(reference(pil(val, sample)))).max() < 1.01


def test_scaling_down_is_antialiased(val: Split) -> None:
    reference = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])
    for batch in EvalStream(val, spec(32), batch_size=9):
        for x, sample in zip(batch.x, batch.index, strict=True):
            # Filter supports are cut off differently, so single pixels differ by more than roundings do.
            assert np.abs(levels(x) - np.asarray(reference(pil(val, sample)))).mean() < 1


def test_normalisation_is_imagenets(val: Split) -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for size in (32, 96):
        (batch,) = EvalStream(val, spec(size), batch_size=VAL)
        grey = (batch.x * std[:, None, None] + mean[:, None, None]) * 255
        assert grey.min() > -1e-3 and grey.max() < 255.001
        for x, own in zip(batch.x, grey, strict=True):
            np.testing.assert_allclose(levels(x), own.permute(1, 2, 0), atol=1e-3)


def test_grey_images_become_rgb(train: Split) -> None:
    batches = take(stream(train, batch_size=TRAIN), 1)
    kinds = [Image.open(io.BytesIO(train.jpeg(i).tobytes())).mode for i in range(TRAIN)]
    assert kinds.count("L") > 5
    for sample, x in by_sample(batches).items():
        spread = np.ptp(levels(x), axis=2).max()
        assert (spread < 1e-3) == (kinds[sample] == "L")


def test_erasing_fills_a_box_and_changes_nothing_else(train: Split) -> None:
    plain = by_sample(take(stream(train, BY_GRAPH, batch_size=TRAIN), 1))
    erased = by_sample(take(stream(train, Augment(erase=0.5), batch_size=TRAIN), 1))
    inputs = aug.train_inputs(Augment(erase=0.5), aug.epoch_draws(TRAIN, 3, 0), train.sizes, 32)
    for sample in plain:
        (top, left), (height, width) = inputs["erase_start"][sample], inputs["erase_shape"][sample]
        expected = levels(plain[sample])
        expected = expected[:, ::-1].copy() if inputs["mirror"][sample] else expected  # the flip comes last
        expected[int(top) : int(top + height), int(left) : int(left + width)] = np.round(aug.MEAN)
        expected = expected[:, ::-1] if inputs["mirror"][sample] else expected
        np.testing.assert_allclose(levels(erased[sample]), expected, atol=1e-3)


def changed_by_hand(
    before: np.ndarray, name: str, kept_bits: int, factor: float, strength: float
) -> np.ndarray:
    """What an operation makes of grey levels, for those that are simple to write down."""
    if name == "posterize":
        return before & (0xFF << (8 - kept_bits) & 0xFF)
    if name == "solarize":
        return np.where(before < 256 * (1 - strength), before, 255 - before)
    if name == "brightness":
        return np.rint(np.clip(before * factor, 0, 255)).astype(int)
    assert name == "identity"
    return before


WRITTEN_DOWN = {"identity", "posterize", "solarize", "brightness"}


@pytest.mark.parametrize("policy", ["trivial", "rand"])
def test_a_policy_obeys_the_operations_and_magnitudes_given(policy: str, train: Split) -> None:
    """rand's operations follow each other, each with the same magnitude."""
    suite = {"trivial": get_trivial_augment_wide_suite, "rand": get_rand_augment_suite}[policy]
    names = [operation.name for operation in suite()]
    draws = aug.epoch_draws(TRAIN, 3, 0)
    inputs = aug.train_inputs(Augment(policy=policy), draws, train.sizes, 32)
    plain = by_sample(take(stream(train, BY_GRAPH, batch_size=TRAIN), 1))
    changed = by_sample(take(stream(train, Augment(policy=policy), batch_size=TRAIN), 1))
    checked = set()
    for sample in plain:
        before, after = np.rint(levels(plain[sample])).astype(int), np.rint(levels(changed[sample]))
        levels_of = range(aug.operations_per_image(policy))
        chosen = [names[inputs[f"operation{level}"][sample]] for level in levels_of]
        if not WRITTEN_DOWN.issuperset(chosen):
            continue
        for level, name in zip(levels_of, chosen, strict=True):
            strength = inputs[f"magnitude{level}"][sample] / (aug.MAGNITUDES - 1)
            sign = -1 if inputs[f"sign{level}"][sample] else 1
            shift = 0.9 * strength if policy == "rand" else 0.01 + 0.98 * strength
            kept_bits = round(8 - (4 if policy == "rand" else 6) * strength)
            before = changed_by_hand(before, name, kept_bits, 1 + sign * shift, strength)
        checked.update(chosen)
        # A grey level that brightness rounds the other way can be on the other side of a later threshold.
        off = np.abs(after - before) > ("brightness" in chosen)
        assert off.mean() <= (0.01 if chosen[0] == "brightness" and len(chosen) > 1 else 0), chosen
    assert checked == WRITTEN_DOWN


# As the NTSC standard of 1953 has them.
RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def test_jitter_changes_hue_saturation_contrast_and_brightness(train: Split) -> None:
    inputs = aug.train_inputs(Augment(policy="jitter"), aug.epoch_draws(TRAIN, 3, 0), train.sizes, 32)
    for name in ("brightness", "contrast", "saturation"):
        assert 0.6 <= inputs[name].min() < 0.7 and 1.3 < inputs[name].max() <= 1.4
    plain = by_sample(take(stream(train, BY_GRAPH, batch_size=TRAIN), 1))
    changed = by_sample(take(stream(train, Augment(policy="jitter"), batch_size=TRAIN), 1))
    for sample in range(TRAIN):
        before, after = levels(plain[sample]), levels(changed[sample])
        assert np.abs(after - before).max() > 0.5
        angle = np.deg2rad(inputs["hue"][sample])
        saturation = inputs["saturation"][sample]
        turned = saturation * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        yiq = before @ RGB_TO_YIQ.T
        yiq[..., 1:] = yiq[..., 1:] @ turned.T
        expected = yiq @ np.linalg.inv(RGB_TO_YIQ).T
        expected = inputs["brightness"][sample] * (128 + inputs["contrast"][sample] * (expected - 128))
        # DALI's own weights of the three channels sum to one within a few per mille.
        assert np.abs(after - expected.clip(0, 255)).max() < 2


def no_batch() -> list:
    return []


def gpu_graph(decode: str, policy: str, pixels: int = 64 * 64) -> str:
    """The serialized graph for a GPU, which DALI checks for arguments, types and devices without having one."""
    augment = Augment(policy=policy, erase=0.5)
    names = tuple(aug.train_inputs(augment, aug.epoch_draws(1, 0, 0), np.array([[64, 64]]), 64))
    how = InputSpec(64, torch.device("cuda", 0), torch.float16, decode, 2)
    made = graph.graph(no_batch, names, how, policy, pixels, batch_size=8, num_threads=2, device_id=None)
    return made.serialize().decode("latin1")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("decode", ["gpu", "cpu", "raw"])
def test_the_gpu_graph_is_valid(decode: str, policy: str) -> None:
    text = gpu_graph(decode, policy)
    assert ("mixed" in text) == (decode == "gpu")
    assert "Resize" in text and "gpu" in text


@pytest.mark.parametrize("side", [64, 4096])
def test_decoder_buffers_fit_the_images(side: int) -> None:
    """36 KB for each of nvJPEG's threads at 64 px, and no more than DALI's own for any size."""
    text = gpu_graph("gpu", "none", side**2)
    for name, most in (("device", 16 << 20), ("host", 8 << 20)):
        # The value follows its name, as a varint of protobuf.
        expected, encoded = min(most, 9 * side**2), bytearray()
        while expected > 0x7F:
            encoded.append(expected & 0x7F | 0x80)
            expected >>= 7
        encoded.append(expected)
        found = text.encode("latin1").split(f"{name}_memory_padding".encode())[1][:40]
        assert bytes(encoded) in found, found


def test_a_batch_decides_how_many_threads_decode() -> None:
    assert [decoder_threads(28, batch) for batch in (1, 4, 5, 32, 256)] == [1, 1, 2, 8, 28]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda images, *_: fn.color_twist(images, brightnes=1.0),  # type: ignore[call-overload]
        lambda images, *_: fn.color_twist(images, brightness="bright"),
        lambda images, *_: fn.color_twist(images, brightness=images),  # an argument on the GPU
        lambda images, *_: fn.decoders.image(images, device="cpu"),  # GPU data for a CPU operator
    ],
)
def test_the_check_of_the_gpu_graph_can_fail(monkeypatch: pytest.MonkeyPatch, wrong: object) -> None:
    monkeypatch.setattr(graph, "apply_policy", wrong)
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        gpu_graph("gpu", "none")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and pytest -m gpu")
@pytest.mark.parametrize("decode", ["gpu", "cpu", "raw"])
@pytest.mark.parametrize("policy", POLICIES)
def test_gpu_pixels_are_those_of_the_cpu(train: Split, decode: str, policy: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    augment = Augment(policy=policy, erase=0.3)
    how = InputSpec(96, device, torch.float16, decode, 2)
    on_cpu = take(stream(train, augment, how=spec(96)), 4)
    for got, expected in zip(take(stream(train, augment, how=how), 4), on_cpu, strict=True):
        assert got.x.device == got.y.device == device and got.x.dtype == torch.float16
        assert got.x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got.y.cpu(), expected.y)
        difference = (got.x.float().cpu() - expected.x).abs() * 255 * min(0.229, 0.224, 0.225)
        # Roundings of the inverse DCT (1 level), chroma (1), resize (1), and of float16 (0.2); operations with
        # thresholds (posterize, solarize, equalize) turn a level into many, but only for a few pixels.
        assert (difference > 3.2).float().mean() < (0 if policy in ("none", "jitter") else 0.02) + 1e-3


def test_auto_decodes_where_the_device_is() -> None:
    assert resolve_decode("auto", CPU) == "cpu"
    assert resolve_decode("auto", torch.device("cuda", 0)) == "gpu"
    assert resolve_decode("raw", CPU) == "raw"
