"""Trains one network: phases, epochs, evaluation, records.

torchrun --nproc_per_node=8 fastnet/train.py
python -m fastnet.train sample --network lstm --run-dir runs/lstm
"""

from __future__ import annotations

import os
import sys

# As a script, Python puts fastnet/ first on the path; the package is found from the directory above.
if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path[0] = os.path.dirname(sys.path[0])

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastnet import profiling
from fastnet.cli import Parser, run_command
from fastnet.config import PRESETS, Config, add_flags, from_flags
from fastnet.data.default import default_set
from fastnet.data.prepared import PreparedSet
from fastnet.distributed import lock
from fastnet.distributed.lock import RunLock
from fastnet.distributed.ranks import Runtime, choose_precision, joined, threads_per_rank
from fastnet.distributed.stop import StopSignal
from fastnet.input.graph import InputSpec, resolve_decode
from fastnet.input.streams import EvalStream, TrainStream
from fastnet.network.network import Network, lstm_backend
from fastnet.network.weights import load_backbone
from fastnet.training import checkpoint, phases
from fastnet.training import records as record
from fastnet.training import trainer as engine
from fastnet.training.checkpoint import Schedule, Writer
from fastnet.training.records import Recorder
from fastnet.training.state import TrainState


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(prog="train.py", description="Trains one network and continues a stopped run.")
    parser.add_argument(
        "preset", nargs="?", choices=list(PRESETS), help="what is not given below; default: by the data"
    )
    parser.add_argument("--data", type=Path, metavar="SET", help="prepared set; default: as the README says")
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run directory; default: runs/NETWORK")
    add_flags(parser)
    flags = vars(parser.parse_args(argv))

    with joined(flags.get("timeout", Config.timeout)) as runtime:
        data = runtime.together(lambda: default_set(flags["data"]))
        preset = flags["preset"] or ("sample" if data.source["kind"] == "sample" else "paper")
        config = from_flags(PRESETS[preset](flags.get("network", "baseline")), flags)
        runtime.amp = choose_precision(config.precision, runtime.device)
        run = flags["run_dir"] or Path("runs") / config.network
        with lock.claimed(run, runtime) as claim:
            result = train(config, data, run, runtime, claim)
        if "top1" in result and runtime.is_main:
            print(
                f"{result['run']}: step {result['step']}, val top-1 {result['top1']:.4f}, top-5 {result['top5']:.4f}, "
                f"loss {result['loss']:.4f} on {result['count']} images"
            )
        return result


def train(
    config: Config, data: PreparedSet, run: Path, runtime: Runtime, claim: RunLock | None
) -> dict[str, Any]:
    """Trains `config` on `data` in the directory `run`, from its last checkpoint if it has one.

    `claim` is rank 0's hold on the directory. Returns the last evaluation (loss, top1, top5, count), how far the run
    is and its files. Collective over ranks.
    """
    torch.manual_seed(config.seed)
    network = Network(config, len(data.classes))
    saved = runtime.from_main(lambda: open_run(run, config, data))
    if saved:
        runtime.together(lambda: checkpoint.load_model(network, run / "last.pt", saved))
    else:
        runtime.together(
            lambda: load_backbone(network, config.depth, config.weights) if runtime.is_main else None
        )
    network.to(runtime.device)
    engine.share_state(network, runtime)

    position = TrainState(**saved["position"]) if saved else TrainState()
    if position.done or 0 < config.max_steps <= position.step:
        runtime.say(f"{run}: already done up to step {position.step}; give another --run-dir to train anew")
        return outcome(run, position)
    chosen = runtime.together(lambda: choices(config, runtime))
    torch.set_num_threads(chosen["threads"])
    train_stream, val_stream = runtime.together(lambda: open_streams(config, data, runtime, position, chosen))
    runtime.together(lambda: write_manifest(run, config, data, chosen, position) if runtime.is_main else None)
    runtime.say("uses: " + ", ".join(f"{key} {value}" for key, value in chosen.items()))
    if saved:
        runtime.say(f"{run}: continues after step {position.step}")
    recorder = runtime.together(
        lambda: Recorder(run, main=runtime.is_main, step=position.step, kept=position.metrics_bytes)
    )
    plan = phases.plan(config)
    facts = {"data_hash": data.hash, "classes": data.classes, "words": data.words}

    window = profiling.Window(config.profile_window, runtime.device, run / f"trace-rank{runtime.rank}.json")
    writer, schedule = Writer(run / "last.pt", claim), Schedule(config)
    with StopSignal(runtime) as vote, recorder, closing(train_stream), closing(val_stream), window, writer:

        def save(job: engine.Job, metrics_bytes: int, best: bool = False) -> None:
            """Keeps all that is needed to continue from here; refuses to after a loss that was not finite."""
            position.totals = engine.summed_totals(job)
            position.metrics_bytes = metrics_bytes
            engine.check_weights(job)
            content = {**engine.state(job), **facts}
            runtime.together(lambda: writer.save(content, best=best) if runtime.is_main else None)

        def after_step(job: engine.Job) -> bool:
            """Records and saves when it is time; True asks the epoch to end here."""
            window.at(position.step)
            recorder.step()
            if position.step % config.log_every == 0:
                runtime.together(partial(recorder.event, "step", **engine.interval(job)))
            stop, time_to_save = vote.after_step(runtime.is_main and schedule.after_time())
            if stop:
                return True
            if time_to_save or schedule.after_steps(position.step):
                save(job, recorder.size())
            return position.step == config.max_steps

        window.at(position.step)
        for index, phase in enumerate(plan[position.phase :], position.phase):
            job = engine.begin_phase(config, phase, network, train_stream, runtime, position)
            if position.phase_epoch == position.step_in_epoch == 0:
                runtime.together(partial(recorder.event, "phase", phase=phase.name, step=position.step))
            elif saved:
                engine.restore(job, saved)

            while position.phase == index:
                title = f"{phase.name} epoch {position.phase_epoch + 1}/{phase.epochs}"
                recorder.begin_epoch(title, position.step_in_epoch, train_stream.steps_per_epoch)
                ended_early = engine.train_epoch(job, after_step)
                if ended_early and position.step != config.max_steps:
                    save(job, recorder.size())
                    runtime.together(writer.finish)
                    vote.check_own(position.step)
                    runtime.say(f"stopped after step {position.step}, all saved; the same command continues")
                    return outcome(run, position)

                metrics_bytes = recorder.size()
                trained = engine.epoch_record(job)
                engine.share_state(network, runtime)
                scores = engine.evaluate(network, val_stream, runtime)
                runtime.together(partial(recorder.epoch, title, trained, scores))
                if position.step_in_epoch == train_stream.steps_per_epoch:
                    best = scores["top1"] > position.best_top1
                    phases.finish_epoch(plan, position, scores["top1"])
                    metrics_bytes = recorder.size()
                else:
                    # Part of an epoch is not a candidate: continued, the run must end as if it had not stopped here.
                    best = position.epoch == 0
                save(job, metrics_bytes, best)
                if position.step == config.max_steps:
                    runtime.together(writer.finish)
                    runtime.say(f"stopped after --max-steps {config.max_steps}, all saved")
                    return outcome(run, position)
        runtime.together(writer.finish)
    return outcome(run, position)


