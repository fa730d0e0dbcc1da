"""docs/architecture.svg shows the boxes, modules and imports that the code has."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import pytest

from docs.architecture import FIGURE, draw, needed, rooms, save


def shown(svg: bytes) -> set[str]:
    """The boxes and arrows of a figure, and all words in it."""
    tree = ElementTree.fromstring(svg)
    named = {element.get("id", "") for element in tree.iter()}
    words = {
        word
        for element in tree.iter()
        if element.tag.endswith("text")
        for word in (element.text or "").split()
    }
    return {name for name in named if " " in name} | words


def test_the_figure_is_that_of_the_code() -> None:
    now = io.BytesIO()
    save(draw(*rooms()), now)
    differences = shown(FIGURE.read_bytes()) ^ shown(now.getvalue())
    assert not differences, "draw it again: python -m docs.architecture"


def test_an_import_upwards_is_refused() -> None:
    with pytest.raises(ValueError, match="data imports training"):
        draw({}, {"data": {"training"}})


def test_arrows_that_a_chain_stands_for_are_left_out() -> None:
    assert needed({"a": {"b", "c", "d"}, "b": {"c"}, "c": set()}) == {"a": {"b", "d"}, "b": {"c"}, "c": set()}


def test_a_new_package_needs_a_place() -> None:
    with pytest.raises(ValueError, match="attic: no place"):
        draw({"data": [], "attic": ["trunk"]}, {})
