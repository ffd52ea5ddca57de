"""A second request: a model that forgot a class before forgets another, and nobody needs the first one's images."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import nets
from conftest import make_images, write_set
from fedunlearn.checkpoint import read_weights
from fedunlearn.console import notes
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import ModelError, PlanError, RunError
from fedunlearn.evidence.folder import RunFolder
from fedunlearn.evidence.pictures import _of_this_request
from fedunlearn.federation.journal import Journal
from fedunlearn.flower.app import built_by, engine_on, held_by
from fedunlearn.flower.client import client_app
from fedunlearn.run.audit_file import Candidate, audit_model
from fedunlearn.run.commands import evaluate_weights, export_weights, run
from fedunlearn.run.experiment import architecture_of, prepare
from fedunlearn.run.inputs import share_out
from fedunlearn.run.recipe import load_recipe
from loopback import Loopback, nodes

NAMES = ("cat", "dog", "owl", "yak")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder in which the run ``one`` forgot the dog, the second of four classes."""
    folder = tmp_path_factory.mktemp("requests")
    recipe = str(write_set(folder, names=NAMES, oracles=3))
    run(load_recipe(recipe, ["unlearn.forget=dog"]), folder / "one", command="unlearn")
    return folder


def second(first, *overrides):
    """Return a recipe that goes on from the model without the dog."""
    weights = f"model.weights={json.dumps(str(first / 'one' / 'model.safetensors'))}"
    return load_recipe(str(first / "tiny.toml"), [weights, "unlearn.forget=yak", *overrides])


def test_images_of_fewer_classes_are_numbered_anew():
    images = LabelledImages(
        torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1),
        torch.tensor([0, 1, 2, 3, 1, 3]),
        NAMES,
        (0.5,),
        (0.5,),
        groups=torch.arange(6),
    )
    own = images.narrowed([1])
    assert own.classes == ("cat", "owl", "yak")
    assert own.labels.tolist() == [0, 1, 2, 2]
    assert own.images.flatten().tolist() == own.groups.tolist() == [0, 2, 3, 5]


def test_who_holds_what_stays_and_only_the_forgotten_images_are_gone(first):
    experiment, whole = prepare(second(first)), prepare(load_recipe(str(first / "tiny.toml")))
    assert experiment.splits.test.classes == ("cat", "owl", "yak")
    assert (experiment.forget, experiment.earlier, experiment.all_classes) == ((2,), (1,), NAMES)
    for part, before in ((experiment.clients, whole.clients), (experiment.validation, whole.validation)):
        for name, images in part.items():
            assert torch.equal(images.images, before[name].without([1]).images)


