"""Readers on small files in the official formats, and on the real sets where they are at hand."""

import importlib.util
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import make_images
from fedunlearn.channels.plan import Classifier
from fedunlearn.checkpoint import load_weights, read_weights
from fedunlearn.data import readers
from fedunlearn.data.images import pixel_statistics
from fedunlearn.data.npz import load_npz, read_npz
from fedunlearn.data.partition import partition
from fedunlearn.data.readers import READERS, read_cifar10, read_cifar100, read_digits, read_folder, read_mnist
from fedunlearn.data.splits import apart, held_out
from fedunlearn.errors import DataError
from fedunlearn.models import build_model
from fedunlearn.seeding import generator

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_cifar10(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        batch = {
            b"data": draw.integers(0, 256, (count, 3072), dtype=np.uint8),
            b"labels": [int(n) for n in draw.integers(0, 10, count)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {b"label_names": [b"airplane", *(f"class {k}".encode() for k in range(1, 10))]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def write_mnist(folder: Path, count: int = 5) -> Path:
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        pixels = np.arange(count * 784, dtype=np.uint32).astype(np.uint8).tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, count, 28, 28) + pixels)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + bytes(range(count)))
    np.savez(folder / "writers.npz", train=np.arange(count) // 2, test=np.arange(count))
    return folder


def write_pictures(folder: Path, *, splits: tuple[str, ...] = (".",), side: int = 6) -> Path:
    for split in splits:
        for label, name in enumerate(("Äpfel", "pears")):
            (folder / split / name).mkdir(parents=True)
            for k in range(5):
                Image.new("RGB", (side, side), (40 * k, 100 * label, 7)).save(folder / split / name / f"{k}.png")
    return folder


def test_digits_are_real_and_a_fifth_of_each_class_is_for_testing():
    train, test = read_digits()
    assert (len(train), len(test)) == (1438, 359)
    assert train.shape == (1, 8, 8)
    assert int(train.images.max()) == 255
    assert all(abs(n - 36) <= 1 for n in test.counts().tolist())


def test_cifar10_is_read_from_the_folder_or_from_above_it(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    train, test = read_cifar10(tmp_path, official=False)
    assert (len(train), len(test)) == (30, 6)
    assert train.classes[0] == "airplane"
    batch = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_2").read_bytes(), encoding="bytes")
    assert train.images[6, 2, 1, 3] == batch[b"data"][0].reshape(3, 32, 32)[2, 1, 3]
    assert train.labels[6] == batch[b"labels"][0]
    assert len(read_cifar10(tmp_path / "cifar-10-batches-py", official=False).train) == 30


def test_the_official_names_are_in_their_order(tmp_path):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    path = tmp_path / "batches.meta"
    for protocol in (2, 4):  # the files of several sources differ, their names do not
        path.write_bytes(pickle.dumps({b"label_names": [name.encode() for name in names]}, protocol=protocol))
        assert readers._names(path, b"label_names", readers.CIFAR10_NAMES_MD5) == tuple(names)
    names[3], names[9] = names[9], names[3]
    path.write_bytes(pickle.dumps({b"label_names": [name.encode() for name in names]}))
    assert readers._names(path, b"label_names", None) == tuple(names)
    with pytest.raises(DataError, match="the classes have other names, or another order, than the official ones"):
        readers._names(path, b"label_names", readers.CIFAR10_NAMES_MD5)


def test_cifar100_gives_fine_labels(tmp_path):
    for name in ("train", "test"):
        batch = {
            b"data": np.zeros((2, 3072), np.uint8),
            b"fine_labels": [99, 3],
            b"coarse_labels": [1, 1],
        }
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {b"fine_label_names": [f"fine {k}".encode() for k in range(100)]}
    (tmp_path / "meta").write_bytes(pickle.dumps(names, protocol=2))
    train, _ = read_cifar100(tmp_path, official=False)
    assert train.labels.tolist() == [99, 3]
    assert train.classes[99] == "fine 99"


def test_mnist_comes_with_its_writers_as_groups(tmp_path):
    train, _ = read_mnist(write_mnist(tmp_path / "mnist"), official=False)
    assert train.groups.tolist() == [0, 0, 1, 1, 2]
    assert list(partition(train, by="group")) == ["group-0", "group-1", "group-2"]
    assert int(train.images[1, 0, 0, 1]) == 785 % 256


def test_a_folder_of_images_may_have_spaces_and_letters_beyond_ascii(tmp_path):
    train, test = read_folder(write_pictures(tmp_path / "meine Früchte"))
    assert train.classes == ("pears", "Äpfel")
    assert (len(train), len(test)) == (8, 2)
    assert read_folder(tmp_path / "meine Früchte", size=4).train.shape == (3, 4, 4)


def test_a_folder_may_hold_its_own_split(tmp_path):
    train, test = read_folder(write_pictures(tmp_path, splits=("train", "test")))
    assert (len(train), len(test)) == (10, 10)
    assert test.mean == train.mean


def npz_arrays(**change):
    arrays = {
        "x_train": np.zeros((4, 5, 5), np.uint8),
        "y_train": np.array([0, 1, 2, 1]),
        "x_test": np.ones((2, 5, 5), np.uint8),
        "y_test": np.array([0, 2]),
    }
    return {name: value for name, value in (arrays | change).items() if value is not None}


def test_npz_with_colours_classes_and_groups(tmp_path):
    np.savez(
        tmp_path / "set.npz",
        **npz_arrays(
            x_train=np.arange(4 * 5 * 5 * 3, dtype=np.uint32).astype(np.uint8).reshape(4, 5, 5, 3),
            x_test=np.zeros((2, 5, 5, 3), np.uint8),
            classes=np.array(["a", "b", "c"]),
            groups_train=np.array([3, 3, 4, 4]),
        ),
    )
    train, test = read_npz(tmp_path / "set.npz")
    assert train.shape == (3, 5, 5)
    assert train.classes == ("a", "b", "c")
    assert train.images[0, :, 0, 1].tolist() == [3, 4, 5]
    assert train.groups.tolist() == [3, 3, 4, 4]
    assert test.groups is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"y_test": None}, "y_test is missing"),
        ({"x_train": np.zeros((4, 5, 5))}, "x_train must be uint8 with 3 or 4 axes, got float64"),
        ({"y_train": np.zeros(3, int)}, "y_train must be 4 whole numbers"),
        ({"x_train": np.array([object()])}, "expected an .npz of plain arrays, but"),
        ({"x_train": np.zeros((4, 5, 5), np.uint16)}, r"got uint16 of shape \(4, 5, 5\): scale pixels to 0 .. 255"),
        ({"y_train": np.array([[0], [1], [2], [1]])}, r"got int64 of shape \(4, 1\): use y_train.ravel\(\)"),
        ({"y_test": np.eye(2, dtype=int)}, r"of shape \(2, 2\): of one-hot labels, use y_test.argmax\(1\)"),
        ({"y_train": np.array(["a", "b", "c", "a"])}, "got <U1 .*: number the classes from 0 and store their names"),
        ({"y_train": np.array([0.0, 1, 2, 1])}, r"y_train must be 4 whole numbers, one per image, got float64"),
        (
            {"y_train": np.array([1, 2, 3, 2])},
            r"expected labels 0 .. 2, for 3 different ones in y_train, y_train holds 3:",
        ),
        (
            {"y_train": np.array([0, 1, 10**6, 1])},
            r"expected labels 0 .. 2, .* y_train holds 1000000: number the classes",
        ),
        ({"y_train": np.array([0, 1, 2**64 - 1, 1], np.uint64)}, r"y_train holds 18446744073709551615: number"),
        (
            {"y_train": np.array([-1, 0, 1, 1])},
            r"expected labels 0 .. 2, .* y_train holds -1: number the classes from 0",
        ),
        ({"y_test": np.array([0, 3])}, r"y_test holds 3: number .* without a gap, or store a name of every class as"),
        ({"y_test": np.array([0, -1]), "classes": np.array(["a", "b", "c"])}, r"set.npz: labels must lie in 0 \.\. 2"),
        ({"classes": np.array(["a", "a", "b"])}, "set.npz: the names of the classes must differ, 'a' is there twice"),
        ({"classes": np.array([["a", "b", "c"]])}, r"classes must be a list of names, one per class, got <U1 of shape"),
        ({"classes": np.array([b"a", b"b", b"c"])}, r"classes must be a list of names, one per class, got \|S1"),
        (
            {"x_test": np.zeros((2, 6, 5), np.uint8)},
            r"test images of shape \(1, 5, 5\) .* got \(1, 6, 5\): resize them",
        ),
        ({"x_test": np.zeros((0, 5, 5), np.uint8), "y_test": np.zeros(0, int)}, "x_test must hold one image or more"),
        (
            {"x_train": np.zeros((4, 3, 5, 3), np.uint8)},
            r"shape \(4, 3, 5, 3\) does not say which axis the colours are",
        ),
        (
            {"x_train": np.zeros((4, 5, 6, 7), np.uint8)},
            r"shape \(4, 5, 6, 7\) does not say which axis the colours are",
        ),
        ({"groups_test": np.zeros(2)}, "groups_test must be 2 whole numbers, one per image, got float64"),
        ({"groups_train": np.zeros(3, int)}, r"groups_train must be 4 whole numbers, .* of shape \(3,\)"),
    ],
)
def test_bad_npz_files_are_refused(tmp_path, change, text):
    np.savez(tmp_path / "set.npz", **npz_arrays(**change))
    with pytest.raises(DataError, match=text):
        read_npz(tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 16, 3), (3, 16, 16)),
        ((3, 16, 16), (3, 16, 16)),
        ((1, 5, 7), (1, 5, 7)),
        ((5, 7, 4), (4, 5, 7)),
        ((4, 4, 1), (1, 4, 4)),
        ((8, 8, 13), (13, 8, 8)),
        ((13, 8, 8), (13, 8, 8)),
    ],
)
def test_the_axis_of_the_colours_is_found(tmp_path, shape, expected):
    pixels = np.arange(4 * np.prod(shape)).astype(np.uint8).reshape(4, *shape)
    np.savez(tmp_path / "set.npz", **npz_arrays(x_train=pixels, x_test=pixels[:2]))
    train, _ = read_npz(tmp_path / "set.npz")
    assert train.shape == expected
    colour, row, column = expected[0] - 1, 1, 2
    where = (colour, row, column) if shape == expected else (row, column, colour)
    assert train.images[1, colour, row, column] == pixels[(1, *where)]


