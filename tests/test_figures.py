"""The figures: what the SVG says, that it is the same each time, and damaged metrics."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fastnet.errors import InputError
from fastnet.figures import main, read_curves

SVG = "{http://www.w3.org/2000/svg}"


def write_run(path: Path, *, head_epochs: int, epochs: int, steps: bool = True) -> Path:
    """A run of 10 steps per epoch whose every number is known: top-1 is step/1000, validation half of it."""
    path.mkdir(parents=True)
    events: list[dict[str, object]] = [
        {"event": "phase", "phase": "head" if head_epochs else "full", "step": 0}
    ]
    for epoch in range(head_epochs + epochs):
        phase = "head" if epoch < head_epochs else "full"
        if epoch and epoch == head_epochs:
            events.append({"event": "phase", "phase": "full", "step": 10 * epoch})
        for step in (10 * epoch + 5, 10 * epoch + 10) if steps else ():
            events.append(
                {"event": "step", "phase": phase, "epoch": epoch, "step": step, "lr": 0.1}
                | {"train_loss": 5 - step / 100, "train_top1": step / 1000}
            )
        step = 10 * epoch + 10
        events.append(
            {"event": "epoch", "phase": phase, "epoch": epoch, "step": step}
            | {"train_loss": 5 - step / 100, "train_top1": step / 1000}
            | {"val_loss": 4.0, "val_top1": step / 2000, "val_top5": step / 1000, "val_count": 100}
        )
    path.joinpath("metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def shapes(svg: Path) -> dict[str, list[tuple[float, float]]]:
    """The named lines of the picture: gid -> corner points in the picture's units."""
    found = {}
    for group in ElementTree.parse(svg).iter(f"{SVG}g"):
        path = group.find(f"{SVG}path")
        if path is not None and " " in group.get("id", ""):
            pairs = re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))
            found[group.attrib["id"]] = [(float(x), float(y)) for x, y in pairs]
    return found


def texts(svg: Path) -> list[str]:
    return ["".join(text.itertext()) for text in ElementTree.parse(svg).iter(f"{SVG}text")]


def test_picture_shows_both_runs_their_lines_and_the_start_of_phase_two(tmp_path: Path) -> None:
    baseline = write_run(tmp_path / "baseline", head_epochs=0, epochs=3)
    lstm = write_run(tmp_path / "lstm", head_epochs=2, epochs=2)
    result = main([str(baseline), str(lstm), "--out", str(tmp_path / "new" / "figures")])

    png, svg = map(Path, result["files"])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in svg.parent.iterdir()) == ["training.png", "training.svg"]
    lines = shapes(svg)
    assert {name for name in lines if "phase" in name} == {"lstm loss phase two", "lstm top-1 phase two"}
    for quantity in ("loss", "top-1"):
        assert len(lines[f"baseline {quantity} training"]) == 6
        assert len(lines[f"lstm {quantity} training"]) == 8
        assert len(lines[f"lstm {quantity} validation"]) == 4
        # Phase two starts after 2 of 4 epochs: at the second point of the validation line.
        (marker_x, _), _ = lines[f"lstm {quantity} phase two"]
        assert marker_x == pytest.approx(lines[f"lstm {quantity} validation"][1][0], abs=1e-3)
    # Both runs share the axes: the same accuracy is at the same height.
    heights = [[y for _, y in lines[f"{name} top-1 validation"][:3]] for name in ("baseline", "lstm")]
    assert heights[0] == pytest.approx(heights[1], abs=1e-3)
    # y runs downwards in SVG. Accuracy rises in equal steps, training loss falls, validation loss is flat.
    first, second, third = heights[0]
    assert first - second == pytest.approx(second - third, abs=1e-3) and first - second > 1
    assert lines["lstm loss training"][0][1] < lines["lstm loss training"][-1][1]
    assert len({y for _, y in lines["lstm loss validation"]}) == 1
    words = texts(svg)
    assert {"training", "validation", "iteration (optimiser steps)", "accuracy (top-1)"} <= set(words)
    assert words.count("phase two starts") == 2
    assert "baseline: best validation top-1 1.5%" in words
    assert "lstm: best validation top-1 2.0%" in words


def test_what_a_holdout_validated_is_called_so(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", head_epochs=0, epochs=2)
    held = write_run(tmp_path / "held", head_epochs=0, epochs=2)
    facts = {"config": {"holdout": 0.1}, "data": {}, "sessions": []}
    (held / "manifest.json").write_text(json.dumps(facts))
    main([str(plain), str(held), "--out", str(tmp_path / "out")])
    said = texts(tmp_path / "out" / "training.svg")
    assert "plain: best validation top-1 1.0%" in said and "held: best holdout top-1 1.0%" in said
    assert {"training", "validation", "holdout"} <= set(said)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / os.fsdecode(b"caf\xe9"), head_epochs=0, epochs=1)
    main([str(run), "--out", str(tmp_path / "out")])
    assert any(text.startswith(r"caf\udce9: best") for text in texts(tmp_path / "out" / "training.svg"))


def test_lines_differ_without_colour(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", head_epochs=1, epochs=2)
    _, svg = main([str(run), "--out", str(tmp_path)])["files"]
    dashes = {}
    for group in ElementTree.parse(svg).iter(f"{SVG}g"):
        path = group.find(f"{SVG}path")
        if path is not None and group.get("id", "").startswith("run loss"):
            dash = re.search("stroke-dasharray: ([^;]+)", path.attrib["style"])
            dashes[group.attrib["id"]] = dash and dash[1]
    assert len(dashes) == 3 and len(set(dashes.values())) == 3, dashes


def test_same_metrics_give_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", head_epochs=1, epochs=2)
    first, second = (main([str(run), "--out", str(tmp_path / name)])["files"] for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_run_without_step_lines_is_drawn_from_its_epochs(tmp_path: Path) -> None:
    curves = read_curves(write_run(tmp_path / "run", head_epochs=0, epochs=2, steps=False), "run")
    assert curves.training == [(10, 4.9, 0.01), (20, 4.8, 0.02)]
    assert curves.phase_two is None


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / parent / "lstm", head_epochs=0, epochs=1) for parent in "ab"]
    _, svg = main([*map(str, runs), "--out", str(tmp_path)])["files"]
    assert {f"{run}: best validation top-1 0.5%" for run in runs} <= set(texts(Path(svg)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"event": "step", "step": 7, "train_lo', "not a record of training"),
        (
            '{"event": "epoch", "step": 7, "train_loss": 1.0, "train_top1": 0.5}',
            "not a record of training .Object missing",
        ),
        ('{"event": "step", "step": 7, "train_loss": NaN, "train_top1": 0.5}', "not a record of training"),
        ('{"event": "step", "step": 7, "train_loss": "low", "train_top1": 0.5}', "not a record of training"),
        ("[1, 2]", "not a record of training"),
        ("", "not a record of training"),
    ],
)
def test_damaged_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    metrics = write_run(tmp_path / "run", head_epochs=0, epochs=1) / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + line + "\n")
    with pytest.raises(InputError, match=rf"run/metrics\.jsonl, line 5: {reason}"):
        main([str(tmp_path / "run"), "--out", str(tmp_path)])


def test_empty_missing_and_unwritable_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", head_epochs=0, epochs=1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/training\.png: cannot be written"):
        main([str(run), "--out", str(tmp_path / "file")])
    with pytest.raises(InputError, match=r"nowhere/metrics\.jsonl: no such file"):
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"metrics\.jsonl: nothing has been recorded yet"):
        main([str(run), "--out", str(tmp_path)])
