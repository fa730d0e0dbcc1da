"""The results that the paper gives, "Exploring Methods on Tiny ImageNet Problem"."""

from __future__ import annotations

# Error (1 - top-1) on the test split, and on the validation split where the paper gives it.
PAPER: dict[str, tuple[float, float | None]] = {
    "baseline": (0.338, None),
    "lstm": (0.386, 0.3341),
    "average": (0.329, None),
}
