"""Weights on disk: what is understood, and what would load as something that it is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from conftest import classifier, logits, make_images, make_net
from fedunlearn.checkpoint import load_weights, read_weights, save_checkpoint
from fedunlearn.errors import ModelError

IMAGES = torch.ones(1, 1, 8, 8)


def loaded(state, path):
    """Write ``state`` and load it into a net of other weights."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return load_weights(classifier(make_net(seed=4)), read_weights(path)).module


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_prefixes_of_wrappers_are_understood(net, tmp_path, prefix, suffix):
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    assert logits(loaded(state, tmp_path / f"w{suffix}"), IMAGES).equal(logits(net, IMAGES))


def test_an_averaged_model_is_understood(net, tmp_path):
    state = torch.optim.swa_utils.AveragedModel(net).state_dict()
    assert logits(loaded(state, tmp_path / "w.pt"), IMAGES).equal(logits(net, IMAGES))


def test_a_model_that_has_a_part_of_a_wrapper_s_name_keeps_it(net, tmp_path):
    held = nn.ModuleDict({"model": net})
    held.forward = held["model"]
    torch.save(held.state_dict(), tmp_path / "w.pt")
    other = nn.ModuleDict({"model": make_net(seed=4)})
    other.forward = other["model"]
    found = load_weights(classifier(other), read_weights(tmp_path / "w.pt"))
    assert found.module.state_dict()["model.0.weight"].equal(net.state_dict()["0.weight"])


def test_another_prefix_is_told_how_to_be_stripped(net, tmp_path):
    state = {f"ema.{name}": tensor for name, tensor in net.state_dict().items()}
    with pytest.raises(ModelError, match=r"begin with 'ema.': save \{name.removeprefix\('ema.'\): tensor for") as told:
        loaded(state, tmp_path / "w.pt")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("first", [True, False])
def test_two_models_in_one_file_are_refused_in_either_order(net, tmp_path, first):
    state = net.state_dict()
    wrapped = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    with pytest.raises(ModelError, match=r"holds both '.*0.weight' and '.*0.weight': two models in one file"):
        loaded(state | wrapped if first else wrapped | state, tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("type", "name"), [(torch.int8, "int8"), (torch.bool, "bool"), (torch.uint8, "uint8")])
def test_codes_and_masks_are_no_weights(net, tmp_path, type, name, suffix):
    state = net.state_dict() | {"3.weight": net[3].weight.detach().sign().to(type)}
    with pytest.raises(ModelError, match=rf"3.weight: the model has float32, the file {name}: quantised weights or"):
        loaded(state, tmp_path / f"w{suffix}")


def test_masks_beside_weights_are_told_how_to_become_one_tensor(tmp_path):
    masked = make_net()
    prune.l1_unstructured(masked[3], "weight", amount=0.5)
    with pytest.raises(ModelError, match=r"it has 3.weight_mask, 3.weight_orig instead, .*torch.nn.utils.prune.remove"):
        loaded(masked.state_dict(), tmp_path / "w.pt")


@pytest.mark.parametrize("type", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_float_are_understood(net, tmp_path, type):
    state = {name: t.to(type) if t.is_floating_point() else t for name, t in net.state_dict().items()}
    torch.testing.assert_close(
        logits(loaded(state, tmp_path / "w.pt"), IMAGES), logits(net, IMAGES), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (torch.Tensor.to_sparse, "sparse"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to("meta"), "meta"),
    ],
)
def test_tensors_that_hold_no_plain_numbers_are_refused_in_one_line(net, tmp_path, change, kind):
    state = net.state_dict() | {"3.weight": change(net[3].weight.detach())}
    with pytest.raises(ModelError, match=f"3.weight is a {kind} tensor, expected a dense one of floats") as told:
        loaded(state, tmp_path / "w.pt")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("type", "value"), [(torch.float32, float("nan")), (torch.float16, 1e6), (torch.float64, 1e300)], ids=str
)
def test_weights_that_are_not_finite_are_refused_by_name(net, tmp_path, type, value):
    weight = net[3].weight.detach().to(torch.float64)
    weight[0, 0, 0, 0] = value  # too large for float16, and for the float32 of the model
    with pytest.raises(ModelError, match=r"3.weight has 1 values of 432 that are NaN or infinite"):
        loaded(net.state_dict() | {"3.weight": weight.to(type)}, tmp_path / "w.pt")


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net"])
def test_the_state_is_found_beside_what_else_a_training_saves(net, tmp_path, key):
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    beside = {"metrics": {"accuracy": torch.tensor(0.9)}} | ({} if key == "net" else {"ema": make_net().state_dict()})
    state = {"epoch": 3, key: net.state_dict(), "optimizer": optimiser.state_dict(), "best": 0.9, **beside}
    assert logits(loaded(state, tmp_path / "w.pt"), IMAGES).equal(logits(net, IMAGES))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_code_is_never_run(net, tmp_path):
    torch.jit.save(torch.jit.trace(net, IMAGES), tmp_path / "w.pt")
    with pytest.raises(
        ModelError, match=r"w.pt: the file is a TorchScript archive, whose code is never run: save model"
    ):
        read_weights(tmp_path / "w.pt")
    torch.save(net, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds objects besides tensors, which are never run; save model"):
        read_weights(tmp_path / "w.pt")


def test_objects_beside_tensors_are_refused_in_one_line(net, tmp_path):
    torch.save({"state_dict": net.state_dict(), "net": net}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds objects besides tensors, which are never run; save model") as told:
        read_weights(tmp_path / "w.pt")
    assert "\n" not in str(told.value)
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"expected tensors by name, .*, got a value of type Tensor: save"):
        read_weights(tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"the weights cannot be read \(EOFError\); fetch the file again"):
        read_weights(tmp_path / "w.pt")
    torch.save({"epoch": 3, "weights": {"first": {}}}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"under one of its keys, but 'epoch' is of type int: save model"):
        read_weights(tmp_path / "w.pt")
    torch.save({"net": net.state_dict(), "ema": net.state_dict(), "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"the states of several models \(net, ema\): save the one"):
        read_weights(tmp_path / "w.pt")
    torch.save({"state_dict": {"0.weight": torch.ones(1), "version": 3}, "ema": net.state_dict()}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"but 'version' is of type int: save model.state_dict"):
        read_weights(tmp_path / "w.pt")
    torch.save({}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"but 'nothing' is of type NoneType: save model.state_dict"):
        read_weights(tmp_path / "w.pt")
    torch.save({0: torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="expected tensors by name, got other keys"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 1, 1], r"a different class for each output row, got \[0, 1, 1\]"),
        ([0, 1, -1], "a different class for each output row"),
        ([0, 1, 2.5], "a different class for each output row"),
        ([0, 1], "the label map names 2 classes, the model has 3 output rows"),
        ([0, 1, 2, 3], "the label map names 4 classes, the model has 3 output rows"),
    ],
)
def test_a_label_map_that_was_changed_is_refused(net, tmp_path, labels, text):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, classifier(net), images=make_images(), architecture={"name": "mine", "shortcut": "A"})
    state = dict(read_weights(path).state)
    about = {
        "schema": 1,
        "labels": labels,
        "plan": {"schema": 1, "shapes": {}, "kept": {}, "pruned": {}, "left_out": {}},
        "mean": [0.3],
        "std": [0.25],
        "architecture": {},
    }
    save_file(state, path, {"fedunlearn": json.dumps(about)})
    with pytest.raises(ModelError, match=text):
        load_weights(classifier(make_net()), read_weights(path))


