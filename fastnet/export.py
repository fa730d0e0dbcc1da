"""A run's network for inference elsewhere: a torch.export program, ONNX, or safetensors weights, with a model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastnet.cli import Parser, directory, run_command
from fastnet.data.prepared import Split
from fastnet.distributed.device import threads_per_rank
from fastnet.distributed.ranks import single_process
from fastnet.errors import InputError, unreadable
from fastnet.exporting.card import card, facts_of, scores_at
from fastnet.exporting.check import difference
from fastnet.exporting.formats import FORMATS, Format
from fastnet.exporting.plain import plain_network, plain_state
from fastnet.files import PARTIAL, STALE, atomic_write, remove_leftovers
from fastnet.inference.flags import add_run_flags, open_data
from fastnet.inference.runs import TrainedRun, load_runs
from fastnet.inference.scores import labelled_split
from fastnet.input.spec import InputSpec
from fastnet.input.streams import EvalStream
from fastnet.network.stored import load_extra

CARD = "README.md"
CHECKED = 16  # images of the validation split


def check_out(out: Path, form: Format) -> None:
    """Raises InputError if `out` holds anything but an earlier export of this format, which is replaced."""
    try:
        there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise unreadable(error, out) from error
    there = [name for name in there if not name.endswith(PARTIAL)]
    strange = [name for name in there if name not in (form.file, CARD)]
    if strange or there == [CARD]:
        raise InputError(
            f"--out {out}: contains {(strange or there)[0]}, which is not of this export; give a new directory"
        )
    remove_leftovers(out, older=STALE)


def first_images(run: TrainedRun, split: Split) -> Tensor:
    """The first images of a split [N, 3, S, S], float32 in channels_last, on the CPU, as in validation."""
    spec = InputSpec.of(run.config, torch.device("cpu"), torch.float32, "cpu", threads_per_rank())
    with closing(EvalStream(split, spec, batch_size=CHECKED)) as stream:
        return next(iter(stream)).x.clone(memory_format=torch.channels_last)


def main(argv: Sequence[str]) -> dict[str, Any]:
    parser = Parser(
        prog="python -m fastnet.export",
        description="Writes a run's network for inference elsewhere, with a model card. Before a file is written, its "
        "logits are compared with the checkpoint's.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="directory of a run")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="a torch.export program, ONNX, or the weights under torchvision's names",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=directory, help="new directory for the files; default: RUN/export/FORMAT"
    )
    add_run_flags(parser)
    args = parser.parse_args(argv)

    form = FORMATS[args.format]
    for package in form.needs:
        load_extra(package, f"--format {args.format}")
    out = args.out or args.run / "export" / args.format
    check_out(out, form)
    ((name, run),) = load_runs([args.run], args.checkpoint, single_process("cpu")).items()
    data = open_data(args.data, args.run)
    if data.hash != run.data_hash:
        raise InputError(f"--data {data.path}: not the set that {args.run} was trained on; give that set")

    scores = scores_at(args.run, run.step, best=args.checkpoint == "best", holdout=run.config.holdout > 0)
    position = {"checkpoint": args.checkpoint, "step": run.step, "scores": scores}
    facts = facts_of(run.config, data, run.classes, run.words, position)
    run.network.flip_average = False  # the file gives the logits of an image as it is
    network = plain_network(run.config, len(run.classes))
    network.load_state_dict(plain_state(run.network))
    images = first_images(run, labelled_split(data, "val"))

    model = out / form.file
    with atomic_write(model) as beside:
        form.write(network, run.config.image_size, json.dumps(facts), beside)
        loaded = form.read(beside, plain_network(run.config, len(run.classes)))
        checked = difference(run.network, loaded.logits, images)
        if not checked.is_rounding:
            raise InputError(
                f"--format {args.format}: the exported network's logits differ from the checkpoint's by "
                f"{checked.found:.1e}, where rounding explains {checked.tolerance:.1e}; nothing was written, use "
                "another format"
            )
        text = card(name, args.format, facts, data, checked)
    with atomic_write(out / CARD) as beside:
        beside.write_text(text, encoding="utf-8")
    print(
        f"{model}: {name} ({args.checkpoint}, step {run.step}), {model.stat().st_size / 1e6:.1f} MB; on {len(images)} "
        f"val images its logits differ from the checkpoint's by at most {checked.found:.1e} "
        f"(rounding explains {checked.tolerance:.1e})"
    )
    return {
        "format": args.format,
        "difference": checked.found,
        "tolerance": checked.tolerance,
        "count": len(images),
        "files": [str(model), str(out / CARD)],
    }


if __name__ == "__main__":
    run_command(main)
