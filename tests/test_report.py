"""The report: its numbers, that strangers' words stay words, its size, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from fastnet import ensemble, evaluate, report
from fastnet.data.prepared import PreparedSet, Split
from fastnet.errors import InputError
from fastnet.inference.scores import average_scores, count_hits, count_score_hits
from fastnet.reporting.curves import read_curves
from fastnet.reporting.mistakes import class_results, confused_pairs, confusion_matrix, surest_mistakes
from fastnet.reporting.page import PAIRS, RunResult, render, speed
from fastnet.reporting.pictures import THUMBNAIL, confusion_png, speed_charts, thumbnail
from fastnet.training.events import EpochEvent
from fastnet.training.manifest import Manifest
from tests.support.official import jpeg
from tests.support.paths import REPOSITORY

HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\" ' & {{ 7*7 }} {% raw %} $x$ -->"


class Page(HTMLParser):
    """An HTML page as its elements, in order, and its tables as text: [table][row][cell]."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = tag
        elif tag == "script":
            self.scripts.append("")
            self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "script"):
            self.inside = ""

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside:
            self.tables[-1][-1][-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, *headings: str) -> list[list[str]]:
        """The rows below the table heading that begins with `headings`."""
        return self.table_list(*headings)[0]

    def table_list(self, *headings: str) -> list[list[list[str]]]:
        return [rows[1:] for rows in self.tables if tuple(rows[0][: len(headings)]) == headings]


def small_set(classes: int, images: int, words: list[str] | None = None) -> tuple[PreparedSet, Split]:
    """A set whose validation split is in memory; its images repeat 24 JPEGs of 64 px."""
    encoded = [jpeg(i) for i in range(24)]
    ends = np.cumsum([len(image) for image in encoded])
    bounds = np.stack([ends - [len(image) for image in encoded], ends], axis=1)[np.arange(images) % 24]
    split = Split(
        name="val",
        path=Path("val.arrow"),
        digest="",
        labels=np.arange(images) % classes,
        sizes=np.full((images, 2), 64, np.int32),
        table=pa.table({"name": [f"val_{i}.JPEG" for i in range(images)]}),
        mapped=np.frombuffer(b"".join(encoded), np.uint8),
        bounds=bounds,
    )
    names = [f"n{i:08d}" for i in range(classes)]
    words = words or [f"thing {i}, also called item {i}" for i in range(classes)]
    return PreparedSet(Path("set"), "tiny-imagenet", names, words, {"val": split}, {}, "0" * 64), split


def run_result(
    folder: Path, split: Split, classes: int, name: str, network: str, *, steps: int = 8, text: str = "auto"
) -> RunResult:
    """A run with two phases of two epochs, each of `steps` steps, that was continued once. Half of its images are
    right by design, the others by chance."""
    rng = np.random.default_rng(len(network))
    logits = rng.normal(size=(len(split), classes)).astype(np.float32)
    logits[::2][np.arange(len(logits[::2])), split.labels[::2]] += 9
    events: list[dict[str, object]] = []
    for epoch, phase in enumerate(("head", "head", "full", "full")):
        if epoch % 2 == 0:
            events.append({"event": "phase", "phase": phase, "step": epoch * steps})
        for step in range(epoch * steps + 1, (epoch + 1) * steps + 1):
            events.append({"event": "step", "step": step, "train_loss": 3 / step, "train_top1": 0.1})
        events.append(
            {"event": "epoch", "phase": phase, "epoch": epoch, "step": (epoch + 1) * steps}
            | {"train_loss": 2.5, "train_top1": 0.25, "val_loss": 2.0, "val_top1": 0.5, "val_top5": 0.75}
            | {
                "val_count": len(split),
                "images_per_s": 1000.0 + epoch,
                "step_ms_p50": 12.5,
                "step_ms_p95": 20.0,
            }
            | {"data_wait": 0.125 * epoch, "peak_mem_mb": 512.0, "seconds": 60.0}
        )
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    config = {"network": network, "lr": 0.02, "weights": text, "augment": {"policy": "none", "flip": 0.5}}
    session = {"device": "cpu", "versions": {"torch": "2.14.1"}, "machine": text}
    manifest = Manifest(
        config=config,
        data={"name": "tiny-imagenet", "hash": "0" * 64, "path": text},
        sessions=[{"from_step": 0, **session}, {"from_step": 2 * steps, **session, "device": "cuda"}],
    )
    totals = count_hits(torch.from_numpy(logits), split.labels)
    return RunResult(name, network, "best", 4 * steps, read_curves(folder, name), manifest, logits, totals)


