"""The facts about an exported network, and the model card that tells them.

The card is README.md in the form of the Hugging Face Hub: metadata in YAML, then text. Its code reads the file beside
it without fastnet.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch

import fastnet
from fastnet.config import Config
from fastnet.data.entries import readable
from fastnet.data.prepared import PreparedSet
from fastnet.errors import printable
from fastnet.exporting.check import Difference
from fastnet.exporting.formats import FACTS, FORMATS
from fastnet.exporting.plain import (
    AveragedStagesResNet,
    ChannelGroupResNet,
    averaged_channels,
    lstm_sizes,
)
from fastnet.input.draws import MEAN, STD
from fastnet.training.events import EpochEvent, FinalEvent, read_events

STARTS = {"none": "random weights", "imagenet": "torchvision's ImageNet weights (IMAGENET1K_V1)"}
TITLES = {"torch": "a torch.export program", "onnx": "ONNX", "safetensors": "safetensors weights"}
# Rounds as evaluation does, which resizes the shorter side and cuts out the centre.
PREPROCESS = '''\
def preprocess(path):
    """An image file as [1, 3, S, S] float32."""
    size, resize = facts["input"]["image_size"], facts["input"]["resize"]
    image = Image.open(path).convert("RGB")
    width, height = (resize * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    pixels = np.asarray(image, np.float32) / 255
    normalised = (pixels - facts["input"]["mean"]) / facts["input"]["std"]
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None], np.float32)
'''
IMAGENET_TERMS = """\
These weights were trained on images of ImageNet, or started from weights that were. ImageNet's terms of access allow
its images for non-commercial research and education; whether and how they bind weights is not settled, so assume
that they do. The licence of fastnet (Apache-2.0) covers its code, not these weights."""
OTHER_TERMS = """\
Nothing is known here of the rights in the training images and in the weights that training started from; state a
licence before you pass this on. The licence of fastnet (Apache-2.0) covers its code, not these weights."""


def facts_of(
    config: Config, data: PreparedSet, classes: list[str], words: list[str], position: dict[str, Any]
) -> dict[str, Any]:
    """What every exported file says of itself, for JSON.

    position: the checkpoint's name and step, and the validation scores at that step.
    """
    return {
        "network": config.network,
        "depth": config.depth,
        "lstms": lstm_sizes(config),
        "averages": averaged_channels(config),
        "input": {
            "shape": ["batch", 3, config.image_size, config.image_size],
            "dtype": "float32",
            "colours": "RGB",
            "mean": [round(value / 255, 6) for value in MEAN],
            "std": [round(value / 255, 6) for value in STD],
            "image_size": config.image_size,
            "eval_crop": config.eval_crop,
            "resize": round(config.image_size / config.eval_crop),
        },
        "classes": classes,
        "words": words,
        "data": {"name": data.name, "hash": data.hash},
        **position,
        "config": {**config.to_json(), "weights": weights_elsewhere(config.weights)},
        "versions": {"fastnet": fastnet.__version__, "torch": torch.__version__},
    }


def scores_at(run_dir: Path, step: int, *, best: bool, holdout: bool) -> dict[str, Any]:
    """The scores on the val split after `step` steps, from metrics.jsonl; empty if there are none.

    A run with a holdout has them of its best weights alone.
    """
    events = read_events(run_dir / "metrics.jsonl")
    scored: list[EpochEvent | FinalEvent] = [
        e for e in events if isinstance(e, EpochEvent) and e.step == step
    ]
    if holdout:
        scored = [e for e in events if isinstance(e, FinalEvent) and best]
    if not scored:
        return {}
    last = scored[-1]
    return {"top1": last.val_top1, "top5": last.val_top5, "loss": last.val_loss, "count": last.val_count}


def card(name: str, form: str, facts: dict[str, Any], data: PreparedSet, checked: Difference) -> str:
    """The text of README.md for a file of the format `form`."""
    # ImageNet's classes have the names of WordNet's synsets, and so have those that the sample set makes up.
    synsets = all(re.fullmatch(r"n\d{8}", label) for label in facts["classes"])
    imagenet = facts["config"]["weights"] == "imagenet" or (synsets and data.source["kind"] != "sample")
    title, trained_on = printable(name), printable(facts["data"]["name"])
    size, classes = facts["input"]["image_size"], len(facts["classes"])
    resnet = f"ResNet-{facts['depth']}"
    stages = " and ".join(facts["config"]["stages"])
    if facts["lstms"]:
        what = f"A {resnet} with LSTMs that read {stages}, one for each group of channels"
    elif facts["averages"]:
        what = f"A {resnet} with a linear layer on the averages of {stages}"
    else:
        what = f"A {resnet}"
    scores = facts["scores"]
    averaged = facts["config"]["flip_average"]
    results = [
        ("validation top-1", f"{scores['top1']:.4f}" if scores else "not measured at this step"),
        *([("validation top-5", f"{scores['top5']:.4f}")] if scores else []),
        *([("validation images", f"{scores['count']:,}")] if scores else []),
        *(
            [("scores", "from the mean logits of an image and its mirror image; the file gives one image's")]
            if averaged
            else []
        ),
        ("checkpoint", f"{facts['checkpoint']}, step {facts['step']:,}"),
        ("data", f"{trained_on}, sha256 `{facts['data']['hash']}`"),
        ("training started from", started_from(facts["config"]["weights"])),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in results)
    return f"""\
