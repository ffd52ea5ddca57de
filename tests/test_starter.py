"""A recipe and a model to start from."""

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_images, write_set
from fedunlearn.errors import DataError, PlanError, RunError
from fedunlearn.run.commands import run
from fedunlearn.run.experiment import check_choice, prepare
from fedunlearn.run.inputs import read_data
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.starter import write_starter

SHIPPED = ("model.name=small-cnn",)  # as the module of the file is not on the path here


@pytest.fixture
def images(tmp_path):
    write_set(tmp_path, names=("ant", "cat", "dog", "elk"))
    return tmp_path / "set.npz"


def test_what_it_writes_runs_as_it_is(images, tmp_path, monkeypatch):
    recipe, found = write_starter(images, "dog", tmp_path / "mine")
    assert len(found) == 120
    monkeypatch.chdir(tmp_path / "mine")
    small = ["federation.clients=3", "train.rounds=1", "unlearn.fraction=0.2", "compute.precision=float32"]
    result = run(load_recipe(str(recipe), small), tmp_path / "out", command="unlearn")
    sys.modules.pop("my_model")
    assert result["forget"] == [2]
    assert load_recipe(str(recipe)).unlearn.fraction == "auto"


def test_a_class_may_be_told_by_its_number_and_is_written_by_its_name(images, tmp_path):
    recipe, _ = write_starter(images, "3", tmp_path / "mine")
    assert load_recipe(str(recipe)).unlearn.forget == ("elk",)


def test_groups_are_spoken_of_where_there_are_some(images, tmp_path):
    assert '"group"' not in write_starter(images, "dog", tmp_path / "none")[0].read_text("utf-8")
    arrays = dict(np.load(images))
    np.savez(tmp_path / "sites.npz", **arrays, groups_train=np.arange(120) % 4, groups_test=np.arange(60) % 4)
    recipe, _ = write_starter(tmp_path / "sites.npz", "dog", tmp_path / "some")
    assert 'partition = "group" and clients = 0 make one of each group' in recipe.read_text("utf-8")
    by_site = prepare(load_recipe(str(recipe), ["federation.partition=group", "federation.clients=0", *SHIPPED]))
    assert len(by_site.clients) == 4


def test_files_that_are_there_stay(images, tmp_path):
    write_starter(images, "dog", tmp_path)
    before = (tmp_path / "recipe.toml").read_text("utf-8")
    with pytest.raises(RunError, match=r"recipe.toml is there already and stays as it is: choose another folder"):
        write_starter(images, "cat", tmp_path)
    (tmp_path / "recipe.toml").unlink()
    with pytest.raises(RunError, match=r"my_model.py is there already"):
        write_starter(images, "cat", tmp_path)
    assert "dog" in before
    assert not (tmp_path / "recipe.toml").exists()


def test_data_or_a_class_that_is_not_there_is_named_and_nothing_written(images, tmp_path):
    with pytest.raises(DataError, match=re.escape("none: expected an .npz or a folder of pictures, found nothing")):
        write_starter(tmp_path / "none", "dog", tmp_path / "mine")
    with pytest.raises(PlanError, match="no class is named 'cow'; the classes are ant, cat, dog, elk"):
        write_starter(images, "cow", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_few_images_are_shared_among_few_clients(images, tmp_path):
    recipe, _ = write_starter(images, "dog", tmp_path / "mine")
    assert load_recipe(str(recipe)).federation.clients == 3  # of 120 images


@pytest.mark.parametrize(("count", "classes"), [(9, 3), (40, 4), (100, 10), (300, 10), (400, 20)])
def test_a_fraction_is_left_to_validation_images_where_some_client_has_them(tmp_path, count, classes):
    made = make_images(count, 4)
    labels = torch.arange(count) % classes
    np.savez(tmp_path / "set.npz", x_train=made.images[:, 0], y_train=labels, x_test=made.images[:, 0], y_test=labels)
    for label in range(classes):
        recipe, _ = write_starter(tmp_path / "set.npz", str(label), tmp_path / f"mine-{label}")
        shutil.copy(recipe.with_name("my_model.py"), tmp_path)
        check_choice(prepare(load_recipe(str(recipe), ["model.name=small-cnn"])))


def test_a_path_that_is_no_text_is_refused_before_anything_is_written(images, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/p\xe9x"))
    folder.mkdir()
    shutil.copy(images, folder)
    with pytest.raises(DataError, match="the path is no UTF-8, as a recipe is: rename the folders in it"):
        write_starter(folder / "set.npz", "dog", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_pictures_of_any_size_begin_with_a_recipe_that_resizes_them(tmp_path, monkeypatch):
    for k in range(40):
        folder = tmp_path / "pictures" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9 + k, 12), (k, 90 * (k % 2), 7)).save(folder / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    path, images = write_starter(Path("pictures"), "a", Path("mine"))
    recipe = load_recipe(str(path))
    assert recipe.data.path == str(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path / "mine")
    assert read_data(recipe).train.shape == images.shape == (3, 32, 32)
    assert (recipe.train.rounds, recipe.unlearn.rounds) == (100, 10)