def page_of(
    folder: Path, classes: int = 5, images: int = 60, *, text: str = "auto", name: str = "lstm"
) -> str:
    """The report on two synthetic runs."""
    data, split = small_set(
        classes, images, [f"{text} {i}" for i in range(classes)] if text != "auto" else None
    )
    runs = [
        run_result(folder, split, classes, one, network, text=text)
        for one, network in (("baseline", "baseline"), (name, "lstm"))
    ]
    average = average_scores(torch.from_numpy(np.stack([run.logits for run in runs])))
    return render(data, split, runs, count_score_hits(average, split.labels))


def test_mistakes_are_counted_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 200)
    labels[labels == 4] = 3  # a class without images
    logits = rng.normal(size=(200, 6)).astype(np.float32).round(1)  # rounded: with ties
    predicted = [max(range(6), key=lambda k: (row[k], -k)) for row in logits.tolist()]
    counts = Counter(zip(labels.tolist(), predicted, strict=True))

    matrix = confusion_matrix(logits, labels)
    assert {(i, j): int(matrix[i, j]) for i in range(6) for j in range(6) if matrix[i, j]} == counts
    results = class_results(matrix)
    assert [result.label for result in results][-1] == 4 and results[-1].accuracy is None
    accuracies = [result.accuracy for result in results[:-1]]
    assert accuracies == sorted(accuracies, key=lambda value: value or 0.0)
    for result in results[:-1]:
        wrong = {j: n for (i, j), n in counts.items() if i == result.label != j}
        assert result.accuracy == counts[result.label, result.label] / (labels == result.label).sum()
        assert result.rival is not None and result.rival_count == wrong[result.rival] == max(wrong.values())
    pairs = confused_pairs(matrix, 100)
    assert {(pair.one, pair.other): (pair.one_as_other, pair.other_as_one) for pair in pairs} == {
        (i, j): (counts[i, j], counts[j, i])
        for i in range(6)
        for j in range(i + 1, 6)
        if counts[i, j] + counts[j, i]
    }
    assert [pair.count for pair in pairs] == sorted((pair.count for pair in pairs), reverse=True)
    scores = torch.from_numpy(logits).double().softmax(dim=1)
    expected = sorted(
        (i for i in range(200) if predicted[i] != labels[i]), key=lambda i: -float(scores[i].max())
    )
    found = surest_mistakes(logits, labels, 7)
    assert [mistake.image for mistake in found] == expected[:7]
    for mistake in found:
        assert (mistake.label, mistake.predicted) == (labels[mistake.image], predicted[mistake.image])
        assert mistake.predicted_probability == pytest.approx(float(scores[mistake.image].max()))
        assert mistake.label_probability == pytest.approx(float(scores[mistake.image, mistake.label]))
    perfect = np.diag([3, 0, 2])
    assert confused_pairs(perfect, 5) == [] and all(result.rival is None for result in class_results(perfect))


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_pictures_show_shares_and_keep_their_size() -> None:
    matrix = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 6]])
    alpha = np.asarray(picture(confusion_png(matrix)))[..., 3]
    assert alpha.tolist() == [[221, 128, 0], [0, 0, 0], [128, 0, 221]]  # 255 * sqrt(0.75), 255 * sqrt(0.25)
    wide = io.BytesIO()
    Image.new("L", (640, 320), 90).save(wide, "PNG")
    small = picture(thumbnail(wide.getvalue(), "wide.png"))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (THUMBNAIL, THUMBNAIL // 2))
    with pytest.raises(InputError, match=r"wide\.png: cannot be decoded .*; prepare the set again"):
        thumbnail(wide.getvalue()[:200], "wide.png")


def test_the_command_reports_what_the_others_compute(
    tiny_set: Path, runs: list[Path], tmp_path: Path
) -> None:
    on = [*map(str, runs), "--data", str(tiny_set)]
    result = report.main([*on, "--out", str(tmp_path / "new" / "report.html")])
    assert result["files"] == [str(tmp_path / "new" / "report.html")]
    page = Page((tmp_path / "new" / "report.html").read_text("utf-8"))
    together = ensemble.main([*on, "--out", str(tmp_path)])
    saved = np.load(tmp_path / "scores.npz")

    assert result["runs"] == together["runs"]
    rows = page.table("run", "top-1", "top-5")
    paper = {
        "baseline": ("-", "0.338"),
        "lstm": ("0.3341", "0.386"),
        "average of their scores": ("-", "0.329"),
    }
    for row, found in zip(rows, [*together["runs"].values(), together], strict=True):
        numbers = (
            f"{found['top1']:.2%}",
            f"{found['top5']:.2%}",
            f"{found['loss']:.4f}",
            f"{1 - found['top1']:.4f}",
        )
        assert tuple(row[1:]) == (*numbers, *paper[row[0]])
    for table, scores in zip(page.table_list("no.", "class", "accuracy"), saved["scores"], strict=True):
        right = scores.argmax(1) == saved["labels"]
        for number, _, accuracy, count, _ in table:
            own = saved["labels"] == int(number) - 1
            assert (accuracy, int(count)) == (f"{right[own].mean():.1%}", own.sum())
    recorded = json.loads((runs[0] / "metrics.jsonl").read_text().splitlines()[-1])
    epochs = page.table("epoch", "phase")
    assert epochs[0][:2] == ["1", "full"] and epochs[0][5] == f"{recorded['val_top1']:.1%}"
    assert epochs[0][7:11] == [
        f"{recorded['images_per_s']:.0f}",
        *(f"{recorded[key]:.1f}" for key in ("step_ms_p50", "step_ms_p95")),
        f"{recorded['data_wait']:.1%}",
    ]
    manifest = json.loads((runs[1] / "manifest.json").read_text())
    settings = {row[0]: row[1:] for rows in page.table_list("", "baseline", "lstm") for row in rows}
    assert settings["network"] == ["baseline", "lstm"] and settings["batch_size"] == ["14", "14"]
    assert settings["hash"] == [manifest["data"]["hash"]] * 2
    machine = {row[0]: row[1] for row in page.table_list("", "1")[1]}
    assert machine["machine"] == manifest["sessions"][0]["machine"]
    assert machine["versions.torch"] == manifest["sessions"][0]["versions"]["torch"]


def test_one_run_has_no_average_and_other_weights_can_be_asked_for(runs: list[Path], tmp_path: Path) -> None:
    report.main([str(runs[1]), "--out", str(tmp_path / "a.html"), "--checkpoint", "last"])
    page = Page((tmp_path / "a.html").read_text("utf-8"))
    ((name, top1, *_),) = page.table("run", "top-1")
    assert (name, top1) == ("lstm", f"{evaluate.main([str(runs[1]), '--checkpoint', 'last'])['top1']:.2%}")
    assert "last checkpoint" in " ".join(page.text)


def test_a_continued_run_is_one_run_with_its_phases(tmp_path: Path) -> None:
    text = page_of(tmp_path)
    page = Page(text)
    assert "4 epochs in 2 sessions" in text and text.count("phase two starts") == 4
    rows = page.table("epoch", "phase")
    assert [row[:2] for row in rows] == [["1", "head"], ["2", "head"], ["3", "full"], ["4", "full"]]
    assert [row[7:] for row in rows[:2]] == [
        ["1000", "12.5", "20.0", "0.0%", "1 min 0 s", "512"],
        ["1001", "12.5", "20.0", "12.5%", "1 min 0 s", "512"],
    ]
    tiles = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text)[3:6]
    assert tiles == [
        ("training time, by each epoch&#39;s last session", "4 min 0 s"),
        ("images/s, median", "1,002"),
        ("waiting for data", "18.8%"),  # (0 + 1 + 2 + 3) / 8 / 4
    ]
    sessions = {row[0]: row[1:] for row in page.table("", "1", "2")}
    assert sessions["from_step"] == ["0", "16"] and sessions["device"] == ["cpu", "cuda"]


