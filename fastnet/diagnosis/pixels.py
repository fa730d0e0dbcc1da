"""The decoders and the resize of the input pipeline, DALI's and those without DALI, against PIL."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastnet.data.prepared import Split
from fastnet.diagnosis.findings import Failed, Skipped
from fastnet.input.dali import DaliBatches
from fastnet.input.draws import MEAN, STD, eval_inputs
from fastnet.input.host import HostBatches
from fastnet.input.jpegs import LIBRARY, jpeg_decoder
from fastnet.input.spec import InputSpec

SIZE, IMAGES = 64, 4
# Between two JPEG decoders: a level for the inverse DCT and one for the chroma, and one where PIL rounds.
MOST = 3.0


def dali_on_cpu() -> str:
    return f"decodes as PIL does, to {_difference(torch.device('cpu'), _by_dali):.1f} grey levels"


def dali_on_gpu() -> str:
    if not torch.cuda.is_available():
        raise Skipped("no GPU")
    levels = [
        _difference(torch.device("cuda", index), _by_dali) for index in range(torch.cuda.device_count())
    ]
    return f"decodes on {len(levels)} of {len(levels)} GPUs as PIL does, to {max(levels):.1f} grey levels"


def without_dali() -> str:
    """What decodes for training on the CPU (input/jpegs.py)."""
    if torch.cuda.is_available():
        raise Skipped("GPUs train on what DALI or a kernel of fastnet decodes")
    levels = _difference(torch.device("cpu"), lambda split, spec, _: HostBatches(split, spec, IMAGES))
    decoder = jpeg_decoder()
    quicker = (
        ""
        if decoder == "libturbojpeg"
        else f"; it would be quicker with {LIBRARY} of 2.0.3 or newer (apt-get install libturbojpeg0-dev)"
    )
    return f"{decoder} decodes as PIL does, to {levels:.1f} grey levels{quicker}"


def _by_dali(split: Split, spec: InputSpec, names: tuple[str, ...]) -> DaliBatches:
    return DaliBatches(split, spec, names, "none", IMAGES)


def _difference(
    device: torch.device, source: Callable[[Split, InputSpec, tuple[str, ...]], DaliBatches | HostBatches]
) -> float:
    """The largest difference from PIL's pixels, in grey levels. Raises Failed if it is too large."""
    jpegs = [_jpeg(n) for n in range(IMAGES)]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(jpeg)), np.float32) for jpeg in jpegs])
    sizes = np.full((IMAGES, 2), SIZE, np.int32)
    split = Split.in_memory("check", jpegs, sizes, [str(n) for n in range(IMAGES)], Path())
    spec = InputSpec(SIZE, device, torch.float32, "gpu" if device.type == "cuda" else "cpu", 1)
    here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    inputs = eval_inputs(split.sizes, SIZE, eval_crop=1.0)
    with here, closing(source(split, spec, tuple(inputs))) as batches:
        batches.begin(iter([(np.arange(IMAGES), inputs)]))
        x = batches.take()[0].cpu().numpy()  # [B, S, S, 3]
    difference = float(np.abs(x * np.array(STD) + np.array(MEAN) - expected).max())
    if not difference <= MOST:
        raise Failed(f"its pixels on {device} differ from PIL's by {difference:.1f} grey levels")
    return difference


def _jpeg(n: int) -> bytes:
    """Smooth, so that it survives JPEG."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    channels = [np.sin(2 * np.pi * (x * (n + 1) + c / 3)) * np.cos(2 * np.pi * y) for c in range(3)]
    buffer = io.BytesIO()
    image = Image.fromarray(np.uint8(np.stack(channels, axis=2) * 100 + 128))
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
