"""The experiments of benchmarks/accuracy.py: which runs, with which flags of train.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """A run of train.py. In its flags {weights} and {precision} are what the command is given, {start} the last.pt of
    run `start`.

    Run `trained`, where there is one, is evaluated once more instead, with these flags of evaluate.py. A run of
    `tuning` has seed 0 alone.
    """

    name: str
    flags: str
    start: str = ""
    trained: str = ""
    tuning: bool = False


@dataclass(frozen=True)
class Experiment:
    """Runs with common flags, each with the seeds from 0 on.

    `averages`: groups of runs whose scores are averaged. `classes`: train on that many classes only; 0: on all.
    `curves`: whether the runs of seed 0 become a figure. `elsewhere`: names and top-1 of others, drawn as lines in it.
    """

    about: str
    flags: str
    runs: tuple[Run, ...]
    seeds: int = 1
    averages: tuple[tuple[str, ...], ...] = ()
    classes: int = 0
    curves: bool = False
    elsewhere: tuple[tuple[str, float], ...] = ()

    def runs_of(self, seed: int) -> list[Run]:
        return [run for run in self.runs if seed == 0 or not run.tuning]

    def flags_of(self, run: Run) -> str:
        """All flags of a run, with {weights}, {precision} and {start}."""
        return run.flags if run.trained else f"{self.flags} {run.flags}".strip()


CPU = "--decode raw --precision {precision} --log-every 50"
SMALL = f"--image-size 64 --batch-size 128 --min-crop 0.35 --weight-decay 0.0005 {CPU}"
# 0.875 is the usual 224 of 256 px: random crops show objects larger in training than the whole image does (Touvron et
# al. 2019).
EVALUATION = "--flip-average --eval-crop 0.875"
PARTIAL = "--network baseline --weights {weights} --weights-partial"

# A frozen conv2 saves a third of a step on a CPU.
TRANSFER = Experiment(
    "both networks and their average at 64 px, from ImageNet weights of conv1 to conv4",
    f"paper {SMALL} {EVALUATION} --freeze conv2",
    (
        Run("baseline", f"{PARTIAL} --epochs 7 --lr 0.06 --layer-decay 0.7"),
        Run(
            "lstm",
            "--network lstm --weights {start} --head-epochs 2 --plateau 0 --head-lr 0.01 --epochs 8 "
            "--optimizer adamw --lr 0.005 --layer-decay 0.3",
            start="baseline",
        ),
    ),
    averages=(("baseline", "lstm"),),
    curves=True,
)

SCRATCH = Experiment(
    "the baseline at 64 px from random weights, with the small stem",
    f"paper {SMALL} --eval-crop 0.875",
    (Run("baseline", "--network baseline --weights none --stem small --start-size 32 --epochs 2 --lr 0.1"),),
    curves=True,
    # https://github.com/zeyuanyin/tiny-imagenet, https://github.com/JinXins/Adversarial-AutoMixup
    elsewhere=(("torchvision's script, 50 epochs", 0.5957), ("AdAutoMix", 0.6919)),
)

# What is frozen up to conv4 comes from ImageNet, and was never fitted to this set.
READOUT = Experiment(
    "phase one of the paper at 224 px: what LSTMs and a linear layer read out of a frozen conv4",
    "paper --weights {weights} --weights-partial --stages conv4 --head-freeze conv4 --cache-features 2 "
    f"--batch-size 64 --plateau 0 --epochs 0 --head-epochs 8 --weight-decay 0.05 {CPU}",
    (
        Run("linear, rate 0.1", "--network linear --head-lr 0.1"),
        Run("linear, rate 0.01", "--network linear --head-lr 0.01", tuning=True),
        Run("linear, rate 0.03", "--network linear --head-lr 0.03", tuning=True),
        Run("linear, rate 0.3", "--network linear --head-lr 0.3", tuning=True),
        Run("LSTMs, rate 0.003", "--network lstm --head-lr 0.003"),
        Run("LSTMs, rate 0.001", "--network lstm --head-lr 0.001", tuning=True),
        Run("LSTMs, rate 0.01", "--network lstm --head-lr 0.01", tuning=True),
    ),
    seeds=3,
    classes=25,
    curves=True,
)

# conv5 takes no part: the weights that this was measured with go up to conv4.
VARIANTS = Experiment(
    "the paper's variants at 96 px: other stages and sequences of 128, read out of frozen convolutions",
    "paper --weights {weights} --weights-partial --head-freeze conv4 --cache-features 3 --image-size 96 "
    f"--batch-size 64 --plateau 0 --epochs 0 --head-epochs 10 --head-lr 0.003 --weight-decay 0.05 {CPU}",
    (
        Run("conv4, 64", "--network lstm --stages conv4"),
        Run("conv4, 128", "--network lstm --stages conv4 --seq-len 128"),
        Run("linear on conv4", "--network linear --stages conv4"),
        Run("conv3, 64", "--network lstm --stages conv3"),
        Run("conv3 and conv4, 64", "--network lstm --stages conv3,conv4"),
        Run("conv3 and conv4, 128", "--network lstm --stages conv3,conv4 --seq-len 128"),
        Run("conv4, 64, rate 0.01", "--network lstm --stages conv4 --head-lr 0.01", tuning=True),
        Run("linear on conv4, rate 0.01", "--network linear --stages conv4 --head-lr 0.01", tuning=True),
        Run("linear on conv4, rate 0.03", "--network linear --stages conv4 --head-lr 0.03", tuning=True),
    ),
    seeds=3,
    classes=25,
)

# The price of kept features: an image is seen in fewer draws than there are epochs, and rounded to 16 bits.
KEPT = Experiment(
    "LSTMs on a conv4 frozen at ImageNet weights, at 64 px: images drawn anew each epoch, or three draws or one kept",
    "paper --weights {weights} --weights-partial --network lstm --stages conv4 --head-freeze conv4 --image-size 64 "
    f"--batch-size 64 --plateau 0 --epochs 0 --head-epochs 9 --head-lr 0.01 --weight-decay 0.05 {CPU}",
    (
        Run("drawn anew", ""),
        Run("three draws", "--cache-features 3"),
        Run("one draw", "--cache-features 1"),
    ),
    seeds=3,
    classes=25,
)

SWITCHES = {
    "plain": "",
    "layer-decay": "--layer-decay 0.7",
    "clip-grad": "--clip-grad 1",
    "ema": "--ema 0.99",
    "average-last": "--average-last 2",
    "mixup": "--mixup 0.2",
    "cutmix": "--cutmix 1",
    "start-size": "--start-size 32",
}

ABLATION = Experiment(
    "one switch of training at a time, evaluated plainly and with those of evaluation, on 25 classes at 64 px from "
    "ImageNet weights of conv1 to conv4",
    f"paper {SMALL} {PARTIAL} --epochs 5 --lr 0.04",
    (
        *(Run(name, flags) for name, flags in SWITCHES.items()),
        *(Run(f"{name}, flip and crop", EVALUATION, trained=name) for name in SWITCHES),
        Run("plain, flip", "--flip-average", trained="plain"),
        Run("plain, crop", "--eval-crop 0.875", trained="plain"),
    ),
    seeds=3,
    classes=25,
)

EXPERIMENTS = {
    "transfer": TRANSFER,
    "scratch": SCRATCH,
    "readout": READOUT,
    "variants": VARIANTS,
    "kept": KEPT,
    "ablation": ABLATION,
}