def test_words_and_names_of_strangers_stay_text(tmp_path: Path) -> None:
    harmless, hostile = (
        page_of(tmp_path, text="harmless"),
        page_of(tmp_path, text=HOSTILE, name=f"lstm {HOSTILE}"),
    )
    one, other = Page(harmless), Page(hostile)
    assert [(tag, list(attributes)) for tag, attributes in one.elements] == [
        (tag, list(attributes)) for tag, attributes in other.elements
    ]
    assert one.scripts == other.scripts and len(other.scripts) == 1
    assert json.loads(other.all("main")[0]["data-words"]) == [f"{HOSTILE} {i}" for i in range(5)]
    assert {row[1].partition("n0000")[0] for row in other.table("no.")} == {
        f"{HOSTILE} {i}" for i in range(5)
    }
    assert f"lstm {HOSTILE}" in [row[0] for row in other.table("run")]


def test_names_that_are_no_text_can_be_written(runs: list[Path], tmp_path: Path) -> None:
    odd = tmp_path / "run\udcff"
    shutil.copytree(runs[0], odd)
    report.main([str(odd), "--out", str(tmp_path / "report.html")])
    assert b"<h1>run&#56575;</h1>" in (tmp_path / "report.html").read_bytes()


def test_the_page_refers_to_nothing_else(tmp_path: Path) -> None:
    text = page_of(tmp_path)
    page = Page(text)
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(name, "#results")
            assert value.startswith("data:image/") or value.removeprefix("#") in identifiers, value
    for url in re.findall(r"url\((.*?)\)", text):
        assert url.removeprefix("#") in identifiers
    assert "@import" not in text and page.all("script") == [{}]
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert (
        policy.startswith("default-src 'none'; img-src data:;") and f"script-src 'sha256-{digest}'" in policy
    )


