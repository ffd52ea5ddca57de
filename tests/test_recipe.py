import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from fedunlearn.channels.plan import ENDS, SCOPES
from fedunlearn.channels.scores import CRITERIA, REFERENCES
from fedunlearn.channels.taps import HOOKS
from fedunlearn.data.batches import AUGMENTATIONS
from fedunlearn.data.partition import PARTITIONS
from fedunlearn.data.readers import READERS
from fedunlearn.engines import ENGINES, Order, carry_out
from fedunlearn.errors import RecipeError
from fedunlearn.models import MODELS, SHORTCUTS
from fedunlearn.run.recipe import SHIPPED, Recipe, load_recipe
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.sgd import SCHEDULES

EXPECTED = ["digits", "mnist-writers"] + [
    f"{data}-{model}"
    for data in ("cifar10", "cifar100")
    for model in ("resnet20", "resnet32", "resnet44", "resnet56", "vgg11", "vgg13", "vgg16", "vgg19")
]


def test_the_shipped_recipes_are_the_documented_ones():
    assert list(SHIPPED) == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_every_shipped_recipe_is_valid_and_names_a_shipped_model(name):
    recipe = load_recipe(name)
    assert recipe.model.name in MODELS
    assert name.endswith(recipe.model.name) or recipe.model.name == "small-cnn"


def test_a_recipe_may_begin_with_a_byte_order_mark_and_name_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = '[data]\nsource = "folder"\npath = "~/pictures"\n[model]\nname = "small-cnn"\n'
    text += "[train]\nrounds = 1\nlr = 0.1\n[unlearn]\nforget = [1]\nfraction = 0.1\n"
    (tmp_path / "mine.toml").write_bytes(text.encode("utf-8-sig"))
    assert load_recipe(str(tmp_path / "mine.toml")).data.path == str(tmp_path / "pictures")
    assert load_recipe("cifar10-resnet20", ["model.weights=~/a.pt"]).model.weights == str(tmp_path / "a.pt")
    assert load_recipe("cifar10-resnet20").model.weights == ""


def test_overrides_are_toml_values_or_bare_words():
    recipe = load_recipe(
        "digits", ["unlearn.fraction=0.2", "unlearn.criterion=margin", "unlearn.forget=3", "train.augment=['flip']"]
    )
    assert (recipe.unlearn.fraction, recipe.unlearn.criterion, recipe.unlearn.forget) == (0.2, "margin", (3,))
    assert recipe.training().augment == ("flip",)
    assert load_recipe("cifar10-resnet20", ["data.path=/a b/ü"]).data.path == "/a b/ü"


def test_the_digest_ignores_where_the_data_lies_and_what_is_not_named():
    one, two = (
        load_recipe("cifar10-resnet20"),
        load_recipe("cifar10-resnet20", ["data.path=elsewhere", "unlearn.fraction=0.2"]),
    )
    assert one.digest("data", "train") == two.digest("data", "train")
    assert one.digest() != two.digest()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("unlearn.fracton=0.2", "unknown recipe key unlearn.fracton, did you mean 'fraction'?"),
        ("unlern.fraction=0.2", "unknown recipe key unlern, did you mean 'unlearn'?"),
        ("trian.rounds=2", "unknown recipe key trian, did you mean 'train'?"),
        ("data.zzz=1", "unknown recipe key data.zzz; known here: source, path, validation, official, size"),
        *((f"unlearn.fraction={f}", f"recipe key unlearn.fraction: .*, got {f}") for f in ("2", "1", "-0.1", "nan")),
        *(
            (f"{key}=best", f"recipe key {key}: Input should be one of {', '.join(table)}, got 'best'")
            for key, table in (
                ("unlearn.criterion", CRITERIA),
                ("data.source", READERS),
                ("unlearn.schedule", SCHEDULES),
            )
        ),
        ("unlearn.end=top", "recipe key unlearn.end: Input should be 'highest' or 'lowest', got 'top'"),
        ("train.augment=flip", "recipe key train.augment: Input should be a valid tuple, got 'flip'"),
        ("federation.participation=0", "recipe key federation.participation: .* got 0"),
        (
            "train.augment=['flip', 'blur']",
            "recipe key train.augment.1: Input should be one of crop, translate, flip, cutout, got 'blur'",
        ),
        ("fraction=1", "--set expects table.key=value, got 'fraction=1'"),
        ("unlearn.fraction", "--set expects table.key=value, got 'unlearn.fraction'"),
    ],
)
def test_bad_keys_and_values_are_refused(override, text):
    with pytest.raises(RecipeError, match=text):
        load_recipe("digits", [override])


