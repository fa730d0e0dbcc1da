"""The export command: what the files compute and say of themselves, and what it refuses to write or read."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml
from PIL import Image
from torch import Tensor

from fastnet import api, export, train
from fastnet.config import NETWORKS, Config
from fastnet.data.prepared import open_set
from fastnet.errors import InputError
from fastnet.exporting.card import started_from, weights_elsewhere
from fastnet.exporting.check import difference
from fastnet.exporting.formats import FORMATS
from fastnet.exporting.plain import plain_network, plain_state
from fastnet.inference.images import images_as_split
from fastnet.input.spec import InputSpec
from fastnet.input.streams import EvalStream
from fastnet.network.network import Network
from fastnet.network.weights import load_backbone
from tests.support.official import jpeg

# On one worker: torch.export and the ONNX exporter take seconds when they are first used.
pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture(scope="module")
def small_lstm(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LSTM network of one stage: torch.export takes its time for each step of an LSTM."""
    run = tmp_path_factory.mktemp("small") / "lstm"
    return trained(tiny_set, run, "--network", "lstm", "--stages", "conv2", "--seq-len", "32")


@pytest.fixture(scope="module")
def small_linear(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("small") / "linear"
    return trained(tiny_set, run, "--network", "linear", "--stages", "conv4")


def trained(data: Path, run: Path, *flags: str) -> Path:
    """The run after an epoch of three steps."""
    common = [
        "--image-size",
        "32",
        "--head-epochs",
        "0",
        "--epochs",
        "1",
        "--batch-size",
        "14",
        "--lr",
        "0.005",
    ]
    train.main(["sample", "--data", str(data), *common, *flags, "--run-dir", str(run)])
    return run


def checkpoint_logits(run: Path, images: Tensor) -> Tensor:
    network = api.load_run(run, device="cpu").network
    with torch.inference_mode():
        return network(images.to(memory_format=torch.channels_last))


def run_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the code of the model card beside the files, as its reader would; gives the names that it makes."""
    monkeypatch.chdir(out)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def as_function(names: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """What the card's code has loaded, as a function from images to logits."""
    if "session" in names:
        return lambda x: torch.from_numpy(names["session"].run(["logits"], {"images": x.numpy()})[0])
    return names["network"]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "form", ["torch", pytest.param("onnx", marks=[pytest.mark.long, pytest.mark.slow]), "safetensors"]
)
def test_exports_compute_and_tell_what_the_checkpoint_does(
    form: str,
    network: str,
    runs: list[Path],
    small_lstm: Path,
    small_linear: Path,
    tiny_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = {"baseline": runs[0], "linear": small_linear, "lstm": small_lstm}[network]
    out = tmp_path / "out"
    done = export.main([str(run), "--format", form, "--out", str(out)])
    assert sorted(done["files"]) == sorted(str(path) for path in out.iterdir())
    assert done["difference"] <= done["tolerance"] and done["count"] == 10

    # Without loss, as two libraries may decode a JPEG to pixels that differ by one.
    Image.open(io.BytesIO(jpeg(5, size=32))).save(out / "image.jpg", "PNG")
    names = run_card(out, monkeypatch)
    logits = as_function(names)
    data = open_set(tiny_set)
    ((channels_last, _, _),) = api.batches(data, "val", image_size=32, batch_size=10)
    images = channels_last.contiguous()
    x = torch.from_numpy(names["preprocess"]("image.jpg"))
    with torch.no_grad():
        for batch in (images[:3], images[3:], x):  # neither the traced size nor those of the command's check
            assert (logits(batch) - checkpoint_logits(run, batch)).abs().max() <= done["tolerance"]
    # The card prepares an image as validation does: the same pixels, with one more rounding in the normalisation.
    scores = api.load_run(run, device="cpu").predict(["image.jpg"])
    torch.testing.assert_close(logits(x).softmax(1), scores, rtol=0, atol=done["tolerance"])

    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    facts = names["facts"]
    assert (facts["classes"], facts["words"]) == (data.classes, data.words)
    assert facts["input"]["mean"] == [0.485, 0.456, 0.406] and facts["input"]["std"] == [0.229, 0.224, 0.225]
    assert facts["input"]["shape"] == ["batch", 3, 32, 32] and facts["input"]["eval_crop"] == 1.0
    assert facts["data"]["hash"] == data.hash and facts["config"]["network"] == facts["network"] == network
    assert facts["averages"] == ({"layer3": 256} if network == "linear" else {})
    assert (facts["step"], facts["scores"]["top1"]) == (last["step"], last["val_top1"])

    _, metadata, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    front = yaml.safe_load(metadata)
    assert front["license_name"] == "imagenet"  # the classes have names of WordNet
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == last["val_top1"]
    assert f"| validation top-1 | {last['val_top1']:.4f} |" in text and data.hash in text
    assert b"site-packages" not in (out / FORMATS[form].file).read_bytes()  # no paths of this machine

    what = {
        "baseline": "",
        "linear": " with a linear layer on the averages of conv4",
        "lstm": " with LSTMs that read conv2,",
    }
    assert f"A ResNet-18{what[network]}" in text
    groups = 2 if network == "lstm" else 0
    if form == "torch":
        operators = [str(node.target) for node in names["network"].graph.nodes if node.op == "call_function"]
        assert operators.count("aten.lstm.input") == groups
        assert all(name.startswith(("aten.", "<built-in function getitem>")) for name in operators)
    if form == "onnx":
        assert names["session"].get_inputs()[0].shape == ["batch", 3, 32, 32]
        import onnx

        nodes = onnx.load(out / "model.onnx").graph.node
        assert [node.op_type for node in nodes].count("LSTM") == groups


@pytest.mark.parametrize(
    ("depth", "stages"), [(18, ("conv2", "conv5")), (50, ("conv3", "conv4")), (18, ("conv5",))]
)
def test_a_linear_network_of_several_stages(depth: int, stages: tuple[str, ...]) -> None:
    """With conv5 alone it is torchvision's own."""
    torch.manual_seed(0)
    config = Config(network="linear", depth=depth, stages=stages, image_size=32)
    network, plain = Network(config, 7).eval(), plain_network(config, 7)
    plain.load_state_dict(plain_state(network))
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    assert difference(network, plain, images).is_rounding
    assert isinstance(plain, torchvision.models.ResNet) == (stages == ("conv5",))


def test_a_checkpoint_from_within_an_epoch_has_no_scores(small_lstm: Path, tmp_path: Path) -> None:
    run = shutil.copytree(small_lstm, tmp_path / "run")
    records = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in records if '"epoch"' not in line) + "\n")
    export.main([str(run), "--format", "safetensors"])
    card = (run / "export" / "safetensors" / "README.md").read_text(encoding="utf-8")
    assert "| validation top-1 | not measured at this step |" in card and "model-index" not in card