def open_run(run: Path, config: Config, data: PreparedSet) -> dict[str, Any] | None:
    """The run's last checkpoint, or None where there is none yet. Rank 0's work."""
    if not (run / "last.pt").exists():
        return None
    saved = checkpoint.load(run / "last.pt")
    checkpoint.check_same_run(run, saved, config, data.hash)
    return saved


def choices(config: Config, runtime: Runtime) -> dict[str, Any]:
    """What runs where, with everything that was "auto" resolved."""
    dtype = runtime.amp or torch.float32
    return {
        "device": runtime.device.type,
        "ranks": runtime.world_size,
        "precision": str(dtype).removeprefix("torch."),
        "decode": resolve_decode(config.decode, runtime.device),
        "threads": config.threads or threads_per_rank(),
        "lstm backend": lstm_backend(config, runtime.device, dtype),
    }


def open_streams(
    config: Config, data: PreparedSet, runtime: Runtime, position: TrainState, chosen: dict[str, Any]
) -> tuple[TrainStream, EvalStream]:
    """The training stream from where the run is, and the validation stream."""
    spec = InputSpec(
        image_size=config.image_size,
        device=runtime.device,
        dtype=runtime.image_dtype,
        decode=chosen["decode"],
        threads=chosen["threads"],
        eval_crop=config.eval_crop,
    )
    train, val = data.splits["train"], data.splits["val"]
    stream = TrainStream(
        train,
        spec,
        config.augment,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        epoch=position.epoch,
        step=position.step_in_epoch,
    )
    share = max(1, config.batch_size // runtime.world_size // config.accumulate)
    return stream, EvalStream(val, spec, batch_size=share, rank=runtime.rank, world_size=runtime.world_size)


def write_manifest(
    run: Path, config: Config, data: PreparedSet, chosen: dict[str, Any], position: TrainState
) -> None:
    """The run's facts, and one entry for each time it was started."""
    facts = {
        "config": config.to_json(),
        "data": {"name": data.name, "hash": data.hash, "source": data.source, "path": str(data.path)},
    }
    record.write_manifest(run, facts, {"from_step": position.step, **chosen})


def outcome(run: Path, position: TrainState) -> dict[str, Any]:
    """The command's result: the last evaluation, if there was one, and where things are."""
    files = [str(path) for path in sorted(run.glob("[!.]*"))]
    return {
        **record.last_scores(run),
        "done": position.done,
        "step": position.step,
        "run": str(run),
        "files": files,
    }


def cli() -> NoReturn:
    run_command(main)


if __name__ == "__main__":
    cli()
