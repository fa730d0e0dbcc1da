"""Small sets in the official layout of Tiny ImageNet, as a zip, a folder, Parquet files or class folders."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = "tiny-imagenet-200/"


def jpeg(seed: int, size: int = 64, grey: bool = False, quality: int = 75) -> bytes:
    """A JPEG of soft colours with some noise: about 2 KB at 64 px, as in Tiny ImageNet."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (size, size, 1), dtype=np.int16)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    (picture.convert("L") if grey else picture).save(file, "JPEG", quality=quality)
    return file.getvalue()


def wnids(classes: int) -> list[str]:
    return [f"n{1000 + 37 * i:08d}" for i in range(classes)]


def official_files(
    classes: int, train: int, val: int, test: int, image: Callable[[int], bytes]
) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of every file: `train` images per class, `val` and `test` in all; `image` draws the i-th."""
    names = wnids(classes)
    number = iter(range(classes * train + val + test))
    yield ROOT + "wnids.txt", "".join(f"{name}\n" for name in reversed(names)).encode()
    words = (f"{name}\tthing {i}, item {i}\n" for i, name in enumerate(["n00000001", *names]))
    yield ROOT + "words.txt", "".join(words).encode()
    for name in names:
        yield f"{ROOT}train/{name}/{name}_boxes.txt", b"".join(b"%d\t0\t0\t9\t9\n" % i for i in range(train))
        for i in range(train):
            yield f"{ROOT}train/{name}/images/{name}_{i}.JPEG", image(next(number))
    lines = (f"val_{i}.JPEG\t{names[i * 7 % classes]}\t0\t32\t44\t62\n" for i in range(val))
    yield ROOT + "val/val_annotations.txt", "".join(lines).encode()
    for split, count in (("val", val), ("test", test)):
        for i in range(count):
            yield f"{ROOT}{split}/images/{split}_{i}.JPEG", image(next(number))


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def write_folder(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    for name, content in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_parquet(
    path: Path,
    splits: dict[str, list[tuple[str | None, bytes, int]]],
    classes: list[str] | None,
    group: int = 4,
) -> Path:
    """One file per split, as on model hubs: image {bytes, path}, label, and the class names in the metadata."""
    path.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    if classes is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    for split, rows in splits.items():
        images = [{"bytes": content, "path": name} for name, content, _ in rows]
        table = pa.table(
            [pa.array(images, image), pa.array([row[2] for row in rows], pa.int64())], schema=schema
        )
        pq.write_table(table, path / f"{split}-00000-of-00001-0123456789abcdef.parquet", row_group_size=group)
    return path
