"""Draws docs/architecture.svg from the imports in the code: python -m docs.architecture

A box is a package of fastnet, the commands, or the modules that all of them share; an arrow is an import.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

import grimp
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from fastnet.__main__ import COMMANDS

Arrows = dict[str, set[str]]

FIGURE = Path(__file__).with_suffix(".svg")
SHARED = "shared"
# Left and right edge of each box, and its row from the bottom. An arrow that does not point downwards is an error.
PLACES = {
    "commands": (1.0, 6.8, 5),
    "api": (7.2, 9.0, 5),
    "reporting": (1.0, 3.1, 4),
    "exporting": (3.5, 5.6, 4),
    "inference": (6.0, 9.0, 4),
    "training": (1.0, 9.0, 3),
    "input": (0.0, 3.2, 2),
    "network": (3.6, 6.4, 2),
    "distributed": (6.8, 10.0, 2),
    "data": (0.0, 2.2, 1),
    "fastnet_kernels": (2.6, 6.4, 1),
    SHARED: (0.0, 10.0, 0),
}
CHARACTERS = 13  # that fit into one unit of a box's width
HEADING, LINE = 0.3, 0.15  # heights, where rows are 1 apart


def rooms() -> tuple[dict[str, list[str]], Arrows]:
    """The modules of each box, and the boxes that each of them imports.

    Modules beside the packages that others import, such as `config`, are shared; arrows to those are left out.
    """
    graph = grimp.build_graph(
        "fastnet", "fastnet_kernels", cache_dir=None, exclude_type_checking_imports=True
    )
    packages = {
        module.split(".")[1] for module in graph.find_children("fastnet") if graph.find_children(module)
    }
    used = {
        imported for module in graph.modules for imported in graph.find_modules_directly_imported_by(module)
    }

    def room(module: str) -> str:
        name = module.removeprefix("fastnet.").split(".")[0]
        if name == "diagnosis":  # serves a single command
            return "commands"
        if name in {*packages, "fastnet_kernels"}:
            return name
        if name in COMMANDS or name == "__main__":
            return "commands"
        return SHARED if module in used else name

    modules: dict[str, list[str]] = defaultdict(list)
    arrows: Arrows = defaultdict(set)
    for module in sorted(graph.modules - {"fastnet"}):
        own = room(module)
        inside = own == "commands" and module.count(".") > 1
        if module not in (f"fastnet.{own}", own) and not inside:
            modules[own].append(module.rpartition(".")[2])
        for imported in graph.find_modules_directly_imported_by(module) - {"fastnet"}:
            if room(imported) not in (own, SHARED):
                arrows[own].add(room(imported))
    return dict(modules), dict(arrows)


def needed(arrows: Arrows) -> Arrows:
    """The arrows that no chain of others stands for."""

    def leads(start: str, end: str) -> bool:
        return start == end or any(leads(box, end) for box in arrows.get(start, ()))

    return {
        start: {end for end in ends if not any(leads(box, end) for box in ends - {end})}
        for start, ends in arrows.items()
    }


def draw(modules: dict[str, list[str]], arrows: Arrows) -> Figure:
    """The boxes from the top down. Raises ValueError for a box without a place, and for an import upwards."""
    if homeless := (modules.keys() | arrows.keys()) - PLACES.keys():
        raise ValueError(f"{', '.join(sorted(homeless))}: no place in PLACES; give it one")
    for start, ends in arrows.items():
        for end in ends:
            if PLACES[start][2] <= PLACES[end][2]:
                raise ValueError(f"{start} imports {end}, which is not below it")
    figure = Figure(figsize=(8.4, 6.0))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-0.1, 10.1), ylim=(-0.5, 5.5))
    axes.axis("off")
    lines = {
        box: textwrap.wrap(" ".join(modules.get(box, [])), int(CHARACTERS * (right - left)))
        for box, (left, right, _) in PLACES.items()
    }
    half = {box: (HEADING + LINE * len(text)) / 2 for box, text in lines.items()}
    for start, ends in sorted(needed(arrows).items()):
        for end in sorted(ends):
            above, below = PLACES[start], PLACES[end]
            middle = (max(above[0], below[0]) + min(above[1], below[1])) / 2  # of what lies above each other
            axes.add_patch(
                FancyArrowPatch(
                    (middle, above[2] - half[start]),
                    (middle, below[2] + half[end]),
                    arrowstyle="-|>",
                    mutation_scale=12,
                    color="0.1",
                    shrinkA=0,
                    shrinkB=0,
                    gid=f"{start} imports {end}",
                )
            )
    for box, (left, right, row) in PLACES.items():
        axes.add_patch(
            FancyBboxPatch(
                (left, row - half[box]),
                right - left,
                2 * half[box],
                boxstyle="round,pad=0,rounding_size=0.06",
                facecolor="0.96",
                edgecolor="0.1",
            )
        )
        middle, y = (left + right) / 2, row + half[box] - 0.17
        axes.text(middle, y, box, ha="center", va="center", fontsize=10, weight="bold", gid=f"box {box}")
        for n, line in enumerate(lines[box], start=1):
            axes.text(middle, y - 0.04 - n * LINE, line, ha="center", va="center", fontsize=7.5)
    return figure


def save(figure: Figure, to: Path | BinaryIO) -> None:
    """Writes an SVG; the same imports give the same bytes."""
    with rc_context({"svg.hashsalt": "fastnet", "svg.fonttype": "none"}):
        figure.savefig(to, format="svg", metadata={"Date": None})


def main() -> None:
    save(draw(*rooms()), FIGURE)
    print(FIGURE)


if __name__ == "__main__":
    main()