def test_tiny_imagenet_stays_small(tmp_path: Path) -> None:
    data, split = small_set(200, 10_000)
    text = render(data, split, [run_result(tmp_path, split, 200, "lstm", "lstm", steps=390)], None)
    page = Page(text)
    assert len(page.table("no.")) == 200 and len(page.table("this class")) == PAIRS
    # Ten runs of the whole set may be on one page of 5 MB.
    assert len(text.encode()) < 500_000


def test_what_a_record_lacks_is_left_out(tmp_path: Path) -> None:
    data, split = small_set(3, 12)
    run = run_result(tmp_path, split, 3, "lstm", "lstm")
    for event in run.curves.epochs:
        event.step_ms_p50 = event.step_ms_p95 = event.data_wait = event.peak_mem_mb = event.seconds = None
    page = Page(render(data, split, [run], None))
    assert page.table("epoch")[0][7:] == ["1000", "-", "-", "-", "-", "-"]
    assert "waiting for data" not in page.text
    run.curves.epochs.clear()
    assert not Page(render(data, split, [run], None)).table_list("epoch")


def test_a_run_of_another_set_is_marked(tmp_path: Path) -> None:
    data, split = small_set(3, 12)
    run = run_result(tmp_path, split, 3, "lstm", "lstm")
    warning = "trained on another set than the one that it is scored on"
    assert warning not in render(data, split, [run], None)
    run.manifest.data["hash"] = "1" * 64
    assert warning in render(data, split, [run], None)


