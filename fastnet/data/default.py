from __future__ import annotations

import os
import sys
from pathlib import Path

from fastnet.data.prepared import PreparedSet, open_set


def default_set(choice: Path | None, why: str = "--data") -> PreparedSet:
    """Opens the set to use and says which and why in one line: `choice` (--data), else $FASTNET_DATA, else
    data/tiny-imagenet, else data/sample, which is made on first use (by one process if many ask at once).
    """
    environment = os.environ.get("FASTNET_DATA")
    official, sample = Path("data/tiny-imagenet"), Path("data/sample")
    if choice is not None:
        path = choice
    elif environment:
        path, why = Path(environment), "$FASTNET_DATA"
    elif official.exists():
        path, why = official, "the default, as it is there"
    else:
        from fastnet.data.preparing import prepare_sample

        path, why = sample, f"the embedded sample, as there is no --data, $FASTNET_DATA or {official}"
        if not path.exists():
            prepare_sample(path)
    chosen = open_set(path)
    if os.environ.get("RANK", "0") == "0":
        counts = ", ".join(f"{len(split)} {name}" for name, split in chosen.splits.items())
        print(f"data: {path} ({why}): {len(chosen.classes)} classes, {counts}", file=sys.stderr, flush=True)
    return chosen
