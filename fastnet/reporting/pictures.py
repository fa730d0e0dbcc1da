"""The pictures of a report, as markup that refers to nothing outside of it: charts as SVG, images as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from fastnet.errors import InputError
from fastnet.reporting.curves import QUANTITIES, STYLES, Curves, draw_curves, frame
from fastnet.training.events import EpochEvent

MUTED, ACCENT = "#737373", "#0000ff"
# What is drawn in these colours follows the page's scheme, by the names in page.css.
COLOURS = {"#000000": "var(--ink)", MUTED: "var(--muted)", "#e6e6e6": "var(--line)", ACCENT: "var(--accent)"}
DRAWING: Any = {"font.size": 9.5, "axes.edgecolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED}
ON_SCREEN = {
    "training": {**STYLES["training"], "linewidth": 1.1},
    "validation": {**STYLES["validation"], "color": ACCENT, "linewidth": 1.6},
}
# Clear on white and on black, and told apart without red or green.
RIGHT, WRONG = (37, 110, 204), (222, 90, 36)
THUMBNAIL = 96  # pixels of the longer side


def curve_charts(curves: Curves, tops: tuple[float, float]) -> dict[str, Markup]:
    """Charts of loss and top-1 by name; `tops` are the largest values on their axes."""

    def draw(axis: Axes, quantity: str, top: float) -> None:
        draw_curves(axis, curves, quantity, ON_SCREEN)
        _scale(axis, "optimiser steps", top)
        axis.set_xlim(left=0)
        if quantity == "top-1":
            axis.yaxis.set_major_formatter(PercentFormatter(xmax=1))

    return {
        quantity: _chart(partial(draw, quantity=quantity, top=top), f"{curves.name!a} {quantity}")
        for quantity, top in zip(QUANTITIES, tops, strict=True)
    }


def speed_charts(epochs: Sequence[EpochEvent], name: str) -> dict[str, Markup]:
    """Charts of images/s and of step times over the epochs, by name. Epochs count from 1."""
    x = [event.epoch + 1 for event in epochs]

    def measured(key: str) -> list[float]:
        return [np.nan if (value := getattr(event, key)) is None else value for event in epochs]

    def images(axis: Axes) -> None:
        axis.plot(x, measured("images_per_s"), color=ACCENT, marker="o", markersize=3.5)
        frame(axis)
        _scale(axis, "epoch", None)

    def times(axis: Axes) -> None:
        for key, colour, line in (("step_ms_p95", MUTED, "--"), ("step_ms_p50", ACCENT, "-")):
            axis.plot(x, measured(key), color=colour, linestyle=line, marker="o", markersize=3.5)
        frame(axis)
        _scale(axis, "epoch", None)

    return {"images": _chart(images, f"{name!a} images"), "times": _chart(times, f"{name!a} times")}


def _scale(axis: Axes, label: str, top: float | None) -> None:
    axis.set_xlabel(label, color=MUTED)
    axis.set_ylim(0, 1.08 * axis.get_ylim()[1] if top is None else top)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def _chart(draw: Callable[[Axes], None], salt: str) -> Markup:
    """An SVG element in the page's colours. `salt` keeps its ids apart from those of the page's other charts."""
    with rc_context({**DRAWING, "svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    view = re.search(r'viewBox="[\d. ]+"', svg)
    assert view is not None
    content = svg[svg.index(">", view.end()) + 1 :]
    content = re.sub(r"<style.*?</style>", "", content, flags=re.DOTALL)
    content = re.sub(r'<g id="[^"]*"', "<g", content)
    for drawn, variable in COLOURS.items():
        content = content.replace(drawn, variable)
    return Markup(f'<svg {view[0]} aria-hidden="true">{content}')


def confusion_png(matrix: np.ndarray) -> str:
    """A data URI of [K, K] pixels, blue for hits and orange for mistakes.

    A pixel is as opaque as the square root of its share of the row's images: most mistakes are rare.
    """
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))  # [K, K]
    diagonal = np.eye(len(matrix), dtype=bool)
    pixels = np.empty((*matrix.shape, 4), np.uint8)  # RGBA
    pixels[..., :3] = np.where(diagonal[..., None], RIGHT, WRONG)
    pixels[..., 3] = np.rint(255 * np.sqrt(shares))
    return _data_uri(Image.fromarray(pixels), "png")


def thumbnail(encoded: bytes, name: str) -> str:
    """A data URI of a JPEG or PNG image, at most `THUMBNAIL` pixels wide and high.

    Raises InputError with the image's name if it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG")) as image:
            image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            small = image.convert("RGB")
    except Exception as error:  # PIL's decoders raise all kinds of errors on bad data
        raise InputError(f"{name}: cannot be decoded ({error}); prepare the set again") from error
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return _data_uri(small, "jpeg", quality=88)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