@pytest.mark.parametrize("engine", ["ray", "Local", ""])
def test_engines_that_are_not_there_are_refused_before_anything_is_done(tmp_path, engine):
    recipe = load_recipe("digits", [f"federation.engine={engine!r}"])
    with pytest.raises(RecipeError) as error:
        carry_out(Order(command="train", recipe=recipe, out=tmp_path / "run"))
    assert str(error.value) == f"federation.engine must be one of {', '.join(ENGINES)}, got {engine!r}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_address_of_a_superlink_goes_with_the_engine_flower_alone(tmp_path, engine):
    superlink = None if engine == "flower" else "127.0.0.1:9093"
    recipe = load_recipe("digits", [f"federation.engine={engine}"])
    with pytest.raises(RecipeError, match="the engine flower needs --superlink ADDRESS:PORT, and no other engine"):
        carry_out(Order(command="run", recipe=recipe, out=tmp_path / "run", superlink=superlink))
    assert not (tmp_path / "run").exists()


def test_a_target_needs_rounds_that_it_can_end():
    for repair in ("none", "reestimate"):
        with pytest.raises(
            RecipeError, match=rf'ends the rounds of training, and unlearn.repair = "{repair}" has none'
        ):
            load_recipe("digits", ["unlearn.target=0.9", f"unlearn.repair={repair}"])


def test_a_target_needs_validation_images():
    with pytest.raises(RecipeError, match=r"unlearn.target is measured on validation images"):
        load_recipe("digits", ["unlearn.target=0.9", "data.validation=0"])