def test_a_checkpoint_of_another_version_is_refused(net, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, classifier(net), images=make_images(), architecture={"name": "mine", "shortcut": "A"})
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fedunlearn"])
    save_file(dict(read_weights(path).state), path, {"fedunlearn": json.dumps(about | {"schema": 2})})
    with pytest.raises(ModelError, match="expected a checkpoint of schema 1, got 2: it was written by another version"):
        read_weights(path)


def test_a_checkpoint_goes_where_it_can_be_read_again(net, tmp_path):
    (tmp_path / "file").touch()
    for name, text in (
        ("m.pt", "end its name in .safetensors"),
        ("no/m.safetensors", r"no/m.safetensors: cannot be written \(No such file or directory\): give a place"),
        ("file/m.safetensors", r"cannot be written \(Not a directory\): give a place in a folder that is there"),
    ):
        with pytest.raises(ModelError, match=text):
            save_checkpoint(tmp_path / name, classifier(net), images=make_images(), architecture={})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_whose_rows_do_not_fit_or_whose_weights_are_not_finite_is_not_written(net, tmp_path):
    path, about = tmp_path / "m.safetensors", {"name": "mine", "shortcut": "A"}
    with pytest.raises(ModelError, match="the model has 3 output rows, the data 4 classes"):
        save_checkpoint(path, classifier(net), images=make_images(classes=4), architecture=about)
    with pytest.raises(ModelError, match=r"must be classes 0 .. 2, got -1"):
        save_checkpoint(path, classifier(net, labels=(0, 1, -1)), images=make_images(), architecture=about)
    net[4].running_var[2] = torch.inf
    with pytest.raises(ModelError, match=r"4.running_var has 1 values of 8 that are NaN or infinite"):
        save_checkpoint(path, classifier(net), images=make_images(), architecture=about)
    assert not path.exists()


def test_tensors_that_are_parts_of_one_are_written(tmp_path):
    net = make_net(classes=4)
    storage = torch.arange(6.0)
    net.register_buffer("low", storage[:4])
    net.register_buffer("high", storage[2:])
    save_checkpoint(tmp_path / "m.safetensors", classifier(net), images=make_images(8, 4), architecture={"name": "x"})
    state = read_weights(tmp_path / "m.safetensors").state
    assert (state["low"].tolist(), state["high"].tolist()) == ([0, 1, 2, 3], [2, 3, 4, 5])


def test_rows_are_numbered_by_the_classes_of_the_images_that_are_given(net, tmp_path):
    """Data that lists its classes otherwise would have a class that is known measured as forgotten."""
    images = make_images(30)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, classifier(net), images=images, architecture={})
    other = replace(images, classes=(images.classes[2], images.classes[0], images.classes[1]))
    assert load_weights(classifier(make_net()), read_weights(path)).labels == (0, 1, 2)
    assert load_weights(classifier(make_net()), read_weights(path), images=other).labels == (1, 2, 0)


def test_weights_without_permission_are_refused_as_such(tmp_path, monkeypatch):
    torch.save(make_net().state_dict(), tmp_path / "w.pt")

    def closed(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(ModelError, match=r"w.pt: cannot be read \(Permission denied\); check its permissions"):
        read_weights(tmp_path / "w.pt")


def test_of_two_states_in_a_file_the_one_that_is_named_so_is_taken(tmp_path):
    net = make_net()
    torch.save({"model": make_net(seed=4).state_dict(), "state_dict": net.state_dict()}, tmp_path / "w.pt")
    found = load_weights(classifier(make_net(seed=5)), read_weights(tmp_path / "w.pt")).module
    assert torch.equal(found[0].weight, net[0].weight)