def test_bad_input_is_one_line_and_leaves_no_page(runs: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / "manifest.json").write_text("{}")
    out = tmp_path / "report.html"
    with pytest.raises(InputError, match=r"broken/manifest\.json: missing or damaged"):
        report.main([str(runs[0]), str(broken), "--out", str(out)])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/report\.html: cannot be written"):
        report.main([str(runs[0]), "--out", str(tmp_path / "file" / "report.html")])
    assert not out.exists()


def test_an_installed_package_has_the_page(tmp_path: Path) -> None:
    build = "from setuptools import setup; setup()"
    arguments = [
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "build_py",
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    subprocess.run([sys.executable, "-c", build, *arguments], cwd=REPOSITORY, check=True, capture_output=True)
    built = tmp_path / "lib" / "fastnet" / "reporting"
    for name in ("page.html", "page.css", "page.js"):
        assert (built / name).read_bytes() == (REPOSITORY / "fastnet" / "reporting" / name).read_bytes()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install -e .[dev])")
    with (
        playwright.sync_playwright() as started,
        started.chromium.launch(executable_path=chromium) as launched,
    ):
        yield launched


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser: Any, tmp_path: Path, scheme: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(page_of(tmp_path, text=HOSTILE), encoding="utf-8")
    tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url.partition(":")[0]))
    tab.goto(file.as_uri())

    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    images = tab.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
    assert len(images) > 20 and set(images) == {64}
    column = (
        "[...document.querySelector('table.classes').tBodies[0].rows].map(row => row.cells[{}].innerText)"
    )
    heading = tab.locator("table.classes th").nth(0).locator("button")
    heading.click()
    assert tab.evaluate(column.format(0)) == ["1", "2", "3", "4", "5"]
    heading.click()
    assert tab.evaluate(column.format(0)) == ["5", "4", "3", "2", "1"]
    assert tab.locator("th[aria-sort]").count() == 1
    tab.locator("table.classes th").nth(2).locator("button").first.click()
    shares = [float(share.rstrip("%")) for share in tab.evaluate(column.format(2))]
    assert shares == sorted(shares)

    cells = json.loads(tab.locator("svg.matrix").first.get_attribute("data-counts"))
    row, seen, count = next(cell for cell in cells if cell[0] != cell[1])
    box = tab.locator("svg.matrix image").first.bounding_box()
    tab.set_viewport_size({"width": 1200, "height": 1600})
    target = tab.locator("svg.matrix image").first
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    tab.mouse.move(box["x"] + (seen + 0.5) * box["width"] / 5, box["y"] + (row + 0.5) * box["height"] / 5)
    read = tab.locator(".reading").first.inner_text()
    assert read.startswith(" ".join(f"{HOSTILE} {row}, predicted as".split())) and f": {count} image" in read

    shot = np.asarray(Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("L"))
    background = int(np.bincount(shot.ravel()).argmax())
    assert background > 240 if scheme == "light" else background < 40
    assert 0.02 < (np.abs(shot.astype(int) - background) > 60).mean() < 0.5
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert said == [] and set(requests) <= {"file", "data"}
    tab.close()


def test_an_epoch_that_was_continued_after_its_last_step_has_no_pace() -> None:
    timed = EpochEvent("full", 0, 3, 1.0, 0.5, 1.0, 0.5, 0.5, 10, 100.0, 1.0, 1.0, 0.5, 10.0, 2.0)
    bare = EpochEvent("full", 1, 6, 1.0, 0.5, 1.0, 0.5, 0.5, 10)
    assert speed([timed, bare]) == speed([timed]) == {"seconds": 2.0, "images_per_s": 100.0, "data_wait": 0.5}
    assert "nan" not in speed_charts([timed, bare], "run")["images"]