---
{front_matter(name, facts, imagenet)}
---

# {title}

{what}. It tells {classes} classes apart in images of {size} px, was trained with fastnet \
{facts["versions"]["fastnet"]} on {trained_on}, and is stored here as {TITLES[form]}.

| | |
|---|---|
{table}

`{FORMATS[form].file}` has these facts as JSON, with the names of the classes in the order of the logits and all \
settings of the training.

## Input and output

- Input: float32 [N, 3, {size}, {size}], RGB, any N. An image is resized to {facts["input"]["resize"]} px on its \
shorter side, cropped to the {size} px of its centre, divided by 255 and normalised with ImageNet's mean \
{facts["input"]["mean"]} and standard deviation {facts["input"]["std"]}. The network does not normalise.
- Output: logits, float32 [N, {classes}]. Their softmax gives the scores.

## How to use it

```python
{usage(form, facts)}```

Before this file was written, its logits were compared with those of the checkpoint on images of the validation split.
The largest difference was {checked.found:.1e}; rounding explains up to {checked.tolerance:.1e}.

## Licence

{IMAGENET_TERMS if imagenet else OTHER_TERMS}
"""


def weights_elsewhere(weights: str) -> str:
    """--weights as text without the folder of a file, which says nothing elsewhere; ./none is a file of that name."""
    name = readable(Path(weights).name)
    return name if weights in STARTS or name not in STARTS else f"./{name}"


def started_from(weights: str) -> str:
    return STARTS.get(weights, f"the weights in {printable(weights)}")


def front_matter(name: str, facts: dict[str, Any], imagenet: bool) -> str:
    """The card's metadata. Values are JSON, which is YAML too, so no name can break out of its place."""
    values: dict[str, Any] = {"library_name": "fastnet", "pipeline_tag": "image-classification"}
    if imagenet:
        values |= {"license": "other", "license_name": "imagenet"}
        values["license_link"] = "https://image-net.org/download.php"
    else:
        values["license"] = "unknown"
    values["tags"] = ["image-classification", f"resnet-{facts['depth']}"]
    if facts["scores"]:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": facts["data"]["name"], "type": facts["data"]["name"], "split": "validation"},
            "metrics": [{"type": "accuracy", "name": "top-1", "value": facts["scores"]["top1"]}],
        }
        values["model-index"] = [{"name": name, "results": [result]}]
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())


def usage(form: str, facts: dict[str, Any]) -> str:
    """Python code that classifies image.jpg with the file beside it."""
    file = FORMATS[form].file
    if form == "onnx":
        return f"""\
import json

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{file}")
facts = json.loads(session.get_modelmeta().custom_metadata_map["{FACTS}"])


{PREPROCESS}

(logits,) = session.run(["logits"], {{"images": preprocess("image.jpg")}})
print(facts["words"][logits[0].argmax()])
"""
    if form == "torch":
        imports = "import torch\nfrom PIL import Image"
        load = f"""\
extra = {{"{FACTS}": ""}}
network = torch.export.load("{file}", extra_files=extra).module()
facts = json.loads(extra["{FACTS}"])
"""
    else:
        imports = "import torch\nimport torchvision\nfrom PIL import Image\nfrom safetensors import safe_open"
        if facts["lstms"] or facts["averages"]:
            imports += "\nfrom torch import Tensor, nn"
        load = f"""\
with safe_open("{file}", framework="pt") as file:
    tensors = {{name: file.get_tensor(name) for name in file.keys()}}
    facts = json.loads(file.metadata()["{FACTS}"])
{network_of(facts)}network.load_state_dict(tensors)
network.eval()
"""
    return f"""\
import json

import numpy as np
{imports}

{load}

{PREPROCESS}

with torch.no_grad():
    logits = network(torch.from_numpy(preprocess("image.jpg")))
print(facts["words"][int(logits[0].argmax())])
"""


def network_of(facts: dict[str, Any]) -> str:
    """Code that makes `network` with random weights."""
    code = f"network = torchvision.models.resnet{facts['depth']}(num_classes={len(facts['classes'])})\n"
    if facts["config"]["stem"] == "small":
        code += "network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)\n"
        code += "network.maxpool = torch.nn.Identity()\n"
    for key, plain in (("lstms", ChannelGroupResNet), ("averages", AveragedStagesResNet)):
        if facts[key]:
            code = f"\n\n{inspect.getsource(plain)}\n\n{code}"
            code += f'network = {plain.__name__}(network, facts["{key}"], {len(facts["classes"])})\n'
    return code
