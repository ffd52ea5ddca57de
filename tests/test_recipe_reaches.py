"""Each key of a recipe reaches what it is for, and what is kept is of it."""

import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import classifier, make_images, make_net, write_set
from fedunlearn.checkpoint import read_weights
from fedunlearn.data.splits import Splits
from fedunlearn.errors import RecipeError
from fedunlearn.federation.privacy import Privacy
from fedunlearn.models import build_model
from fedunlearn.run import experiment as set_up
from fedunlearn.run import inputs, kept, machine
from fedunlearn.run.estimate import images_to_train
from fedunlearn.run.experiment import holds_validation, network_of, new_model, prepare, save_model
from fedunlearn.run.inputs import fingerprint, read_data, share_out
from fedunlearn.run.kept import cached, most_named
from fedunlearn.run.recipe import Recipe, load_recipe
from fedunlearn.training.compute import Compute
from fedunlearn.training.sgd import Training


def tiny(tmp_path, *said):
    return load_recipe(str(write_set(tmp_path)), said)


def test_shares_and_validation_images_are_drawn_by_the_seed_of_the_federation(tmp_path, monkeypatch):
    asked = []

    def told(images, *rest, seed, **how):
        asked.append(seed)
        return {"a": images}, {}

    monkeypatch.setattr(inputs, "partition", told)
    monkeypatch.setattr(inputs, "hold_out", told)
    share_out(tiny(tmp_path, "federation.seed=3"), make_images())
    assert asked == [3, 3]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", ["images", "labels", "groups", "classes", "mean", "std"])
def test_a_fingerprint_is_of_all_that_images_are(part, name):
    splits = [replace(make_images(30, seed=k), groups=torch.arange(30)) for k in (0, 1)]
    other = {"classes": ("a", "b", "c"), "mean": (0.5,), "std": (0.5,)}.get(name)
    before = fingerprint(Splits(*splits))
    splits[part] = replace(splits[part], **{name: getattr(splits[part], name).flip(0) if other is None else other})
    assert fingerprint(Splits(*splits)) != before


def test_a_mean_without_a_deviation_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"data.mean and data.std, a number per colour of each"):
        read_data(tiny(tmp_path, "data.mean=[0.5]"))


def test_a_recipe_s_settings_of_training_are_those_that_clients_train_by():
    said = ["lr=0.3", "batch_size=7", "local_epochs=2.0", "momentum=0.4", "weight_decay=0.01", "label_smoothing=0.2"]
    recipe = load_recipe("digits", [f"train.{one}" for one in said] + ["train.augment=['crop']"])
    expected = Training(0.3, 7, 2.0, 0.4, 0.01, label_smoothing=0.2, augment=("crop",))
    assert recipe.training() == expected
    own = recipe.unlearn
    assert recipe.repair() == replace(expected, lr=own.lr, local_epochs=own.local_epochs)


def test_the_rules_of_a_recipe_are_those_of_its_clients():
    said = ["privacy.min_count=4", "privacy.clip=2.0", "privacy.noise=0.5", "unlearn.sample=0"]
    assert load_recipe("digits", said).rules() == Privacy(4, 2.0, 0.5, min_images=1)


def test_means_of_clients_are_refused_under_secure_aggregation():
    said = ["privacy.secure=true", "federation.engine=flower", "unlearn.mean_of_clients=true"]
    with pytest.raises(RecipeError, match=r"privacy.secure hides what unlearn.mean_of_clients"):
        load_recipe("digits", said)


def test_a_longer_deadline_is_the_same_work():
    one, other = (load_recipe("digits", said) for said in ([], ["federation.deadline=9"]))
    assert one.digest() == other.digest()


def test_defaults_are_those_of_the_recipe_page():
    page, seen, table = Path(kept.__file__).parents[3] / "docs" / "recipes.md", 0, ""
    for line in page.read_text("utf-8").split("```toml")[1].split("```")[0].splitlines():
        if line.startswith("["):
            table = line[1:].partition("]")[0]
        if told := re.match(r'(\w+) = .*?#\s*default ("[^"]*"|\[\]|[^\s,;:]+)', line):
            key, text = told[1], told[2].rstrip(".")
            field = Recipe.model_fields[table].annotation.model_fields[key]
            default, seen = field.get_default(call_default_factory=True), seen + 1
            if text in ("none", "empty", "[]"):
                assert not default, (table, key)
            else:
                assert default == tomllib.loads(f"value = {text}")["value"], (table, key)
    assert seen > 50


def test_who_holds_fewer_kept_images_than_its_rules_ask_for_is_not_asked(tmp_path):
    experiment = prepare(tiny(tmp_path))
    table = torch.tensor([[4, 0, 50, 0], [2, 3, 50, 0], [0, 0, 50, 0]])
    here = replace(experiment, table=table)
    assert here.keepers() == ("client-0", "client-1")
    sites = experiment.recipe.model_copy(
        update={"federation": experiment.recipe.federation.model_copy(update={"engine": "flower"})}
    )
    assert replace(here, recipe=sites).keepers() == ("client-1",)


def test_audit_images_are_as_many_and_drawn_by_the_seed_that_the_recipe_says(tmp_path, monkeypatch):
    monkeypatch.setattr(set_up, "audit_images", lambda train, test, **how: how)
    said = ("audit.images=33", "audit.lr=0.07", "federation.seed=3")
    expected = {"forget": (2,), "per_class": 33, "seed": 3, "lr": 0.07}
    assert prepare(tiny(tmp_path, *said)).audit_images() == expected


