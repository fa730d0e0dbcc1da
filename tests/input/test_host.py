"""Batches made on the CPU by the fused pass: DALI's pixels, whatever the files, in memory that is used again.

That the device kernel makes the same ones: test_device.py.

Shapes: S image size.
"""

from __future__ import annotations

import gc
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from fastnet.data import headers
from fastnet.data.decoding import Decoder
from fastnet.data.image import PNG, BadImage, check_header
from fastnet.data.prepared import Split
from fastnet.errors import InputError
from fastnet.input import fused
from fastnet.input.host import FACTOR, SHIFT, HostBatches
from fastnet.input.jpegs import LIBRARY, ImageDecoder, turbojpeg
from tests.support.paths import REPOSITORY
from tests.support.resize import SAMPLES, assert_resized
from tests.support.streams import stream

NOISE = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [32, 96])
def test_as_dali(size: int) -> None:
    sizes = np.array([s.image.shape[:2] for s in SAMPLES], np.int32)
    ends = np.cumsum(sizes.prod(axis=1, dtype=np.int64) * 3)
    pixels = np.concatenate([s.image.ravel() for s in SAMPLES])
    pixels.flags.writeable = False
    boxes = np.stack([s.box for s in SAMPLES])
    start, end = boxes[:, :2].copy(), boxes[:, 2:].copy()
    mirror = np.array([s.mirror for s in SAMPLES], np.int32)
    x = np.full((len(SAMPLES), size, size, 3), np.nan, np.float32)
    starts = np.concatenate([[0], ends[:-1]])
    fused.compiled()(pixels, starts, sizes, start, end, mirror, FACTOR, SHIFT, x)
    assert_resized(torch.from_numpy(x).permute(0, 3, 1, 2), SAMPLES, size)


def encoded(kind: str) -> np.ndarray:
    if kind in ("4:4:0", "4:1:1"):  # which PIL does not write
        return np.frombuffer(simplejpeg.encode_jpeg(NOISE, colorsubsampling=kind.replace(":", "")), np.uint8)
    image, buffer = Image.fromarray(NOISE), io.BytesIO()
    orientation = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    options: dict[str, dict[str, Any]] = {
        "4:4:4": {"subsampling": 0},
        "4:2:2": {"subsampling": 1},
        "4:2:0": {"subsampling": 2},
        "progressive": {"progressive": True},
        "rgb": {"keep_rgb": True},
        "rotated": {"exif": orientation},
    }
    modes = {"grey": "L", "cmyk": "CMYK", "png with alpha": "RGBA", "grey png": "L", "palette": "P"}
    form = "PNG" if kind in ("png", "png with alpha", "grey png", "palette") else "JPEG"
    image.convert(modes.get(kind, "RGB")).save(buffer, form, **options.get(kind, {}))
    return np.frombuffer(buffer.getvalue(), np.uint8)


KINDS = ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1", "progressive", "rgb", "rotated", "grey", "cmyk"]
KINDS += ["png", "png with alpha", "grey png", "palette"]


def split_of(images: Sequence[np.ndarray]) -> Split:
    sizes = np.full((len(images), 2), NOISE.shape[:2], np.int32)
    names = [str(n) for n in range(len(images))]
    return Split.in_memory("host", [image.tobytes() for image in images], sizes, names, Path())


@pytest.fixture(params=["libturbojpeg", "simplejpeg"])
def decode(request: pytest.FixtureRequest) -> ImageDecoder:
    """By either library."""
    compiled = request.param == "libturbojpeg"
    if compiled and not turbojpeg():
        pytest.skip(f"no {LIBRARY} here")
    return ImageDecoder(compiled)


def test_a_libturbojpeg_of_other_pixels_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda image: decode(image) ^ 1)
    assert not turbojpeg.__wrapped__()


def test_decoded_pixels_are_dalis(decode: ImageDecoder) -> None:
    images = [encoded(kind) for kind in KINDS]
    split, everything = split_of(images), np.arange(len(KINDS))
    assert split.components(everything).tolist() == [3, 3, 3, 3, 3, 3, 3, 3, 1, 4, 0, 0, 0, 0]
    jpegs = everything[:-5]
    decode(split, jpegs)
    assert decode.dali.pipe is None, "a JPEG was left to DALI"
    pixels, starts = decode(split, everything)
    for kind, begin, expected in zip(KINDS, starts, Decoder(1)(images), strict=True):
        got = pixels[begin : begin + NOISE.size].reshape(NOISE.shape)
        np.testing.assert_array_equal(got, expected, kind)


def test_a_progressive_jpeg_without_its_last_scans(decode: ImageDecoder) -> None:
    """Versions of libjpeg-turbo smooth it in different ways."""
    whole = encoded("progressive").tobytes()
    scans = [found.start() for found in re.finditer(b"\xff\xda", whole)]
    images = [np.frombuffer(whole[:scan] + b"\xff\xd9", np.uint8) for scan in scans[1:]]
    pixels, _ = decode(split_of(images), np.arange(len(images)))
    np.testing.assert_array_equal(pixels, np.concatenate([image.ravel() for image in Decoder(1)(images)]))
    assert decode.dali.pipe is None


