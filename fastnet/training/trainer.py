"""The training of one network, from its first step or its last checkpoint to its end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastnet.config import Config
from fastnet.data.prepared import PreparedSet
from fastnet.distributed.lock import RunLock
from fastnet.distributed.memory import keep_freed_memory
from fastnet.distributed.ranks import Runtime
from fastnet.distributed.stop import StopSignal
from fastnet.errors import InputError
from fastnet.metrics import Counter, Totals
from fastnet.network.network import Network
from fastnet.network.weights import load_backbone
from fastnet.profiling import Window
from fastnet.progress import Progress, track
from fastnet.training import checkpoint
from fastnet.training.accumulation import choose_parts
from fastnet.training.capture import own_stream
from fastnet.training.evaluated import Evaluated
from fastnet.training.evaluation import check_weights, evaluate_saved, validate
from fastnet.training.inputs import Inputs
from fastnet.training.kernels import prepare_kernels
from fastnet.training.meter import Stopwatch
from fastnet.training.parallel import share_weights
from fastnet.training.phases import averaged_before, finish_epoch, image_size, learning_rate, plan
from fastnet.training.placement import place, splits_read
from fastnet.training.records import (
    Recorder,
    add_to_session,
    as_record,
    close_session,
    is_recorded,
    outcome,
    write_manifest,
)
from fastnet.training.running import RunningPhase
from fastnet.training.setup import check_sizes, choices
from fastnet.training.state import TrainState


class Trainer:
    """Trains `config.network` on `data` in the directory `run_dir`; `fit` tells the story.

    Every method is collective: all ranks call it. `lock` is rank 0's hold on the directory.
    """

    def __init__(
        self, config: Config, data: PreparedSet, run_dir: Path, runtime: Runtime, lock: RunLock | None = None
    ) -> None:
        self.config, self.data, self.run_dir, self.runtime, self.lock = config, data, run_dir, runtime, lock
        with runtime.agree():
            check_sizes(config, runtime)
        torch.manual_seed(config.seed)
        self.network = Network(config, len(data.classes))
        self.phases = plan(config)
        self.state = TrainState()
        self.saved: checkpoint.Checkpoint | None = None
        self.running: RunningPhase | None = None
        self.counter = Counter(runtime.device)
        self.stopwatch = Stopwatch(runtime.device)
        self.stop_signal = StopSignal(runtime)

    # --- the story

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the last phase, to --max-steps, or to a signal, and returns what came of it."""
        self.resume()
        if self.nothing_left():
            with self.runtime.agree():
                if self.runtime.is_main:
                    close_session(self.run_dir, self.state)
            self.say(f"already done up to step {self.state.step}; give another --run-dir to train anew")
            return self.outcome()
        with self.resources():
            while not self.state.done:
                if not self.begin_phase() or not self.train_epoch():
                    return self.stop()
                trained = self.epoch_record()
                self.average_epochs()
                scores = self.evaluate()
                self.end_epoch(trained, scores)
                if self.state.step == self.config.max_steps:
                    break
            self.finish()
            if not self.state.done:
                self.runtime.say(f"stopped after --max-steps {self.config.max_steps}, all saved")
        return self.outcome()

    def resume(self) -> None:
        """Takes up the run's last checkpoint, or the weights that --weights names where there is none."""
        saved = None
        with self.runtime.agree():
            if self.runtime.is_main:
                saved = checkpoint.load_last(self.run_dir, self.config, self.data)
        self.saved = self.runtime.from_main(saved)
        if self.saved and not (self.run_dir / "last.pt").exists():
            self.say("there is no last.pt; best.pt is taken")
        with self.runtime.agree():
            if self.saved:
                checkpoint.load_model(self.network, self.run_dir / "last.pt", self.saved.model)
                self.state = self.saved.position
            elif self.runtime.is_main:
                given = self.config
                note = load_backbone(self.network, given.depth, given.weights, partial=given.weights_partial)
                if note:
                    self.say(note)
        self.network.to(self.runtime.device)
        share_weights(self.network, self.runtime)
        self.evaluated = Evaluated(self.network, self.config)
        if self.saved and self.saved.average:
            average = self.evaluated.started().network
            checkpoint.load_model(average, self.run_dir / "last.pt", self.saved.average)

    def nothing_left(self) -> bool:
        """Whether the last checkpoint is where the run ends, or --max-steps, with the look at val behind it."""
        if not self.state.done:
            return 0 < self.config.max_steps <= self.state.step
        looked = True
        with self.runtime.agree():
            if self.config.holdout and self.runtime.is_main:
                looked = is_recorded(self.run_dir, self.state.metrics_bytes)
        return self.runtime.from_main(looked)

    def begin_phase(self) -> bool:
        """Freezes what the phase freezes and readies its training step, unless there is one for the phase and for the
        size that its images have now. Returns False if a stop was asked for meanwhile."""
        self.phase = self.phases[self.state.phase]
        config = replace(self.config, image_size=image_size(self.phase, self.state.phase_epoch))
        begun = None
        if self.running:
            if (self.running.phase, self.running.config) == (self.phase, config):
                return True
            if self.state.in_phase:
                begun = self.running.updates()
        elif self.saved and self.state.in_phase:
            begun = self.saved.updates
            if self.runtime.is_main:
                # The totals are sums over the ranks, so one of them carries what was there.
                self.counter.sums += torch.tensor(Totals(*self.state.totals), device=self.runtime.device)
        self.close_phase()
        share_weights(self.network, self.runtime)  # each rank has batch norm statistics of its own until here
        self.evaluated.freeze(self.phase.frozen)
        self.network.train()
        if not self.inputs.keep_features(self.phase, self.network, self.state, self.stop_signal):
            return False
        batches, self.val_stream = self.inputs.open(self.phase, self.state)
        self.running = RunningPhase(
            self.phase,
            config,
            self.runtime,
            self.network,
            average=self.evaluated.moving,
            batches=batches,
            counter=self.counter,
            begun=begun,
            path=self.run_dir / "last.pt",
        )
        in_last_epoch = self.state.phase_epoch + 1 == self.phase.epochs
        # After the phase's last step, which is still to be validated, there may be no images to rehearse with.
        trained = in_last_epoch and self.state.step_in_epoch == self.inputs.steps_per_epoch
        if self.graphs != "off" and not trained:
            # A save's pinned memory, freed while a graph is captured, would be marked with an event of the capture.
            self.finish_save()
            outcome = self.running.capture()
            self.runtime.say(f"{self.phase.name}: CUDA graph {outcome}")
            self.note(**{f"cuda_graph_{self.phase.name}": outcome})
        return True

    def close_phase(self) -> None:
        if self.running:
            self.running.close()
        self.running = None

    def train_epoch(self) -> bool:
        """Trains to the end of the epoch under way, or to --max-steps. Returns False after a signal to stop."""
        if self.state.phase_epoch == self.state.step_in_epoch == 0:
            self.record("phase", phase=self.phase.name, step=self.state.step)
        if self.state.step_in_epoch == 0:
            self.counter.reset()
            self.state.logged = list(Totals())
        self.stopwatch.restart()
        steps = self.inputs.steps_per_epoch
        with Progress(self.title, steps, "steps", done=self.state.step_in_epoch) as progress:
            while self.state.step_in_epoch < steps:
                self.train_step()
                progress.add()
                if self.window.moves_at(self.state.step):
                    with self.runtime.agree():
                        self.window.at(self.state.step)
                if self.state.step % self.config.log_every == 0:
                    self.record("step", **self.interval_record())
                at_end = self.state.step == self.config.max_steps
                stop, due = self.stop_signal.after_step(self.runtime.is_main and self.schedule.after_time())
                if stop or at_end:
                    return at_end
                if due or self.schedule.after_steps(self.state.step):
                    self.save()
                    self.stopwatch.resume()
        return True

    def train_step(self) -> None:
        """One optimiser step on the next global batch."""
        assert self.running
        self.running.step(self.state.step, self.rate(self.state.step_in_epoch))
        self.stopwatch.step()
        self.state.step_in_epoch += 1
        self.state.step += 1

    def average_epochs(self) -> None:
        """At the end of each of the --average-last epochs: takes the weights into their average."""
        before = averaged_before(self.phases, self.state, self.config.average_last)
        if before >= 0 and self.state.step_in_epoch == self.inputs.steps_per_epoch:
            images = self.inputs.once_more(self.phase, self.state.epoch, f"{self.title}: batch norms")
            self.evaluated.add_epoch(before, images, self.runtime)

    def evaluate(self) -> Totals:
        """Loss, top-1 and top-5 over the validation split, each image counted once, with rank 0's weights, or with
        their average where there is one."""
        batches = track(f"{self.title}: validation", self.val_stream, len(self.val_stream), "batches")
        return validate(self.evaluated.network, batches, self.runtime, self.phase)

    def look_at_val(self) -> None:
        """The val split, which a run with --holdout has not seen, with the weights that were best on the holdout."""
        best = self.run_dir / "best.pt"
        with self.runtime.agree():
            opened = self.inputs.open_val(self.data.splits["val"])
        with closing(opened) as stream:
            batches = track("val", stream, len(stream), "batches")
            val = evaluate_saved(self.evaluated.network, best, batches, self.runtime, self.phases[-1])
        self.record("final", step=self.state.step, **as_record(val))

    def end_epoch(self, trained: dict[str, Any], scores: Totals) -> None:
        """Records the epoch, moves to the next one or the next phase, and saves."""
        with self.runtime.agree():
            before = self.recorder.size()
            self.recorder.epoch(self.title, trained, scores, "holdout" if self.config.holdout else "val")
            after = self.recorder.size()
        metrics_bytes = before
        if self.state.step_in_epoch == self.inputs.steps_per_epoch:
            best = scores.top1 > self.state.best_top1
            finish_epoch(self.phases, self.state, scores.top1)
            metrics_bytes = after
        else:
            # A part of an epoch is no candidate for best.pt, and its record is cut off when the run continues: that
            # must end like a run that was never stopped.
            best = self.state.epoch == 0
        self.save(best=best, metrics_bytes=metrics_bytes)

    def save(self, *, best: bool = False, metrics_bytes: int | None = None) -> None:
        """Saves all that is needed to continue from here. Raises InputError after a loss that was not finite."""
        self.state.totals = list(self.summed_totals())
        with self.runtime.agree():
            self.state.metrics_bytes = self.recorder.size() if metrics_bytes is None else metrics_bytes
        check_weights(self.network, self.state.step, self.phase)
        assert self.running
        optimizer, scaler = self.running.updates()
        average = self.evaluated.average
        content = {
            "config": self.config.to_json(),
            "model": self.network.state_dict(),
            "optimizer": optimizer if self.state.in_phase else None,
            "scaler": scaler,
            "position": asdict(self.state),
            "data_hash": self.data.hash,
            "classes": self.data.classes,
            "words": self.data.words,
            "average": average.network.state_dict() if average else None,
        }
        with self.runtime.agree():
            if self.runtime.is_main:
                self.writer.save(content, best=best)

    def stop(self) -> dict[str, Any]:
        """Ends the session after a signal, with everything saved."""
        if self.running:  # else no step was made since the last checkpoint
            self.save()
        self.finish()
        result = self.outcome()
        # The last of what the ranks do together: those of a host that was not asked to stop end with an error.
        self.stop_signal.check_own(self.state.step)
        self.runtime.say(f"stopped after step {self.state.step}, all saved; the same command continues")
        return result

    # --- what it is made of

    @contextlib.contextmanager
    def resources(self) -> Iterator[None]:
        """Opens streams, records, profiler window and checkpoint writer, catches signals, and closes all of it."""
        config, runtime, run_dir = self.config, self.runtime, self.run_dir
        with runtime.agree():
            chosen = choices(config, runtime)
            splits = splits_read(self.data, config.holdout)
        chosen |= place(config, splits, runtime)
        torch.set_num_threads(chosen["threads"])
        if runtime.device.type == "cpu":
            keep_freed_memory()
        self.graphs = chosen["cuda_graph"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(own_stream(runtime.device))
            chosen |= choose_parts(
                config, self.saved, self.data, self.network, self.evaluated.moving, runtime, chosen
            )
            config = self.config = replace(config, accumulate=chosen["accumulate"])
            stack.callback(self.close_phase)
            with runtime.agree():
                check_sizes(config, runtime)
                self.inputs = Inputs(config, self.data, runtime, chosen, self.stopwatch.waited)
                stack.callback(self.inputs.close)
                if not self.state.done and not self.inputs.caches(self.phases[self.state.phase]):
                    self.inputs.open_images(self.phases[self.state.phase], self.state)
            self.inputs.check_room(self.phases, self.network, self.state)
            with runtime.agree():
                if runtime.is_main:
                    write_manifest(run_dir, config, self.data, {"from_step": self.state.step, **chosen})
            runtime.say("uses: " + ", ".join(f"{key} {value}" for key, value in chosen.items()))
            backend, inputs = chosen["lstm_backend"], self.inputs
            prepare_kernels(config, runtime, backend, inputs.images, inputs.batch_sizes)
            if self.saved:
                self.say(f"continues after step {self.state.step}")
            with runtime.agree():
                recorder = Recorder(
                    run_dir, main=runtime.is_main, step=self.state.step, kept=self.state.metrics_bytes
                )
            trace = run_dir / f"trace-rank{runtime.rank}.json"
            self.schedule = checkpoint.Schedule(config)
            stack.enter_context(self.stop_signal)
            self.recorder = stack.enter_context(recorder)
            self.window = stack.enter_context(Window(config.profile_window, runtime.device, trace))
            self.writer = stack.enter_context(checkpoint.Writer(run_dir / "last.pt", self.lock))
            self.window.at(self.state.step)
            yield

    # --- what it says of itself

    @property
    def title(self) -> str:
        return f"{self.phase.name} epoch {self.state.phase_epoch + 1}/{self.phase.epochs}"

    def interval_record(self) -> dict[str, Any]:
        """Means over the steps since the last record of this epoch."""
        totals = self.summed_totals()
        since = totals.since(Totals(*self.state.logged))
        self.state.logged = list(totals)
        return self.training_record(since)

    def epoch_record(self) -> dict[str, Any]:
        """What an epoch's line of metrics.jsonl says of training."""
        totals = self.summed_totals()
        speed = self.stopwatch.summary(self.config.batch_size)
        size = image_size(self.phase, self.state.phase_epoch)
        return {**self.training_record(totals), "train_count": totals.images, "image_size": size, **speed}

    def training_record(self, totals: Totals) -> dict[str, Any]:
        where = {"phase": self.phase.name, "epoch": self.state.epoch, "step": self.state.step}
        rate = self.rate(self.state.step_in_epoch - 1)
        return {**where, "train_loss": totals.mean_loss, "train_top1": totals.top1, "lr": rate}

    def rate(self, step_in_epoch: int) -> float:
        """The learning rate of a step of the epoch under way."""
        steps = self.inputs.steps_per_epoch
        return learning_rate(
            self.phase, self.state.phase_epoch * steps + step_in_epoch, steps, self.config.warmup
        )

    def summed_totals(self) -> Totals:
        """The epoch's totals over all ranks; waits for the device. Raises InputError if a loss was not finite."""
        totals = Totals(*self.runtime.sum_(self.counter.sums.clone()).tolist())
        if totals.not_finite:
            raise InputError(
                f"the loss is not finite, or huge, by step {self.state.step}; nothing of it was saved; "
                f"{self.phase.calmer}"
            )
        return totals

    def record(self, event: str, **values: Any) -> None:
        with self.runtime.agree():
            self.recorder.event(event, **values)

    def finish(self) -> None:
        """Waits for the last save, looks at val where that is still to be done, notes in the manifest how the session
        ended, and closes the records."""
        self.finish_save()
        if self.state.done and self.config.holdout:
            self.look_at_val()
        self.note(to_step=self.state.step, done=self.state.done)
        with self.runtime.agree():  # what fails on one rank is to end all of them alike
            self.window.close()
            self.recorder.close()

    def finish_save(self) -> None:
        with self.runtime.agree():
            self.writer.finish()

    def note(self, **facts: Any) -> None:
        """Adds to what the manifest says of this session."""
        with self.runtime.agree():
            if self.runtime.is_main:
                add_to_session(self.run_dir, **facts)

    def outcome(self) -> dict[str, Any]:
        """The command's result, as rank 0 finds it in the run directory."""
        result: dict[str, Any] = {}
        with self.runtime.agree():
            if self.runtime.is_main:
                result = outcome(self.run_dir, self.state)
        return self.runtime.from_main(result)

    def say(self, line: str) -> None:
        self.runtime.say(f"{self.run_dir}: {line}")