def test_recipes_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"no shipped recipe 'cifar10-resnt20', did you mean 'cifar10-resnet20'"):
        load_recipe("cifar10-resnt20")
    with pytest.raises(RecipeError, match=r" is a folder: give a recipe, a file that ends in \.toml"):
        load_recipe(str(tmp_path))
    with pytest.raises(RecipeError, match=r"none.toml: there is no such recipe file"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(RecipeError, match="expected a recipe in TOML, but"):
        load_recipe(str(tmp_path / "broken.toml"))
    (tmp_path / "misspelt.toml").write_text('[data]\nsource = "digits"\n[trian]\nrounds = 2\n')
    with pytest.raises(RecipeError, match=r"^unknown recipe key trian, did you mean 'train'\?$"):
        load_recipe(str(tmp_path / "misspelt.toml"))
    (tmp_path / "short.toml").write_text('[data]\nsource = "digits"\n')
    with pytest.raises(RecipeError, match=r"^recipe key model: Field required$"):
        load_recipe(str(tmp_path / "short.toml"))


def test_a_recipe_without_permission_is_refused_as_such(tmp_path, monkeypatch):
    (tmp_path / "closed.toml").write_text("")

    def closed(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.raises(RecipeError, match=r"closed.toml: cannot be read \(Permission denied\); check its permissions"):
        load_recipe(str(tmp_path / "closed.toml"))


def test_the_recipe_page_lists_every_key():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text("utf-8")
    example = tomllib.loads(page.split("```toml")[1].split("```")[0])
    Recipe.model_validate(tomllib.loads(page.split("```toml")[2].split("```")[0]))
    for table, field in Recipe.model_fields.items():
        assert set(example[table]) == set(field.annotation.model_fields), table
    Recipe.model_validate(example)


def test_choices_are_those_of_the_code_they_choose():
    choices = {
        ("federation", "partition"): PARTITIONS,
        ("model", "shortcut"): SHORTCUTS,
        ("unlearn", "reference"): REFERENCES,
        ("unlearn", "hook"): HOOKS,
        ("unlearn", "end"): ENDS,
        ("unlearn", "scope"): SCOPES,
    }
    for (table, key), known in choices.items():
        field = Recipe.model_fields[table].annotation.model_fields[key]
        assert get_args(field.annotation) == tuple(known), key


@pytest.mark.parametrize(
    "override",
    [
        *(f"data.source={name}" for name in READERS),
        *(f"unlearn.criterion={name}" for name in CRITERIA),
        *(f"train.augment=['{name}']" for name in AUGMENTATIONS),
        *(f"federation.engine={name}" for name in ENGINES),
    ],
)
def test_every_row_of_a_table_can_be_named(override):
    load_recipe("digits", [override])


def test_who_adds_a_criterion_has_nothing_to_add_to_the_recipe(monkeypatch):
    monkeypatch.setitem(CRITERIA, "loudest", CRITERIA["margin"])
    assert load_recipe("digits", ["unlearn.criterion=loudest"]).unlearn.criterion == "loudest"
    with pytest.raises(RecipeError, match=f"one of {', '.join(CRITERIA)}, got 'quietest'"):
        load_recipe("digits", ["unlearn.criterion=quietest"])


def test_the_erase_step_of_a_recipe_is_that_of_its_repair():
    recipe = load_recipe("digits", ["erase.complement=0.5", "erase.separation=0.1", "erase.until=0.3"])
    assert recipe.repair().objective == Erasing(0.5, 0.1, 0.25, 0.3)
    assert recipe.training().objective is None
    assert load_recipe("digits").repair().objective is None


def test_the_repair_has_the_weight_decay_of_training_or_its_own():
    recipe = load_recipe("digits", ["train.weight_decay=0.001", "unlearn.weight_decay=0.01"])
    assert (recipe.training().weight_decay, recipe.repair().weight_decay) == (0.001, 0.01)
    assert load_recipe("digits", ["train.weight_decay=0.001"]).repair().weight_decay == 0.001
    with pytest.raises(RecipeError, match=r"recipe key unlearn\.weight_decay: .*, got -1"):
        load_recipe("digits", ["unlearn.weight_decay=-1"])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["erase.until=0.5"], r"\[erase\] has no weight, so that nothing is erased: set erase.complement"),
        (["erase.complement=1", "unlearn.repair=reestimate"], r"the erase step is a part of the repair's rounds"),
    ],
)
def test_an_erase_step_that_would_do_nothing_is_refused(settings, text):
    with pytest.raises(RecipeError, match=text):
        load_recipe("digits", settings)


def test_a_class_is_named_by_text_or_by_a_whole_number(tmp_path):
    assert load_recipe("digits", ["unlearn.forget=true"]).unlearn.forget == ("true",)
    assert load_recipe("digits", ["unlearn.forget=3.0"]).unlearn.forget == ("3.0",)
    assert load_recipe("digits", ["unlearn.forget=[3, 'cat']"]).unlearn.forget == (3, "cat")
    for wrong in ("[true]", "[3.0]", "[1, [2]]"):
        with pytest.raises(
            RecipeError, match="Input should be the number or the name of a class, a name in quotes, got"
        ):
            load_recipe("digits", [f"unlearn.forget={wrong}"])


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        (
            'model = "small-cnn"',
            "model.weights=w.pt",
            "model must be a table of keys, [model], got 'small-cnn': model.we",
        ),
        ("[[data]]", "data.path=x", "data must be a table of keys, [data], got [{}]: data.path cannot be set in it"),
    ],
)
def test_a_key_is_set_in_a_table_alone(tmp_path, text, override, message):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(str(tmp_path / "r.toml"), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/pictures", "the digits come with scikit-learn, and data.path is /pictures: leave it out, or give"),
        ("data.size=32", "data.size resizes the pictures of a folder, and data.source is digits"),
    ],
)
def test_what_the_data_have_no_use_for_is_refused(override, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe("digits", [override])


@pytest.mark.parametrize("key", ["federation.seed", "unlearn.seed"])
def test_a_seed_that_torch_does_not_take_is_refused(key):
    with pytest.raises(RecipeError, match=key):
        load_recipe("digits", [f"{key}=99999999999999999999999"])