def test_named_classes_without_images_are_said(tmp_path, caplog):
    np.savez(tmp_path / "set.npz", **npz_arrays(classes=np.array(["a", "b", "c", "d"])))
    train, _ = read_npz(tmp_path / "set.npz")
    assert train.counts().tolist() == [1, 2, 1, 0]
    assert "set.npz: 1 classes have no image to train on (d)" in caplog.text


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_names_anything_but_arrays_is_refused_and_not_run(tmp_path):
    folder = write_cifar10(tmp_path / "set")
    planted = tmp_path / "planted"
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": Planted(planted)}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_3: expected a pickle of numpy arrays.*it names io.open"):
        read_cifar10(folder, official=False)
    assert not planted.exists()


def test_truncated_and_altered_files_are_refused_by_name(tmp_path):
    folder = write_cifar10(tmp_path / "cifar")
    with pytest.raises(DataError, match=r"data_batch_1: expected the official file with MD5 c99cafc.*data.official"):
        read_cifar10(folder)
    whole = (folder / "data_batch_2").read_bytes()
    (folder / "data_batch_2").write_bytes(whole[:-100])
    with pytest.raises(DataError, match="data_batch_2: expected a pickle of numpy arrays"):
        read_cifar10(folder, official=False)
    (folder / "data_batch_2").write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match="data_batch_2: expected a pickled dictionary, got list"):
        read_cifar10(folder, official=False)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": np.zeros((2, 5), np.uint8)}))
    with pytest.raises(DataError, match="data_batch_2: expected data of uint8 rows of 3,072"):
        read_cifar10(folder, official=False)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}))
    with pytest.raises(DataError, match="data_batch_2: expected 2 labels, one per image"):
        read_cifar10(folder, official=False)
    (folder / "batches.meta").write_bytes(pickle.dumps({}))
    (folder / "data_batch_2").write_bytes(whole)
    with pytest.raises(DataError, match=r"batches.meta: expected the list label_names"):
        read_cifar10(folder, official=False)
    (folder / "test_batch").unlink()
    with pytest.raises(DataError, match=r"test_batch: cannot be read .*check --data"):
        read_cifar10(folder, official=False)


