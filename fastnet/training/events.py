"""The lines of metrics.jsonl, and how they are read back. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from fastnet.errors import InputError


class PhaseEvent(msgspec.Struct, tag_field="event", tag="phase"):
    """A phase begins after `step` steps."""

    phase: str
    step: int


class StepEvent(msgspec.Struct, tag_field="event", tag="step"):
    """Means over the steps since the last record."""

    step: int
    train_loss: float
    train_top1: float


class EpochEvent(msgspec.Struct, tag_field="event", tag="epoch"):
    """An epoch's means over training and its validation; losses in nats, the others as fractions.

    What the training run measured of itself is None where a record lacks it, as that of an epoch that was continued
    after its last step: step times in milliseconds, the share of the time spent waiting for data, memory in MiB, and
    the sum of the step times in seconds.
    """

    phase: str
    epoch: int
    step: int
    train_loss: float
    train_top1: float
    val_loss: float
    val_top1: float
    val_top5: float
    val_count: int
    images_per_s: float | None = None
    step_ms_p50: float | None = None
    step_ms_p95: float | None = None
    data_wait: float | None = None
    peak_mem_mb: float | None = None
    seconds: float | None = None


class FinalEvent(msgspec.Struct, tag_field="event", tag="final"):
    """The one look at the val split of a run with --holdout, with the weights of best.pt."""

    step: int
    val_loss: float
    val_top1: float
    val_top5: float
    val_count: int


Event = PhaseEvent | StepEvent | EpochEvent | FinalEvent


def read_events(path: Path, length: int | None = None) -> list[Event]:
    """The lines of a metrics.jsonl, or of its first `length` bytes. A last line that is cut off is passed over: it is
    being written, or a full disk or a crash cut it off, and the run that continues does the same.

    Raises InputError naming the file, and the line that is damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the directory of a run that has begun")
    try:
        with path.open("rb") as file:
            content = file.read(-1 if length is None else length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    decoder = msgspec.json.Decoder(Event)
    events: list[Event] = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            events.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            if not line.endswith(b"\n") and length is None:
                break
            reason = str(error).partition(" - at")[0]
            raise InputError(
                f"{path}, line {number}: not a record of training ({reason}); restore the file from a copy"
            ) from error
    return events
