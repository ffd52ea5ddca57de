"""Models for other programs."""

import json
import re

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import fedunlearn as fu
from conftest import classifier, files_of_at_most, logits, make_images, make_net
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.plan import Classifier, Cut, plan_pruning
from fedunlearn.errors import ModelError, RunError
from fedunlearn.export import export_onnx
from fedunlearn.models import build_model
from fedunlearn.run.commands import export_weights
from fedunlearn.run.recipe import load_recipe
from test_cli import fedunlearn


def grouped():
    """A network with a depthwise convolution, a group normalisation and a pooled head."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.GroupNorm(2, 8),
        nn.Hardswish(),
        nn.Conv2d(8, 3, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


NETWORKS = {
    "small": lambda: (make_net(), (1, 8, 8)),
    "grouped": lambda: (grouped(), (1, 8, 8)),
    "small-cnn": lambda: (build_model("small-cnn", classes=3, colours=1), (1, 8, 8)),
    "resnet20": lambda: (build_model("resnet20", classes=3, colours=3), (3, 32, 32)),
    "vgg11": lambda: (build_model("vgg11", classes=3, colours=3), (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_gives_the_logits_of_torch_after_pruning_and_without_a_row(name, tmp_path):
    torch.manual_seed(0)
    net, shape = NETWORKS[name]()
    whole = Classifier(net, shape)
    channels = find_channels(net, whole.example)
    scores = {layer: torch.rand(group.width) for group in channels.groups for layer in group.layers}
    model = whole.cut(plan_pruning(channels, scores, Cut(0.3))).without_rows([1])
    images = make_images(6, side=shape[1], colours=shape[0])
    assert export_onnx(tmp_path / "m.onnx", model, images=images) <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    batch = images.pixels(slice(None))
    (found,) = session.run(None, {"images": batch.numpy()})
    np.testing.assert_allclose(found, logits(model.module, batch).numpy(), atol=1e-4, rtol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["class 0", "class 2"]
    assert json.loads(about["mean"]) == list(images.mean)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x):
        return self.net(x) if float(x.mean()) > -9 else self.net(-x)


@pytest.mark.parametrize(
    ("name", "model", "text"),
    [
        ("m.pt", make_net, "m.pt: end the name of an ONNX file in .onnx"),
        ("m.onnx", Branching, "m.onnx: torch cannot export the model"),
        ("none/m.onnx", make_net, "m.onnx: cannot be written (No such file or directory)"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(name, model, text, tmp_path):
    with pytest.raises(ModelError, match=re.escape(text)):
        export_onnx(tmp_path / name, classifier(model()), images=make_images(6))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(path, classifier(make_net()), images=make_images(6))
    before = path.read_bytes()
    with files_of_at_most(len(before) // 2), pytest.raises(ModelError, match=r"m\.onnx: cannot be written"):
        export_onnx(path, classifier(make_net(seed=1)), images=make_images(6))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_gives_other_logits_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("fedunlearn.export._TOLERANCE", -1.0)
    with pytest.raises(ModelError, match=r"m.onnx: not written: by onnxruntime the logits are .* from torch's"):
        fu.export_onnx(tmp_path / "m.onnx", classifier(make_net()), images=make_images(6))
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r"onnxruntime is needed to export ONNX: pip install 'fedunlearn\[onnx\]'"):
        export_onnx(tmp_path / "m.onnx", classifier(make_net()), images=make_images(6))


def test_nothing_is_written_into_a_signed_folder(tmp_path):
    (tmp_path / "dossier.json").write_text("{}")
    text = f"{tmp_path} holds a signed dossier, which one more file would break: write m.onnx elsewhere"
    with pytest.raises(RunError, match=re.escape(text)):
        export_weights(load_recipe("digits"), tmp_path / "sub" / "m.onnx")


class Halved(nn.Module):
    """Pools means in float64, which onnxruntime cannot."""

    def forward(self, maps):
        return nn.functional.avg_pool2d(maps.double(), 2).float()


def test_the_shipped_model_of_a_run_is_exported_from_the_command_line(signed, tmp_path):
    shipped, out = signed / "plain" / "model.safetensors", tmp_path / "m.onnx"
    done = fedunlearn("export", "--recipe", signed / "tiny.toml", "--weights", shipped, "--out", out)
    assert re.fullmatch(r".*m.onnx: by onnxruntime its logits are those of torch to .* of the largest\n", done.stdout)
    (found,) = onnxruntime.InferenceSession(out).run(None, {"images": np.zeros((2, 1, 8, 8), np.float32)})
    assert found.shape == (2, 3)  # of four classes, one gone


def test_what_onnxruntime_cannot_run_is_told_in_one_line(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), Halved(), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="not written: onnxruntime cannot run what torch exports"):
        export_onnx(tmp_path / "m.onnx", classifier(net), images=make_images())
    assert not (tmp_path / "m.onnx").exists()


def test_plain_weights_are_exported_where_the_recipe_forgets_nothing(tmp_path):
    torch.save(build_model("small-cnn", classes=10, colours=1).state_dict(), tmp_path / "plain.pt")
    recipe = load_recipe("digits", ["unlearn.forget=[]", f'model.weights="{tmp_path / "plain.pt"}"'])
    assert export_weights(recipe, tmp_path / "plain.onnx") < 1e-4
