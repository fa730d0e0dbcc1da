"""Images decoded once, for --decode raw: the same pixels, one file for all ranks, damaged files refused."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastnet.config import Augment
from fastnet.data.prepared import PreparedSet, Split, open_set
from fastnet.errors import InputError
from fastnet.input import decoded, streams
from fastnet.input.decoded import DecodedImages, decoded_bytes, why_not_decoded
from tests.support.streams import TRAIN, by_sample, pil, spec, stream, take


@pytest.fixture
def fresh(prepared: PreparedSet, tmp_path: Path) -> Split:
    """The training split of a set that nobody has decoded yet."""
    for file in ("set.json", "train.arrow", "val.arrow"):
        (tmp_path / file).write_bytes((prepared.path / file).read_bytes())
    return open_set(tmp_path).splits["train"]


@pytest.mark.slow
def test_raw_has_the_pixels_of_cpu(fresh: Split) -> None:
    augment = Augment(policy="trivial", erase=0.3)
    decoded = by_sample(take(stream(fresh, augment, how=spec(decode="raw")), 8))
    for sample, x in by_sample(take(stream(fresh, augment), 8)).items():
        assert torch.equal(decoded[sample], x)
    images = DecodedImages(fresh, 1)
    for i in range(TRAIN):
        assert images(i).shape == (*fresh.sizes[i], 3)
        np.testing.assert_array_equal(images(i), np.asarray(pil(fresh, i)))


def test_only_what_is_decoded_has_to_fit_into_memory(fresh: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "machine_memory", lambda: 0)
    with pytest.raises(InputError, match="largest images take"):
        stream(fresh, Augment(), how=spec(decode="cpu"))
    take(stream(fresh, Augment(), how=spec(decode="raw")), 1)


def test_many_ranks_make_one_raw_file(fresh: Split, capfd: pytest.CaptureFixture) -> None:
    (fresh.path.parent / ".train.raw.99999.partial").write_bytes(b"left by a killed process")
    threads = [threading.Thread(target=DecodedImages, args=(fresh, 1)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err.count("decoding train once") == 1
    assert sorted(p.name for p in fresh.path.parent.iterdir()) == [
        "set.json",
        "train.arrow",
        "train.raw",
        "val.arrow",
    ]


def test_room_is_asked_for_all_splits_at_once(fresh: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    val = open_set(fresh.path.parent).splits["val"]
    each = [decoded_bytes(split) for split in (fresh, val)]
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda path: SimpleNamespace(free=max(each)))
    assert why_not_decoded([fresh]) is why_not_decoded([val]) is why_not_decoded([fresh, fresh]) is None
    assert f"would take {sum(each) / 1e6:.0f} MB" in (why_not_decoded([fresh, val]) or "")


def test_a_stale_or_short_raw_file_is_refused(fresh: Split) -> None:
    DecodedImages(fresh, 1)
    path = fresh.path.with_suffix(".raw")
    whole = path.read_bytes()
    for content in (whole[:14] + b"0000" + whole[18:], whole[:-1], b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train\.raw.*remove it"):
            stream(fresh, how=spec(decode="raw"))


def test_a_set_that_was_replaced_is_not_mixed_with_the_one_in_use(fresh: Split) -> None:
    """A run opens its images again, in another size or for a last look at val."""
    meta = fresh.path.parent / "set.json"
    meta.write_text(meta.read_text().replace(fresh.digest, "0" * 64))
    with pytest.raises(InputError, match="was replaced by another set since it was opened"):
        DecodedImages(fresh, 1)
    assert not fresh.path.with_suffix(".raw").exists()


def test_a_raw_file_that_does_not_fit_leaves_nothing(fresh: Split) -> None:
    before = sorted(fresh.path.parent.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"train\.raw"):
            DecodedImages(fresh, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(fresh.path.parent.iterdir()) == before