def test_truncated_idx_files_are_refused(tmp_path):
    folder = write_mnist(tmp_path / "mnist")
    images = folder / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(DataError, match="idx file with magic number 2051 and 3936 bytes, got 2051 and 3935"):
        read_mnist(folder, official=False)


def test_idx_files_that_do_not_fit_together_are_refused_by_name(tmp_path):
    folder = write_mnist(tmp_path / "mnist")
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 5) + bytes([0, 1, 2, 3, 12]))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: labels must lie in 0 \.\. 9.*got 0 \.\. 12"):
        read_mnist(folder, official=False)
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 0))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: expected one image or more, got the shape \(0,\)"):
        read_mnist(folder, official=False)
    np.savez(folder / "writers.npz", train=np.array([0.5] * 5))
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 5) + bytes(5))
    with pytest.raises(DataError, match=r"writers.npz: train must be 5 whole numbers, one per image, got float64"):
        read_mnist(folder, official=False)


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="expected the folder cifar-10-batches-py with the file data_batch_1"):
        read_cifar10(tmp_path)
    with pytest.raises(DataError, match=r"none: there is nothing at this path; check data.path"):
        read_folder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="expected a folder with one folder of images per class"):
        read_folder(tmp_path / "file")
    with pytest.raises(DataError, match=r"expected an .npz of plain arrays"):
        load_npz(tmp_path / "none.npz")