def without(kind: int, image: np.ndarray) -> np.ndarray:
    """The JPEG without its segments of this kind."""
    data, at, kept = image.tobytes(), 2, [b"\xff\xd8"]
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] != kind:
            kept.append(data[at:end])
        at = end
    return np.frombuffer(b"".join([*kept, data[at:]]), np.uint8)


def test_an_image_without_tables_does_not_get_another_ones(decode: ImageDecoder) -> None:
    whole = encoded("4:4:4")
    with pytest.raises(RuntimeError):
        decode(split_of([whole, without(0xDB, whole)]), np.arange(2))
    tables = io.BytesIO()
    Image.fromarray(NOISE).save(tables, "JPEG", optimize=True)  # Huffman tables of its own
    standard = without(0xC4, whole)
    pixels, _ = decode(split_of([np.frombuffer(tables.getvalue(), np.uint8), standard]), np.arange(2))
    np.testing.assert_array_equal(pixels[NOISE.size :], Decoder(1)([standard])[0].ravel())


def test_what_libjpeg_turbo_warns_of_is_left_to_dali(decode: ImageDecoder) -> None:
    whole = encoded("4:4:4")
    odd = np.concatenate([whole[:-2], np.full(9, 7, np.uint8), whole[-2:]])  # bytes before the end's marker
    pixels, _ = decode(split_of([whole, odd]), np.arange(2))
    assert decode.dali.pipe is not None
    np.testing.assert_array_equal(pixels[NOISE.size :], Decoder(1)([odd])[0].ravel())
    cut = whole[:-500]
    with pytest.raises(RuntimeError):
        decode(split_of([whole, cut]), np.arange(2))


def test_headers_read_at_once() -> None:
    """They are those that Python reads, whatever the bytes; what it would refuse is left to it."""
    rng = np.random.default_rng(0)
    images = [encoded(kind).tobytes() for kind in KINDS]
    scans = images[0][:-2] + b"\xff\xda\x00\x02" * 300 + b"\xff\xd9"
    images += [images[0][:2] + b"\xff" * 5 + images[0][2:], scans, b"", b"\xff\xd8\xff"]
    for image in images[:3] * 500:
        changed = bytearray(image[: rng.integers(1, 200)] if rng.random() < 0.3 else image)
        for place in rng.integers(0, len(changed), 3):
            changed[place] = rng.choice([0, 1, 0xC0, 0xC4, 0xD8, 0xDA, 0xFF])
        images.append(bytes(changed))
    height, width = NOISE.shape[:2]
    sizes = np.full((len(images), 2), (height, width), np.int32)
    ends = np.cumsum([len(image) for image in images])
    bounds = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    components = np.zeros(len(images), np.int32)
    headers.compiled()(np.frombuffer(b"".join(images), np.uint8), bounds, sizes, components)
    assert components[:15].tolist() == [3, 3, 3, 3, 3, 3, 3, 3, 1, 4, -1, -1, -1, -1, 3]
    expected = []
    for image in images:
        try:
            found = check_header(image, height, width)
            expected.append(-1 if image.startswith(PNG) else found)
        except BadImage:
            expected.append(-1)
    assert components.tolist() == expected
    assert 200 < expected.count(-1) < len(images) - 200


def test_a_decoder_keeps_its_memory(decode: ImageDecoder) -> None:
    """Also after it had to grow: what it decodes then is whole."""
    image = encoded("4:4:4")
    (expected,) = Decoder(1)([image])
    for count in (1, 3):
        pixels, _ = decode(split_of([image] * count), np.arange(count))
        np.testing.assert_array_equal(pixels.reshape(count, *NOISE.shape), np.stack([expected] * count))
    again, _ = decode(split_of([image]), np.arange(1))
    assert np.shares_memory(again, pixels)


def test_a_broken_image_is_named(train: Split) -> None:
    """After its header, so that only decoding shows it."""
    mapped = train.mapped.copy()
    begin, end = train.bounds[5]
    mapped[(begin + end) // 2 : end] = 0xFF
    source = stream(replace(train, mapped=mapped), batch_size=97)
    with pytest.raises(InputError, match=f"{train.names[5]} is a"):
        next(source)
    source.close()


def test_memory_is_used_again_once_nobody_refers_to_it(train: Split) -> None:
    source = stream(train)
    made = source._source
    assert isinstance(made, HostBatches)
    held = next(source).x.flatten(1)[0]  # any view keeps a batch
    addresses = set()
    for _ in range(12):
        addresses.add(next(source).x.data_ptr())
    gc.collect()
    assert held.data_ptr() not in addresses
    assert len(addresses) <= 4  # two under way, one taken, one about to be
    source.close()


@pytest.mark.slow
def test_compiling_is_announced_once_and_kept(tmp_path: Path) -> None:
    """What a crash of the machine has left of it is named."""
    code = "from fastnet.input.fused import compiled; compiled()"
    said = []
    for damaged in (False, False, True):
        if damaged:
            for index in tmp_path.rglob("*.nbi"):
                index.write_bytes(b"")
        env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode == 0) != damaged, done.stderr
        said.append(done.stderr)
    assert ["data: compiled the pass over images in " in text for text in said] == [True, False, False]
    assert "numba's cache is damaged; remove its *.nbi files" in said[2].splitlines()[-1]
