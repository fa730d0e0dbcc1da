"""What do checkpoints cost the training loop?  python -m benchmarks.saving  (about 2 minutes on two cores)

The same steps (LSTM network, full phase, 64 px, one resident batch) take turns: without a checkpoint, with one saved in
the background at their start, and with one that the loop waits for. Writes saving.json: the milliseconds that a save
adds, and their share of the time at the default of --checkpoint-every.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from benchmarks.harness import Laps, write_result
from benchmarks.phase import OneBatch, at_phase
from fastnet.config import Config, sample
from fastnet.data.default import default_set
from fastnet.distributed.ranks import single_process
from fastnet.input.streams import Batch
from fastnet.training.checkpoint import Writer
from fastnet.training.records import Recorder

STEPS, SECONDS = 8, 100


def main() -> None:
    config, data, runtime = sample("lstm"), default_set(None), single_process()
    size = config.image_size
    x = torch.randn(config.batch_size, 3, size, size, device=runtime.device)
    batch = Batch(
        x.to(runtime.image_dtype, memory_format=torch.channels_last),
        torch.arange(config.batch_size, device=runtime.device) % len(data.classes),
        np.arange(config.batch_size),
    )
    with contextlib.ExitStack() as stack:
        images = OneBatch(batch, steps_per_epoch=10**6)
        trainer = stack.enter_context(at_phase(config, "full", data, runtime, images))
        trainer.train_step()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
        trainer.recorder = stack.enter_context(Recorder(folder, main=True, step=0, kept=0))
        trainer.writer = stack.enter_context(Writer(folder / "last.pt", None))

        def steps(save: Callable[[], None]) -> harness.Candidate:
            def run(laps: Laps) -> None:
                save()
                laps("save")
                for _ in range(STEPS):
                    trainer.train_step()
                laps("steps")
                trainer.writer.finish()  # not measured: the next candidate starts with no save under way

            return run

        def waited_for() -> None:
            trainer.save()
            trainer.writer.finish()

        candidates = {
            "none": steps(lambda: None),
            "behind": steps(trainer.save),
            "waited_for": steps(waited_for),
        }
        taken = harness.alternate(candidates, runtime.device, seconds=SECONDS, least=5)
        size_mb = (folder / "last.pt").stat().st_size / 1e6
    total = {name: np.add(laps["save"], laps["steps"]) for name, laps in taken.items()}
    added = {name: float(np.median(total[name] - total["none"])) for name in ("behind", "waited_for")}
    seconds = Config().checkpoint_interval[1]
    values = {
        "command": "python -m benchmarks.saving",
        "checkpoint_mb": round(size_mb, 1),
        "rounds": len(total["none"]),
        "step_ms": round(float(np.median(taken["none"]["steps"])) / STEPS, 1),
        "loop_stands_still_ms": {name: round(float(np.median(taken[name]["save"])), 1) for name in added},
        "added_ms_per_save": {name: round(value, 1) for name, value in added.items()},
        "default_checkpoint_every_s": seconds,
        "share_at_the_default": {name: round(value / 1e3 / seconds, 6) for name, value in added.items()},
    }
    print(write_result("saving", values).read_text())
    if added["behind"] / 1e3 / seconds > 0.01:
        sys.exit("over one percent")


if __name__ == "__main__":
    main()