def test_a_second_run_neither_knows_nor_needs_the_first_class(first, tmp_path, monkeypatch):
    found = run(second(first), tmp_path / "two")
    assert (found["earlier"], found["classes"], found["forget"]) == (["dog"], ["cat", "owl", "yak"], [2])
    assert list(found["original"]["accuracy"]["per_class"]) == ["cat", "owl", "yak"]
    before = json.loads((first / "one" / "result.json").read_text())["unlearned"]
    # What the first run delivered is where the second begins.
    assert found["original"]["parameters"] == before["parameters"]
    weights = read_weights(tmp_path / "two" / "model.safetensors")
    assert (weights.labels, weights.classes) == ((0, 2), ("cat", "owl"))  # numbers of the data
    assert weights.state["linear.weight"].shape[0] == 2
    assert found["numbers"] == [0, 2, 3]
    scores = load_file(tmp_path / "two" / "scores.safetensors")
    plan, before = weights.plan, read_weights(tmp_path / "two" / "original.safetensors").plan
    drawn = _of_this_request(RunFolder.read(tmp_path / "two"), {name: list(own) for name, own in plan.pruned.items()})
    for layer, own in drawn.items():  # as the scores number them, and no more than went now
        assert len(own) == len(plan.pruned[layer]) - len(before.pruned[layer])
        assert set(own) <= set(range(len(scores[layer])))
    retrained = read_weights(tmp_path / "two" / "oracles" / "retrained-1.safetensors")
    assert retrained.state["linear.weight"].shape[0] == 3
    for page in ("report.html", "report.md", "README.md"):
        assert re.search("orgotten before.*dog", (tmp_path / "two" / page).read_text(), re.S), page
    monkeypatch.chdir(tmp_path / "two")
    code = (tmp_path / "two" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    card: dict = {}
    exec(compile(code, "README.md", "exec"), card)  # loads what it describes
    assert sum(own.numel() for own in card["model"].parameters()) == found["unlearned"]["parameters"]

    again = second(first, f"model.weights={json.dumps(str(tmp_path / 'two' / 'model.safetensors'))}")
    for asked in (again, again.model_copy(update={"unlearn": again.unlearn.model_copy(update={"forget": [3]})})):
        accuracy = evaluate_weights(asked)["accuracy"]
        assert accuracy["retain"] == found["unlearned"]["accuracy"]["retain"]

    oracles = sorted((tmp_path / "two" / "oracles").iterdir())
    audited = audit_model(
        second(first),
        tmp_path / "audit",
        Candidate(
            model=tmp_path / "two" / "model.safetensors",
            oracles=oracles,
            original=tmp_path / "two" / "original.safetensors",
        ),
    )
    assert audited["earlier"] == ["dog"]
    for name in ("retain", "probe", "relearn", "neighbours"):
        assert audited["audits"][name] == found["audits"][name]
    assert audited["controls"]["original"]["accuracy"] == found["original"]["accuracy"]


def test_third_and_fourth_requests_go_on_by_the_names_of_the_classes(first, tmp_path):
    run(second(first), tmp_path / "two", command="unlearn")
    weights = f"model.weights={json.dumps(str(tmp_path / 'two' / 'model.safetensors'))}"
    found = run(second(first, weights, "unlearn.forget=0"), tmp_path / "three", command="unlearn")
    assert (found["earlier"], found["classes"], found["forget"]) == (["dog", "yak"], ["cat", "owl"], [0])
    last = read_weights(tmp_path / "three" / "model.safetensors")
    assert (last.labels, last.classes) == ((2,), ("owl",))
    assert "One class stays, which any model names" in notes(found)
    weights = f"model.weights={json.dumps(str(tmp_path / 'three' / 'model.safetensors'))}"
    with pytest.raises(PlanError, match="owl: no other class is left, and at least one must stay"):
        prepare(second(first, weights, "unlearn.forget=owl"))


def test_a_class_is_not_forgotten_twice_and_classes_in_another_order_are_refused(first, tmp_path):
    with pytest.raises(PlanError, match=r"has no output row for class 1 \(dog\), which was forgotten before: give"):
        prepare(second(first, "unlearn.forget=dog"))
    other = str(write_set(tmp_path, names=("yak", "owl", "dog", "cat")))
    weights = f"model.weights={json.dumps(str(first / 'one' / 'model.safetensors'))}"
    with pytest.raises(ModelError, match=r"has output rows for the classes \[3, 1, 0\], expected some of 0 .. 3 in th"):
        prepare(load_recipe(other, [weights, "unlearn.forget=owl"]))


def test_rows_are_told_by_the_names_of_their_classes(first):
    weights = read_weights(first / "one" / "model.safetensors")
    assert weights.numbered(("yak", "owl", "cat")).labels == (2, 1, 0)
    assert weights.numbered(("a", "b", "c")).labels == weights.labels == (0, 2, 3)  # the same classes, called otherwise
    for other in (("a", "b", "c", "d"), ("owl", "yak", "emu")):
        with pytest.raises(ModelError, match="has an output row for the class 'cat', which the data does not have"):
            weights.numbered(other)


def without_dog(first, folder):
    """Write the images without the dog's and return the setting that names the file."""
    arrays = dict(np.load(first / "set.npz"))
    for split in ("train", "test"):
        stay = arrays[f"y_{split}"] != 1
        labels = arrays[f"y_{split}"][stay]
        arrays |= {f"x_{split}": arrays[f"x_{split}"][stay], f"y_{split}": np.where(labels > 1, labels - 1, labels)}
    np.savez(folder / "set.npz", **(arrays | {"classes": np.array(["cat", "owl", "yak"])}))
    return f"data.path={json.dumps(str(folder / 'set.npz'))}"


def test_a_class_by_number_is_refused_where_weights_and_data_count_otherwise(first, tmp_path):
    """The dog was 1, now the owl is: the recipe of the first request would forget the owl, and measure it as U."""
    asked = second(first, without_dog(first, tmp_path), "unlearn.forget=[1]")
    told = r"1 is the number of a class that it has no row for, forgotten before by .*, which counts otherwise than the"
    with pytest.raises(PlanError, match=told):
        evaluate_weights(asked)
    with pytest.raises(PlanError, match=told):
        prepare(asked)
    with pytest.raises(PlanError, match=told):
        audit_model(asked, tmp_path / "audit", Candidate(model=first / "one" / "model.safetensors"))
    original = f"model.weights={json.dumps(str(first / 'one' / 'original.safetensors'))}"
    with pytest.raises(ModelError, match="has an output row for the class 'dog', which the data does not have"):
        prepare(second(first, without_dog(first, tmp_path), original, "unlearn.forget=[1]"))
    other = second(first, without_dog(first, tmp_path), "unlearn.forget=[2]")
    with pytest.raises(PlanError, match=r"2 is the number of the class 'owl' by .*model.safetensors, which counts"):
        prepare(other)  # 2 is the yak now
    export_weights(asked, tmp_path / "model.onnx")  # forgets nothing


def test_a_network_that_takes_no_number_of_classes_is_refused_before_any_work(first, tmp_path, monkeypatch):
    monkeypatch.setattr(nets, "fixed", lambda classes, colours: nets.Tiny(4, colours), raising=False)
    asked = second(first, without_dog(first, tmp_path), 'model.name="nets:fixed"')
    with pytest.raises(ModelError, match=r"'nets:fixed' makes a network of 4 output rows where 3 were asked for"):
        run(asked, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    run(asked, tmp_path / "unlearned", command="unlearn")  # retrains nothing


def test_a_model_of_another_tool_without_the_row_is_evaluated_and_exported(first, tmp_path):
    weights = read_weights(first / "one" / "original.safetensors")
    state = dict(weights.state)
    for name in ("linear.weight", "linear.bias"):
        state[name] = state[name][[0, 2, 3]]
    torch.save(state, tmp_path / "plain.pt")
    colours = [f"data.mean={list(weights.mean)}", f"data.std={list(weights.std)}"]
    given = second(first, f"model.weights={json.dumps(str(tmp_path / 'plain.pt'))}", "unlearn.forget=dog", *colours)
    accuracy = evaluate_weights(given)["accuracy"]
    assert accuracy["forget_row_kept"] is None
    whole = second(
        first, f"model.weights={json.dumps(str(first / 'one' / 'original.safetensors'))}", "unlearn.forget=dog"
    )
    assert accuracy["retain"] >= evaluate_weights(whole)["accuracy"]["retain"]
    assert accuracy["forget"] == 0.0
    export_weights(given, tmp_path / "plain.onnx")


def test_the_class_may_be_gone_from_the_data(first, tmp_path):
    data = without_dog(first, tmp_path)
    found = run(second(first, data), tmp_path / "two", command="unlearn")
    assert "earlier" not in found  # nothing here tells of it
    model = tmp_path / "two" / "model.safetensors"
    assert read_weights(model).classes == ("cat", "owl")

    asked = second(first, data, f"model.weights={json.dumps(str(model))}")
    assert evaluate_weights(asked)["accuracy"]["retain"] == found["unlearned"]["accuracy"]["retain"]
    export_weights(asked, tmp_path / "model.onnx")
    # The recipe of the request before, whose class is gone from the data: nothing of it is there to measure.
    before = second(first, data, f"model.weights={json.dumps(str(model))}", 'unlearn.forget=["dog"]')
    accuracy = evaluate_weights(before)["accuracy"]
    assert accuracy["forget"] is None
    assert accuracy["retain"] is not None
    export_weights(before, tmp_path / "same.onnx")
    given = Candidate(model=model, original=tmp_path / "two" / "original.safetensors")
    audited = audit_model(second(first, data, "audit.oracles=0"), tmp_path / "audit", given)
    assert audited["model"]["accuracy"]["retain"] == found["unlearned"]["accuracy"]["retain"]

    recipe = second(first, data)
    app = client_app(
        lambda own: built_by(recipe, own), lambda own: held_by(recipe, own), rules=lambda own: recipe.rules()
    )
    engine = engine_on(Loopback(nodes(app, recipe.federation.clients)))
    run(recipe, tmp_path / "flower", command="unlearn", engine=engine)
    theirs = read_weights(tmp_path / "flower" / "model.safetensors").state
    assert all(torch.equal(own, theirs[name]) for name, own in read_weights(model).state.items())


def test_a_run_does_not_go_on_when_images_of_an_earlier_class_that_decided_who_holds_what_are_gone(first, tmp_path):
    out, data = tmp_path / "two", tmp_path / "set.npz"
    shutil.copy(first / "set.npz", data)
    recipe = second(first, f"data.path={json.dumps(str(data))}")
    before = prepare(recipe)
    run(recipe, out, command="unlearn")
    arrays = dict(np.load(data))
    stay = np.flatnonzero(arrays["y_train"] != 1)
    half = np.sort(np.concatenate([stay, np.flatnonzero(arrays["y_train"] == 1)[::2]]))
    np.savez(data, **arrays | {f"{name}_train": arrays[f"{name}_train"][half] for name in "xy"})
    after = prepare(recipe)
    assert len(before.splits.train) == len(after.splits.train)  # all images that are left are there
    assert before.fingerprint() != after.fingerprint()  # and with others
    with pytest.raises(RunError, match="data"):
        run(recipe, out, command="unlearn")


def test_a_client_that_held_nothing_but_the_forgotten_class_is_left_out(first, tmp_path):
    arrays = dict(np.load(first / "set.npz"))
    groups = np.where(arrays["y_train"] == 1, 0, 1 + np.arange(len(arrays["y_train"])) % 2)
    np.savez(tmp_path / "set.npz", groups_train=groups, **arrays)
    given = (f"data.path={json.dumps(str(tmp_path / 'set.npz'))}", "federation.partition=group", "federation.clients=0")
    experiment = prepare(second(first, *given))
    assert len(experiment.clients) == len(prepare(load_recipe(str(first / "tiny.toml"), list(given))).clients) - 1
    run(second(first, *given), tmp_path / "two", command="unlearn")


def test_clients_on_flower_give_the_weights_that_clients_of_this_process_give(tmp_path):
    small = ["federation.clients=2", "train.rounds=2", "unlearn.rounds=1", "compute.precision=float32"]
    run(load_recipe("digits", small), tmp_path / "one", command="unlearn")
    weights = f"model.weights={json.dumps(str(tmp_path / 'one' / 'model.safetensors'))}"
    recipe = load_recipe("digits", [*small, weights, "unlearn.forget=4"])
    app = client_app(
        lambda own: built_by(recipe, own), lambda own: held_by(recipe, own), rules=lambda own: recipe.rules()
    )
    run(recipe, tmp_path / "here", command="unlearn")
    run(recipe, tmp_path / "flower", command="unlearn", engine=engine_on(Loopback(nodes(app, 2))))
    states = [read_weights(tmp_path / name / "model.safetensors").state for name in ("here", "flower")]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_client_that_held_nothing_else_keeps_its_place(first):
    recipe = second(first)
    images = make_images(120, 4)
    clients, validation = share_out(recipe, images, (1, 2, 3))
    assert len(clients) == recipe.federation.clients
    assert set(validation) <= set(clients)
    assert all(own.classes == images.classes[:1] for own in clients.values())
    assert prepare(recipe).federation(Journal()).engine.clients == tuple(clients)


def test_a_plan_that_tells_of_any_number_of_classes_is_refused(first, tmp_path):
    weights = read_weights(first / "one" / "model.safetensors")
    shapes = dict(weights.plan.shapes) | {"linear.weight": (3_000_000, 16)}
    recipe = load_recipe(str(first / "tiny.toml"))
    plan = replace(weights.plan, shapes=shapes)
    with pytest.raises(
        ModelError, match="its plan tells of 3000000 output rows, the data has 4 classes: the file was ch"
    ):
        architecture_of(replace(weights, plan=plan), recipe, make_images(8, 4))