def test_channels_are_ranked_by_the_hook_and_the_options_of_the_recipe(tmp_path):
    said = ("criterion=tf_idf", "reference=channel", "smoothing=0.0", "hook=convolution")
    ranking = prepare(tiny(tmp_path, *(f"unlearn.{one}" for one in said))).ranking()
    assert ranking.hook == "convolution"
    assert ranking.criterion.keywords == {"reference": "channel", "smoothing": 0.0}


def test_each_repair_does_what_it_says(tmp_path):
    found = {}
    for name in ("none", "reestimate", "finetune"):
        repair = prepare(tiny(tmp_path, f"unlearn.repair={name}")).repair()
        found[name] = (repair.batch_norm, repair.rounds)
    assert found == {"none": (False, 0), "reestimate": (True, 0), "finetune": (True, 2)}


def test_fresh_weights_are_drawn_by_the_seed_that_is_asked_for():
    recipe = load_recipe("digits")
    one, again, other = (new_model(recipe, make_images(), seed=seed).module.state_dict() for seed in (1, 1, 2))
    name = next(name for name, tensor in one.items() if tensor.ndim == 4)
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])


def test_the_network_of_a_recipe_has_its_shortcut():
    recipe = load_recipe("digits", ["model.name=resnet20", "model.shortcut=B"])
    names = new_model(recipe, make_images(), seed=0).module.state_dict().keys()
    assert names == build_model("resnet20", classes=3, colours=1, shortcut="B").state_dict().keys()


def test_settings_are_not_tried_where_one_of_the_classes_has_no_validation_image():
    held = make_images(30)
    assert holds_validation(SimpleNamespace(forget=(0, 1), validation={"a": held}))
    assert not holds_validation(SimpleNamespace(forget=(0, 1), validation={"a": held.only([0])}))


def test_a_network_whose_function_makes_other_layers_now_is_another():
    def of(net):
        recipe = SimpleNamespace(model=SimpleNamespace(name="nets:tiny"))
        return network_of(SimpleNamespace(recipe=recipe, model=classifier(net)))["network"]["nets:tiny"]

    other = make_net()
    other[2] = nn.ELU()
    assert of(make_net()) == of(make_net(seed=1)) != of(other)


def test_a_model_of_a_run_is_written_with_its_shortcut(tmp_path):
    images = make_images(6)
    recipe = load_recipe("digits", ["model.shortcut=B"])
    done = SimpleNamespace(splits=Splits(images, images), recipe=recipe, earlier=())
    save_model(tmp_path / "m.safetensors", classifier(make_net()), done)
    assert read_weights(tmp_path / "m.safetensors").shortcut == "B"


def test_a_kept_model_is_of_its_training_its_network_and_its_device(monkeypatch):
    said = ("train.lr=0.2", "model.shortcut=B", "model.name=resnet20", "data.validation=0.2", "federation.seed=1")
    places = [cached(load_recipe("digits", one), (9,), "data", 1) for one in ((), *((own,) for own in said))]
    assert len(set(places)) == 1 + len(said)
    monkeypatch.setattr(kept, "own_device", lambda: torch.device("cuda"))
    assert cached(load_recipe("digits"), (9,), "data", 1) not in places


def test_a_kept_model_is_of_the_code_that_builds_it_too(monkeypatch, tmp_path):
    shutil.copytree(Path(kept.__file__).parents[1], tmp_path / "copy")
    monkeypatch.setattr(kept, "_PACKAGE", tmp_path / "copy")
    places = {cached(load_recipe("digits"), (9,), "data", 1)}
    for changed in ("models.py", "seeding.py", "federation/rounds.py", "run/inputs.py", "data/partition.py"):
        with (tmp_path / "copy" / changed).open("a") as file:
            file.write("# other code\n")
        places.add(cached(load_recipe("digits"), (9,), "data", 1))
    assert len(places) == 6


def test_of_several_classes_the_one_that_is_named_most_tells_that_a_model_was_not_retrained():
    net = make_net()
    with torch.no_grad():
        net[-1].bias[1] = 1e4
    assert most_named(classifier(net), make_images(), (0, 1)) == 1


def test_what_a_probe_found_is_of_one_network(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDUNLEARN_CACHE", str(tmp_path))
    best, probed = Compute("float32", "channels_last", 1), []
    monkeypatch.setattr(machine, "probe", lambda module, *rest, **how: probed.append(module) or (best, [(best, 1.0)]))
    for net in (make_net(), make_net(seed=1), make_net(classes=4)):
        splits, recipe = Splits(make_images(), make_images()), load_recipe("digits")
        machine._probed(SimpleNamespace(splits=splits, recipe=recipe, model=classifier(net)))
    assert len(probed) == 2


def test_nothing_that_is_given_is_counted_as_training(tmp_path):
    experiment = prepare(tiny(tmp_path, "unlearn.forget=[1, 2]"))
    assert images_to_train(replace(experiment, weights=object()), "train") == 0
    given = load_recipe(str(tmp_path / "tiny.toml"), [f'audit.models="{tmp_path}"'])
    assert images_to_train(replace(experiment, recipe=given), "audit") == 0
    jointly = load_recipe(str(tmp_path / "tiny.toml"), ["unlearn.forget=[1, 2]", "unlearn.jointly=true"])
    saved = images_to_train(experiment, "unlearn") - images_to_train(replace(experiment, recipe=jointly), "unlearn")
    assert saved == pytest.approx(int(experiment.table.sum()) / 3)  # one measurement, by a third of training