def test_a_run_with_a_holdout_tells_the_scores_on_val(tiny_set: Path, tmp_path: Path) -> None:
    run = trained(tiny_set, tmp_path / "run", "--network", "baseline", "--holdout", "0.25")
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["event"] == "final" and final["val_count"] == 10
    for checkpoint, told in (
        ("best", f"| validation top-1 | {final['val_top1']:.4f} |"),
        ("last", "not measured"),
    ):
        out = tmp_path / checkpoint
        export.main([str(run), "--format", "safetensors", "--checkpoint", checkpoint, "--out", str(out)])
        card = (out / "README.md").read_text(encoding="utf-8")
        assert told in card and ("| validation images | 10 |" in card) == (checkpoint == "best")


def test_what_a_killed_export_left_is_replaced(small_linear: Path, tmp_path: Path) -> None:
    left = tmp_path / ".model.safetensors.abc.partial"
    left.write_bytes(b"part")
    flags = ["--format", "safetensors", "--out", str(tmp_path)]
    export.main([str(small_linear), *flags])
    assert left.exists(), "another export may be writing it"
    os.utime(left, (0, 0))
    export.main([str(small_linear), *flags])
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "README.md"}
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "weights that others cannot read"


@pytest.mark.long
@pytest.mark.slow
def test_the_program_loads_with_torch_alone(small_lstm: Path, tmp_path: Path) -> None:
    export.main([str(small_lstm), "--format", "torch", "--out", str(tmp_path / "out")])
    code = (
        "import sys, torch\n"
        "network = torch.export.load('model.pt2').module()\n"
        "print(*network(torch.zeros(4, 3, 32, 32)).shape)\n"
        "assert not {'fastnet', 'fastnet_kernels', 'torchvision'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert done.stdout == "4 3\n", done.stderr


def test_weights_have_torchvisions_and_nn_lstms_names(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both networks as users have them: the LSTM network with 12 LSTMs in two stages."""
    from safetensors.torch import load_file

    for run in runs:
        out = tmp_path / run.name
        export.main([str(run), "--format", "safetensors", "--out", str(out)])
        tensors = load_file(out / "model.safetensors")
        network = api.load_run(run, device="cpu").network
        resnet = torchvision.models.resnet18(num_classes=3).state_dict()
        lstms = [] if network.lstm is None else network.lstm.to_lstms()
        names = [f"lstms.layer3.{g}" for g in range(4)] + [f"lstms.layer4.{g}" for g in range(8)]
        expected = {
            f"{name}.{parameter}": tensor
            for name, lstm in zip(names, lstms, strict=False)
            for parameter, tensor in lstm.state_dict().items()
        }
        assert len(lstms) == (12 if run.name == "lstm" else 0)
        assert tensors.keys() == resnet.keys() | expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())

        other = Network(Config(image_size=64), 5)
        load_backbone(other, 18, str(out / "model.safetensors"))
        for name, tensor in other.backbone.state_dict().items():
            assert torch.equal(tensor, network.backbone.state_dict()[name])


def scaled(state: dict[str, Tensor]) -> None:
    """The smallest of the ways in which a tensor may be wrong that tests still see: a percent in one batch norm."""
    state["layer1.0.bn1.weight"] = state["layer1.0.bn1.weight"] * 1.01


def other_gate_order(state: dict[str, Tensor]) -> None:
    i, f, g, o = state["lstms.layer1.1.weight_hh_l0"].chunk(4)
    state["lstms.layer1.1.weight_hh_l0"] = torch.cat([i, o, f, g])  # as ONNX has them


def other_group_order(state: dict[str, Tensor]) -> None:
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        one, two = f"lstms.layer1.0.{name}", f"lstms.layer1.1.{name}"
        state[one], state[two] = state[two], state[one]


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ("imagenet", "imagenet"),
        ("/models/imagenet", "./imagenet"),
        ("./none", "./none"),
        ("/home/me/caf\udce9.pt", "caf\\xe9.pt"),
    ],
)
def test_a_file_of_weights_is_named_without_its_folder(weights: str, named: str) -> None:
    assert weights_elsewhere(weights) == named
    assert started_from(named).encode() and ("torchvision" in started_from(named)) == (weights == "imagenet")


def not_finite(state: dict[str, Tensor]) -> None:
    state["fc.bias"] = torch.full_like(state["fc.bias"], float("nan"))


@pytest.mark.long
@pytest.mark.slow
def test_a_small_stem_and_averaged_scores(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is the network with its own first convolution, for an image as it is; the card says so."""
    run, out = tmp_path / "run", tmp_path / "out"
    flags = ["--network", "baseline", "--stem", "small", "--flip-average", "--image-size", "32"]
    flags += ["--eval-crop", "0.8"]
    flags += ["--epochs", "1", "--batch-size", "14"]
    train.main(["sample", "--data", str(tiny_set), *flags, "--run-dir", str(run)])
    done = export.main([str(run), "--format", "safetensors", "--out", str(out)])
    assert done["difference"] <= done["tolerance"]
    assert "| scores | from the mean logits of an image and its mirror" in (out / "README.md").read_text()
    # Neither as large as the network's images nor square, and evaluation cuts out the centre.
    Image.open(io.BytesIO(jpeg(5, size=80))).crop((0, 0, 80, 48)).save(out / "image.jpg", "PNG")
    names = run_card(out, monkeypatch)
    x = torch.from_numpy(names["preprocess"]("image.jpg"))
    spec = InputSpec(32, torch.device("cpu"), torch.float32, "cpu", 1, eval_crop=0.8)
    with closing(EvalStream(images_as_split([out / "image.jpg"]), spec, batch_size=1)) as stream:
        seen = next(iter(stream)).x.clone()
    assert (x - seen).abs().max() <= 1.5 / 255 / 0.22  # PIL rounds to grey levels after each direction
    with torch.no_grad():
        averaged = (names["network"](x) + names["network"](x.flip(3))) / 2
    assert (averaged - checkpoint_logits(run, x)).abs().max() <= done["tolerance"]


@pytest.mark.parametrize("damage", [scaled, other_gate_order, other_group_order, not_finite])
def test_an_export_that_computes_something_else_is_not_written(
    damage: Callable[[dict[str, Tensor]], None],
    small_lstm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = export.plain_state

    def wrong(network: Network) -> dict[str, Tensor]:
        state = right(network)
        damage(state)
        return state

    monkeypatch.setattr(export, "plain_state", wrong)
    with pytest.raises(
        InputError,
        match=r"--format safetensors: the exported network's logits differ from the checkpoint's by .*nothing was",
    ):
        export.main([str(small_lstm), "--format", "safetensors", "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())


def test_only_an_earlier_export_is_replaced(
    runs: list[Path], set_without_test_split: Path, tmp_path: Path
) -> None:
    command = [str(runs[0]), "--format", "safetensors", "--out", str(tmp_path)]
    for name in ("model.safetensors", "README.md"):
        (tmp_path / name).write_text("the old one")
    export.main(command)
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("model.safetensors", "README.md"))
    with pytest.raises(
        InputError, match=r"contains model.safetensors, which is not of this export; give a new"
    ):
        export.main([str(runs[0]), "--format", "torch", "--out", str(tmp_path)])
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "README.md").write_text("of something else")
    with pytest.raises(InputError, match=r"contains README.md"):
        export.main(command)
    assert (tmp_path / "README.md").read_text() == "of something else"
    with pytest.raises(InputError, match=r"not the set that .*baseline was trained on"):
        export.main([*command[:3], "--out", str(tmp_path / "new"), "--data", str(set_without_test_split)])


@pytest.mark.parametrize(
    ("form", "package"), [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("safetensors", "safetensors")]
)
def test_a_missing_package_is_named(
    form: str, package: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs the package {package}; install the extra export: pip install '.\[export\]'"
    with pytest.raises(InputError, match=f"--format {form}: {message}"):
        export.main([str(runs[0]), "--format", form, "--out", str(tmp_path / "out")])
    if package == "safetensors":
        (tmp_path / "x.safetensors").touch()
        with pytest.raises(InputError, match=f"x.safetensors: {message}"):
            load_backbone(Network(Config(image_size=64), 5), 18, str(tmp_path / "x.safetensors"))


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


CONV1 = [64, 3, 7, 7]
HOSTILE = {
    "empty": (b"", "not a readable safetensors file: .*header too small"),
    "endless header": (
        safetensors({}, length=1 << 62),
        "not a readable safetensors file: its header has 4,6",
    ),
    "no JSON": (safetensors(b"{" * 100), "not a readable safetensors file"),
    "deep JSON": (safetensors(b'{"a":' + b"[" * 10_000), "not a readable safetensors file"),
    "no UTF-8": (safetensors(b'{"\xff":1}'), "not a readable safetensors file"),
    "beyond the end": (
        safetensors({"conv1.weight": tensor("F32", [9], 36)}),
        "not a readable safetensors file",
    ),
    "overflow": (safetensors({"conv1.weight": tensor("F32", [1 << 62, 4], 4)}, b"1234"), "not a readable"),
    "negative": (safetensors({"conv1.weight": tensor("F32", [-1], 4)}, b"1234"), "not a readable"),
    "other shape": (safetensors({"conv1.weight": tensor("F32", [1], 4)}, b"1234"), r"conv1.weight is \[1\]"),
    "whole numbers": (safetensors({"conv1.weight": tensor("I8", CONV1, 9408)}, bytes(9408)), "is torch.int8"),
    "8 bits": (safetensors({"conv1.weight": tensor("F8_E5M2", CONV1, 9408)}, bytes(9408)), "is torch.float8"),
    "no tensors": (safetensors({}), "has no tensor conv1.weight"),
    "a PyTorch file": (b"PK\x03\x04" + bytes(100), "not a readable safetensors file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors_are_one_line(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"--weights {path}: .*{message}") as error:
        load_backbone(Network(Config(image_size=64), 5), 18, str(path))
    assert "\n" not in str(error.value)
