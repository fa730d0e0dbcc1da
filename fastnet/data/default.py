"""The set that a command uses: the one it is given, or the one that is there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastnet.errors import printable

if TYPE_CHECKING:
    from fastnet.data.prepared import PreparedSet

OFFICIAL = Path("data/tiny-imagenet")


def default_set(choice: Path | None, why: str = "--data") -> PreparedSet:
    """Opens the set to use, and says on stderr which it is and why.

    It is `choice`, else $FASTNET_DATA, else data/tiny-imagenet if it exists, else data/sample, the generated sample
    set, which is made on first use; if many processes ask at once, one makes it. `why` says where `choice` is from.
    Raises InputError as `open_set` does.
    """
    # Not at the top: the doctor has to run where Arrow or DALI cannot be imported.
    from fastnet.data.prepared import open_set

    environment = os.environ.get("FASTNET_DATA")
    sample = Path("data/sample")
    if choice is not None:
        path = choice
    elif environment:
        path, why = Path(environment), "$FASTNET_DATA"
    elif OFFICIAL.exists():
        path, why = OFFICIAL, "the default, since it exists"
    else:
        from fastnet.data.preparing import prepare_sample

        path, why = sample, f"the generated sample set, since there is no --data, $FASTNET_DATA or {OFFICIAL}"
        if not path.exists():
            prepare_sample(path)
    chosen = open_set(path)
    if os.environ.get("RANK", "0") == "0":
        counts = ", ".join(f"{len(split)} {name}" for name, split in chosen.splits.items())
        line = f"data: {path} ({why}): {len(chosen.classes)} classes, {counts}"
        print(printable(line), file=sys.stderr, flush=True)
    return chosen
