"""The settings of a run: frozen dataclasses, and presets as functions.

Every field is also a flag of the command line (`cli.SettingsParser`). Its metadata hold the help text and the allowed
values.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from fastnet.errors import InputError

MAX_NUMBER = 10**12  # no count of this program is larger, and float64 still holds products of it
STAGES = ("conv2", "conv3", "conv4", "conv5")
NETWORKS = ("baseline", "linear", "lstm")


def _flag(default: Any, group: str, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": text, **extra})


@dataclass(frozen=True)
class Augment:
    """What training does to an image. Probabilities lie in 0..1; areas are fractions of the image."""

    policy: str = _flag(
        "none",
        "augmentation",
        "random changes of colour and shape",
        flag="--augment",
        choices=("none", "jitter", "trivial", "rand"),
    )
    min_crop: float = _flag(
        0.25,
        "augmentation",
        "smallest area that a random crop keeps, as a fraction of the image",
        above=0,
        within=(0, 1),
    )
    flip: float = _flag(0.5, "augmentation", "probability of a horizontal flip", within=(0, 1))
    erase: float = _flag(0.0, "augmentation", "probability of erasing a random box", within=(0, 1))


@dataclass(frozen=True)
class Config:
    """The settings of one run. Sizes are in pixels, batch sizes in images; learning rates are for the global batch."""

    network: str = _flag("baseline", "network", "which network to train", choices=NETWORKS)
    depth: int = _flag(18, "network", "number of layers of the ResNet", choices=(18, 34, 50))
    image_size: int = _flag(
        224, "network", "height and width of the input in pixels, a multiple of 32", within=(32, 4096)
    )
    stages: tuple[str, ...] = _flag(
        ("conv4", "conv5"),
        "network",
        "stages that the head of linear or lstm reads: some of conv2, conv3, conv4, conv5, separated by commas",
    )
    seq_len: int = _flag(
        64, "network", "channels in a group, its time steps; must divide the channels of each stage", least=1
    )
    weights: str = _flag(
        "imagenet",
        "network",
        "what the ResNet starts from: imagenet, none (random), or a file: a state dict, safetensors, or a checkpoint",
    )
    weights_partial: bool = _flag(
        False, "network", "take those tensors of --weights that fit, and start the others at random"
    )
    stem: str = _flag(
        "imagenet",
        "network",
        "the first convolution: imagenet (7x7, stride 2, then pooling), or small (3x3) for images below 100 px",
        choices=("imagenet", "small"),
    )
    flip_average: bool = _flag(
        False, "network", "outside training, average the logits of each image and its mirror image"
    )
    backend: Literal["auto", "triton", "torch"] = _flag(
        "auto",
        "network",
        "what computes the LSTMs; auto: triton on a GPU that it supports, else torch",
        choices=("auto", "triton", "torch"),
    )

    decode: str = _flag(
        "auto",
        "data",
        "where JPEGs are decoded; raw: once, into a file beside the set; device: that file in GPU memory; auto: device "
        "where a quarter of the free memory holds it and the augmentation is plain, else gpu; without a GPU, cpu",
        choices=("auto", "device", "gpu", "cpu", "raw"),
    )
    threads: int = _flag(
        0, "data", "CPU threads per rank; 0 divides the cores among the ranks", within=(0, 1024)
    )
    eval_crop: float = _flag(
        1.0,
        "data",
        "side of the centre crop in validation, as a fraction of the resized image's",
        within=(0.01, 1),
    )
    cache_features: int = _flag(
        0,
        "data",
        "where convolutions are frozen, compute their outputs for N draws of each image once, keep them beside the "
        "set, and train from those; 0: compute them in each step",
        within=(0, 1000),
    )
    holdout: float = _flag(
        0.0,
        "data",
        "share of the training images that validates in place of the val split, which is then evaluated once, at the "
        "end; 0: validate on val",
        within=(0, 0.5),
    )
    augment: Augment = field(default_factory=Augment)

    batch_size: int = _flag(256, "training", "images per optimiser step, over all ranks", least=1)
    accumulate: int | Literal["auto"] = _flag(
        1,
        "training",
        "parts in which a rank computes its share of a batch, to save memory: a number, or auto, the fewest that fit "
        "into the GPU's memory, tried before the first step",
        least=1,
    )
    head_epochs: int = _flag(0, "training", "epochs with frozen convolutions, at most", least=0)
    plateau: int = _flag(
        0, "training", "end the frozen phase after N epochs without a better top-1; 0: never", least=0
    )
    plateau_delta: float = _flag(
        0.001, "training", "by how much top-1 must rise to count as better there", within=(0, 1)
    )
    head_freeze: str = _flag(
        "conv5", "training", "the last stage that the frozen phase freezes", choices=STAGES
    )
    freeze: str = _flag(
        "none",
        "training",
        "the last stage that stays frozen when the whole network trains",
        choices=("none", *STAGES),
    )
    epochs: int = _flag(15, "training", "epochs in which the whole network trains", least=0)
    start_size: int = _flag(
        0,
        "training",
        "train the whole network on images of N px at first, which grow by 32 px at a time over two thirds of its "
        "epochs; 0: on images of full size",
        within=(0, 4096),
    )
    # A GPU's learning rate is a float32.
    lr: float = _flag(
        0.02, "training", "peak learning rate while the whole network trains", above=0, within=(0, 1e38)
    )
    head_lr: float = _flag(
        0.002, "training", "peak learning rate of the frozen phase", above=0, within=(0, 1e38)
    )
    optimizer: str = _flag(
        "sgd", "training", "optimiser while the whole network trains", choices=("sgd", "adamw")
    )
    head_optimizer: str = _flag(
        "adamw", "training", "optimiser of the frozen phase", choices=("sgd", "adamw")
    )
    momentum: float = _flag(0.9, "training", "momentum of SGD (Nesterov)", within=(0, 1))
    weight_decay: float = _flag(1e-4, "training", "weight decay, except for biases and batch norms", least=0)
    layer_decay: float = _flag(
        1.0,
        "training",
        "learning rate of each stage as a fraction of the next deeper one's",
        above=0,
        within=(0, 1),
    )
    clip_grad: float = _flag(0.0, "training", "largest norm of the gradient; 0: no limit", least=0)
    ema: float = _flag(
        0.0,
        "training",
        "decay per step of a moving average of the weights, which is then what is evaluated; 0: none",
        within=(0, 0.999999),
    )
    average_last: int = _flag(
        0,
        "training",
        "average the weights at the ends of the last N epochs, with batch norms estimated anew; the average is then "
        "what is evaluated; 0: none",
        least=0,
    )
    mixup: float = _flag(
        0.0,
        "training",
        "mix images with others of their batch, in shares from Beta(X, X); 0: none",
        within=(0, 100),
    )
    cutmix: float = _flag(
        0.0,
        "training",
        "put boxes of other images into images, whose shares are from Beta(X, X); 0: none",
        within=(0, 100),
    )
    label_smoothing: float = _flag(0.1, "training", "label smoothing", within=(0, 1))
    warmup: float = _flag(
        1.0, "training", "epochs of linear warmup at the start of each phase", within=(0, 10_000)
    )
    precision: str = _flag(
        "auto",
        "training",
        "arithmetic of the network; auto: bf16 or fp16 on a GPU, fp32 on the CPU; bf16 gains much on a CPU with AMX",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    cuda_graph: str = _flag(
        "auto",
        "training",
        "replay the training step as a CUDA graph; auto: on a GPU, if replays do what plain steps do",
        choices=("auto", "on", "off"),
    )
    compile: bool = _flag(
        False,
        "training",
        "train through torch.compile; takes a minute at the start, on the CPU several for the LSTM network",
    )
    apex: bool = _flag(False, "training", "use NVIDIA Apex's fused optimisers")
    device: str = _flag("auto", "training", "where to train", choices=("auto", "cuda", "cpu"))
    deterministic: bool = _flag(
        False,
        "training",
        "give the same bits in every run on one GPU, at the cost of slower convolutions; the CPU does so anyway",
    )
    seed: int = _flag(0, "training", "seed of initial weights, order and augmentation", within=(0, 2**32 - 1))
    max_steps: int = _flag(0, "training", "stop after N steps in all; 0: train to the end", least=0)
    checkpoint_every: str = _flag(
        "5m",
        "training",
        "steps or time between checkpoints, such as 500, 30s, 5m or 1h; every epoch ends with one as well",
    )
    timeout: float = _flag(
        300.0,
        "training",
        "seconds that a rank waits for the others before it gives up",
        above=0,
        within=(0, 10_000_000),
    )
    log_every: int = _flag(20, "training", "steps between records of the training loss", least=1)
    profile_steps: str = _flag(
        "none", "training", "A:B profiles the steps after step A up to step B, see benchmarks/README.md"
    )

    def __post_init__(self) -> None:
        for owner in (self, self.augment):
            for item in dataclasses.fields(owner):
                _check(flag_name(item), getattr(owner, item.name), item.metadata)
        check_image_size(self.image_size)
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages or len(set(self.stages)) != len(self.stages):
            raise InputError(
                f"--stages {','.join(self.stages)}: name some of {', '.join(STAGES)}, each at most once"
            )
        # The order in which the stages are named does not matter.
        object.__setattr__(self, "stages", tuple(sorted(self.stages)))
        if self.network == "lstm":
            for stage in self.stages:
                channels = stage_channels(self.depth, stage)
                if channels % self.seq_len:
                    raise InputError(
                        f"--seq-len {self.seq_len}: must divide the {channels} channels of {stage}"
                    )
        if isinstance(self.accumulate, str) and self.accumulate != "auto":
            raise InputError(f"--accumulate {self.accumulate}: give a number, or auto")
        if self.profile_steps != "none" and not _is_window(self.profile_steps):
            raise InputError(f"--profile-steps {self.profile_steps}: give A:B with A below B, such as 20:25")
        if not re.fullmatch(r"[1-9]\d{0,8}[smh]?", self.checkpoint_every, re.ASCII):
            raise InputError(
                f"--checkpoint-every {self.checkpoint_every}: give steps, or a time such as 30s, 5m or 1h"
            )
        if self.cache_features and self.mixes:
            raise InputError(
                "--cache-features: mixed images have no kept features; leave out --mixup and --cutmix"
            )
        if self.head_epochs + self.epochs == 0:
            raise InputError("--epochs 0 with --head-epochs 0: nothing to train; give one of them")
        if self.start_size:
            self._check_start_size()
        if self.average_last:
            self._check_average()

    def _check_start_size(self) -> None:
        flag = f"--start-size {self.start_size}"
        if self.start_size % 32 or self.start_size > self.image_size:
            raise InputError(f"{flag}: must be a multiple of 32, at most --image-size {self.image_size}")
        if self.network == "lstm":
            raise InputError(
                f"{flag}: the LSTMs' size is that of the images; leave it out, or train another network"
            )
        if self.epochs < 2:
            raise InputError(f"{flag}: the images grow over --epochs, at least 2 and not {self.epochs}")
        if self.cache_features and self.freeze != "none":
            raise InputError(f"{flag}: kept features are of one size; leave out --cache-features or --freeze")

    def _check_average(self) -> None:
        flag, last = f"--average-last {self.average_last}", self.epochs or self.head_epochs
        if self.ema:
            raise InputError(
                f"{flag} with --ema {self.ema}: two averages of the weights; leave one of them out"
            )
        if self.average_last > last:
            raise InputError(f"{flag}: the last phase has {last} epochs; use at most that")
        if self.plateau and not self.epochs:
            raise InputError(
                f"{flag}: where --plateau ends the run, nobody knows its last epochs; leave one out"
            )

    @property
    def mixes(self) -> bool:
        """Whether training mixes images."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def read_stages(self) -> tuple[str, ...]:
        """The stages whose outputs the head reads, from shallow to deep."""
        return ("conv5",) if self.network == "baseline" else self.stages

    @property
    def lstm_stages(self) -> list[tuple[int, int, int]]:
        """(groups, sequence length, hidden size) of each stage that LSTMs read, from shallow to deep."""
        return [
            (
                stage_channels(self.depth, stage) // self.seq_len,
                self.seq_len,
                (self.image_size // self.stride(stage)) ** 2,
            )
            for stage in self.stages
        ]

    def stride(self, stage: str) -> int:
        """Pixels of the image from one position of a stage's output to the next."""
        return (4 if self.stem == "imagenet" else 1) * 2 ** STAGES.index(stage)

    @property
    def parts(self) -> int:
        """The number of `accumulate`. A run that trains with auto has found it before anything asks."""
        assert isinstance(self.accumulate, int), "the parts of --accumulate auto are not known yet"
        return self.accumulate

    def micro_batch(self, ranks: int) -> int:
        """The most images that one of so many ranks computes at once."""
        return -(-self.batch_size // (ranks * self.parts))

    @property
    def profile_window(self) -> tuple[int, int] | None:
        """The numbers of steps done before and after the part that is profiled; None without --profile-steps."""
        if self.profile_steps == "none":
            return None
        first, _, last = self.profile_steps.partition(":")
        return int(first), int(last)

    @property
    def checkpoint_interval(self) -> tuple[int, float]:
        """(steps, seconds) between checkpoints; one of the two is 0."""
        every = self.checkpoint_every
        if every.isdigit():
            return int(every), 0.0
        return 0, int(every[:-1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[every[-1]]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Config:
        """The inverse of `to_json`. Raises msgspec.ValidationError for other types, InputError for other values."""
        return msgspec.convert(values, Config)


def check_image_size(size: int) -> None:
    """Raises InputError unless a ResNet can halve `size` five times."""
    below, above = max(1, size // 32) * 32, max(1, -(-size // 32)) * 32
    if size != below:
        raise InputError(f"--image-size {size}: must be a multiple of 32, such as {below} or {above}")


def stage_channels(depth: int, stage: str) -> int:
    """Channels of a ResNet stage's output (He et al. 2016, table 1; bottlenecks widen by four)."""
    width = {"conv2": 64, "conv3": 128, "conv4": 256, "conv5": 512}[stage]
    return width * (4 if depth >= 50 else 1)


def paper(network: str) -> Config:
    """The paper's settings: a pretrained ResNet-18 at 224 px. A head other than the baseline's trains alone first,
    until top-1 is flat."""
    alone = network != "baseline"
    return Config(network=network, head_epochs=20 if alone else 0, plateau=3 if alone else 0)


def fast(network: str) -> Config:
    """A shorter run at 128 px with the same phases, and the switches that help by docs/recipe.md ("What they gain")."""
    return replace(
        paper(network),
        image_size=128,
        batch_size=512,
        epochs=8,
        lr=0.04,
        head_lr=0.004,
        plateau_delta=0.003,
        layer_decay=0.7,
        eval_crop=0.875,
        flip_average=True,
    )


def sample(network: str) -> Config:
    """Minutes on a CPU: the generated sample at its own 64 px, from random weights."""
    alone = network != "baseline"
    return Config(
        network=network,
        image_size=64,
        weights="none",
        batch_size=64,
        head_epochs=3 if alone else 0,
        head_lr=0.005,
        epochs=5 if alone else 8,
        lr=0.02,
        warmup=0.5,
        log_every=10,
        augment=Augment(min_crop=0.35),
    )


PRESETS: dict[str, Callable[[str], Config]] = {"paper": paper, "sample": sample, "fast": fast}


def choose_preset(name: str | None, data_kind: str) -> str:
    """The preset's name. None means `sample` for the generated sample set and `paper` for other data."""
    return name or ("sample" if data_kind == "sample" else "paper")


def with_flags(config: Config, flags: dict[str, Any]) -> Config:
    """`config` with the values of the given flags. Raises InputError for one out of range, and for --cache-features
    where nothing is frozen."""
    inner = {item.name for item in dataclasses.fields(Augment)}
    outer = {item.name for item in dataclasses.fields(Config)}
    augment = replace(config.augment, **{k: v for k, v in flags.items() if k in inner})
    made = replace(config, augment=augment, **{k: v for k, v in flags.items() if k in outer})
    # Not a property of every Config: a file of settings may have it for one network, and runs that are there may, too.
    if made.cache_features and not made.head_epochs and (not made.epochs or made.freeze == "none"):
        raise InputError(
            f"--cache-features {made.cache_features}: no convolutions are frozen, so all change; leave it out, or "
            "give --head-epochs or --freeze"
        )
    return made


def _is_window(text: str) -> bool:
    match = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    return match is not None and int(match[1]) < int(match[2])


def flag_name(item: dataclasses.Field) -> str:
    """The flag of a field: `batch_size` is `--batch-size`."""
    return item.metadata.get("flag", "--" + item.name.replace("_", "-"))


def as_text(value: Any) -> str:
    """A value as its flag takes it; of one that takes none, whether it is given."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(value) if isinstance(value, tuple) else str(value)


def first_change(before: Config, now: Config, apart_from: set[str]) -> tuple[str, str, str] | None:
    """The first flag whose values differ, with both of them; not of the fields `apart_from`."""
    for a, b in ((before, now), (before.augment, now.augment)):
        for item in dataclasses.fields(a):
            one, other = getattr(a, item.name), getattr(b, item.name)
            if item.name not in apart_from and item.name != "augment" and one != other:
                return flag_name(item), as_text(one), as_text(other)
    return None


def _check(flag: str, value: Any, meta: Any) -> None:
    if "choices" in meta and value not in meta["choices"]:
        raise InputError(f"{flag} {value}: must be one of {', '.join(map(str, meta['choices']))}")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise InputError(f"{flag} {value!s:.20}...: must be at most {MAX_NUMBER:,}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{flag} {value}: must be a finite number")
    if "least" in meta and not isinstance(value, str) and value < meta["least"]:
        raise InputError(f"{flag} {value}: must be at least {meta['least']}")
    if "above" in meta and value <= meta["above"]:
        raise InputError(f"{flag} {value}: must be greater than {meta['above']}")
    if "within" in meta and not meta["within"][0] <= value <= meta["within"][1]:
        raise InputError(f"{flag} {value}: must lie between {meta['within'][0]} and {meta['within'][1]}")