def test_bad_image_folders_are_refused(tmp_path):
    folder = write_pictures(tmp_path / "set")
    Image.new("RGB", (9, 6)).save(folder / "pears" / "wide.png")
    with pytest.raises(DataError, match=r"wide.png: expected 6 x 6 pixels .* got 9 x 6: set data.size"):
        read_folder(folder)
    (folder / "pears" / "wide.png").write_text("no image")
    with pytest.raises(DataError, match=r"wide.png: expected an image .*, but cannot identify image file"):
        read_folder(folder)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="expected images of the class empty, found none"):
        read_folder(folder)
    with pytest.raises(DataError, match="expected at least two folders, one per class, got 0"):
        read_folder(folder / "empty")
    split = write_pictures(tmp_path / "split", splits=("train", "test"))
    (split / "test" / "pears").rename(split / "test" / "plums")
    with pytest.raises(DataError, match=r"train holds the classes .*pears.*test holds .*plums"):
        read_folder(split)
    other = write_pictures(tmp_path / "sizes", splits=("train",))
    write_pictures(other / "test", side=7)
    with pytest.raises(DataError, match=r"sizes: expected test images of shape \(3, 6, 6\) .* got \(3, 7, 7\): resize"):
        read_folder(other)
    assert read_folder(other, size=6).test.shape == (3, 6, 6)


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    if not (SHARED / "unpack.py").exists():
        pytest.skip("the real image sets (../shared) are not here")
    folder = tmp_path_factory.mktemp("official")
    subprocess.run(
        [sys.executable, SHARED / "unpack.py", folder, "cifar10", "mnist"],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    return folder


def test_the_official_sets_are_read(official):
    train, test = read_cifar10(official)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.counts().tolist() == [5_000] * 10
    pixels = train.images.double().mean((0, 2, 3)) / 255
    torch.testing.assert_close(pixels, torch.tensor(train.mean).double(), rtol=0, atol=1e-4)
    writers = partition(read_mnist(official).train, by="group")
    assert len(writers) == 539
    assert sum(len(images) for images in writers.values()) == 60_000


def test_the_published_weights_fit_resnet20():
    if not (SHARED / "resnet20_akamaster.npz").exists():
        pytest.skip("the published weights (../shared) are not here")
    weights = read_weights(SHARED / "resnet20_akamaster.npz")
    assert weights.shortcut == "A"
    assert weights.mean == (0.485, 0.456, 0.406)
    empty = Classifier(build_model("resnet20", classes=10, colours=3, shortcut="A"), (3, 32, 32))
    model = load_weights(empty, weights)
    assert sum(parameter.numel() for parameter in model.module.parameters()) == 269_722
    assert (model.rows, model.labels, model.plan) == (10, None, empty.plan)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_whether_files_are_the_official_ones_is_asked_where_the_recipe_says_so(monkeypatch, name):
    monkeypatch.setattr(readers, f"read_{name}", lambda path, *, official: official)
    assert [READERS[name](Path(), official, 0) for official in (True, False)] == [True, False]


def test_the_digits_to_test_with_are_the_second_fifth_of_each_in_an_order_that_is_drawn():
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    rows = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    threes = np.round(rows[rows[:, -1] == 3][:, :-1] * (255 / 16)).astype(np.uint8)
    order, fifth = torch.randperm(len(threes), generator=generator(0, "test", "3")), round(len(threes) / 5)
    _, test = read_digits()
    assert test.only([3]).images.flatten(1).tolist() == threes[sorted(order[fifth : 2 * fifth].tolist())].tolist()


@pytest.mark.parametrize("kind", ["npz", "folder", "apart"])
def test_images_are_normalised_by_those_to_train_on_alone(tmp_path, kind):
    images = torch.cat([make_images(8, 2).images, 255 - make_images(8, 2, seed=1).images])
    labels, first = torch.arange(16) % 2, slice(0, 8)
    if kind == "apart":
        train, test = apart(images, labels, ("a", "b"), torch.arange(16) >= 8)
    elif kind == "npz":
        parts = {"x_train": images[:8, 0], "y_train": labels[:8], "x_test": images[8:, 0], "y_test": labels[8:]}
        np.savez(tmp_path / "set.npz", **parts)
        train, test = read_npz(tmp_path / "set.npz")
    else:
        for row, (image, label) in enumerate(zip(images[:, 0].numpy(), labels.tolist())):
            folder = tmp_path / ("train" if row < 8 else "test") / "ab"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{row:02}.png")
        train, test = read_folder(tmp_path)
    expected = pixel_statistics(images[first])
    assert train.mean[0] == test.mean[0] == pytest.approx(expected[0][0])
    assert train.std[0] == test.std[0] == pytest.approx(expected[1][0])


def test_which_images_are_for_testing_does_not_depend_on_the_order_of_the_files():
    images, order = make_images(40, 2), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    found = [
        {
            image.numpy().tobytes()
            for image in held_out(images.images[rows], images.labels[rows], ("a", "b")).test.images
        }
        for rows in (torch.arange(40), order)
    ]
    assert found[0] == found[1]
