"""Images, batches and partitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_images
from fedunlearn.data.batches import AUGMENTATIONS, batches
from fedunlearn.data.images import LabelledImages, joined, pixel_statistics
from fedunlearn.data.partition import class_table, hold_out, partition
from fedunlearn.errors import DataError


def numbered(count=120, classes=4):
    """Return images that carry their own number, so that each can be told apart."""
    images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return LabelledImages(images, labels, tuple("abcd"[:classes]), (0.0,), (1.0,), torch.arange(count) // 10)


def numbers(images):
    return images.images[:, 0, 0, 0].tolist()


PARTITIONS = [
    {"by": "iid", "clients": 7},
    {"by": "dirichlet", "clients": 5, "alpha": 0.3},
    {"by": "bias", "clients": 8, "bias": 0.45},
    {"by": "bias", "clients": 4, "bias": 1.0},
    {"by": "group"},
    {"by": "group", "clients": 5},
]


@pytest.mark.parametrize("options", PARTITIONS)
def test_every_image_lands_on_exactly_one_client(options):
    shares = partition(numbered(), **options, seed=3)
    assert sorted(n for images in shares.values() for n in numbers(images)) == list(range(120))
    assert list(shares) == sorted(shares)
    for images in shares.values():
        assert len(images) > 0
        assert images.labels.tolist() == [n % 4 for n in numbers(images)]  # labels and groups go with their images
        assert images.groups.tolist() == [n // 10 for n in numbers(images)]


@given(st.integers(1, 30), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_iid_parts_differ_by_at_most_one_image(clients, seed):
    sizes = [len(images) for images in partition(numbered(), by="iid", clients=clients, seed=seed).values()]
    assert sum(sizes) == 120
    assert max(sizes) - min(sizes) <= 1


def test_partitions_repeat_with_their_seed_and_differ_without():
    one, again, other = (partition(numbered(), by="dirichlet", clients=4, alpha=1.0, seed=s) for s in (1, 1, 2))
    assert [numbers(i) for i in one.values()] == [numbers(i) for i in again.values()]
    assert [numbers(i) for i in one.values()] != [numbers(i) for i in other.values()]


def test_clients_are_views_of_one_array():
    shares = list(partition(numbered(), by="iid", clients=4).values())
    assert len({images.images.untyped_storage().data_ptr() for images in shares}) == 1


@pytest.mark.parametrize("bias", [0.25, 0.45, 0.7, 1.0])
def test_the_bias_is_the_share_of_the_preferred_class(bias):
    shares = partition(make_images(4000, 4), by="bias", clients=8, bias=bias)
    for index, images in enumerate(shares.values()):
        assert int(images.counts()[index % 4]) / len(images) == pytest.approx(bias, abs=0.01)


def test_groups_stay_together():
    assert all(len(images.groups.unique()) == 1 for images in partition(numbered(), by="group").values())


def test_hold_out_splits_each_client_and_loses_nothing():
    clients = partition(numbered(), by="dirichlet", clients=4, alpha=0.5)
    train, validation = hold_out(clients, 0.2, seed=1)
    for name, images in clients.items():
        held = numbers(validation[name]) if name in validation else []
        assert sorted(numbers(train[name]) + held) == sorted(numbers(images))
        assert len(held) == round(0.2 * len(images))
    assert class_table(train).shape == (4, 4)
    assert hold_out(clients, 0.0)[1] == {}


def test_hold_out_never_takes_the_last_image():
    one = {"a": numbered().take(slice(0, 1))}
    assert [len(images) for images in hold_out(one, 0.9)[0].values()] == [1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"by": "random"}, "one of iid, dirichlet, bias, group, got 'random'"),
        ({"by": "iid"}, "the iid partition needs a number of clients of at least 1, got None"),
        ({"by": "iid", "clients": 121}, "120 images cannot go to 121 clients"),
        ({"by": "dirichlet", "clients": 3}, "needs alpha above 0, got None"),
        ({"alpha": 0.1, "clients": 3}, "alpha is of the partition dirichlet, and the partition is iid: leave it out"),
        ({"by": "dirichlet", "alpha": 1.0, "bias": 0.5, "clients": 3}, "bias is of the partition bias, and"),
        ({"by": "dirichlet", "clients": 100, "alpha": 1e-3}, "dirichlet with alpha 0.001 left a client empty"),
        ({"by": "bias", "clients": 6, "bias": 0.5}, "clients in a multiple of the 4 classes.*got 6"),
        ({"by": "bias", "clients": 4, "bias": 1.5}, r"needs a share in \[0, 1\], got 1.5"),
        ({"by": "group", "clients": 13}, "there are 12 groups, too few for 13 clients: take 0 for one each"),
    ],
)
def test_bad_partitions_are_refused(options, text):
    with pytest.raises(DataError, match=text):
        partition(numbered(), **options)


def test_half_of_the_pictures_are_mirrored_left_to_right():
    picture = torch.arange(6.0).reshape(1, 1, 2, 3).expand(2000, -1, -1, -1)
    found = AUGMENTATIONS["flip"](picture, torch.Generator().manual_seed(0))
    mirrored = (found == torch.tensor([[2.0, 1, 0], [5, 4, 3]])).all((1, 2, 3))
    assert ((found == picture).all((1, 2, 3)) | mirrored).all()
    assert 0.45 < mirrored.float().mean() < 0.55


def test_a_small_alpha_gives_a_class_to_few_clients_and_a_large_one_to_all():
    images = make_images(4000, 4)
    largest = {}
    for alpha in (0.1, 100.0):
        clients = partition(images, by="dirichlet", clients=4, alpha=alpha, seed=0)
        largest[alpha] = max(int(own.counts().max()) for own in clients.values()) / 1000
    assert largest[0.1] > 0.8
    assert largest[100.0] < 0.35


def test_other_bad_arguments_are_refused(images):
    with pytest.raises(DataError, match="the bias partition leaves client-3 without images"):
        partition(numbered(8).without([3]), by="bias", clients=4, bias=1.0)
    with pytest.raises(DataError, match="needs images with groups"):
        partition(images, by="group")
    with pytest.raises(DataError, match=r"validation share must lie in \[0, 1\), got 1"):
        hold_out({"a": images}, 1.0)
    with pytest.raises(DataError, match="translate mirrors 4 pixels and needs images of more than 4 x 4, got 2 x 2"):
        next(batches(numbered(), 4, augment=("translate",), draw=torch.Generator()))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images": torch.zeros(4, 1, 2, 2)}, "images must be uint8 of shape .*, got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be int64 of shape \(4,\)"),
        (
            {"images": np.zeros((4, 1, 2, 2), np.uint8)},
            "images must be a tensor, got ndarray: torch.as_tensor makes one",
        ),
        (
            {"images": torch.zeros(4, 1, 0, 2, dtype=torch.uint8)},
            r"images must have pixels, got the shape \(4, 1, 0, 2\)",
        ),
        (
            {"images": torch.zeros(4, 16, 16, 3, dtype=torch.uint8), "mean": (0.5,) * 16, "std": (0.5,) * 16},
            r"got \(4, 16, 16, 3\), which looks like .*: use images.permute\(0, 3, 1, 2\)",
        ),
        ({"labels": [0, 1, 2, 0]}, "labels must be a tensor, got list: torch.as_tensor makes one"),
        (
            {"labels": torch.tensor([0, 1, 2, 9])},
            r"labels must lie in 0 \.\. 2, .*, got 0 \.\. 9: count the classes from",
        ),
        ({"classes": ("\u00e9", "b", "e\u0301")}, "names of the classes must differ, 'é' is there twice"),
        ({"classes": ("a", "b", "a")}, "names of the classes must differ, 'a' is there twice: name each class once"),
        ({"classes": "abc"}, "classes must be a tuple of names, one string per class, got 'abc'"),
        ({"classes": (0, 1, 2)}, r"classes must be a tuple of names, one string per class, got \(0, 1, 2\)"),
        ({"mean": (0.1, 0.2)}, r"mean must be a tuple of 1 floats, one value per colour, got \(0.1, 0.2\)"),
        ({"mean": 0.1}, "mean must be a tuple of 1 floats, one value per colour, got 0.1"),
        ({"std": (torch.tensor(1.0),)}, "std must be a tuple of 1 floats"),
        (
            {"mean": (127.0,), "std": (60.0,)},
            r"mean must lie in \[0, 1\] and std .* got mean \(127.0,\) .*: divide by 255",
        ),
        ({"mean": (float("nan"),)}, r"mean must lie in \[0, 1\]"),
        ({"std": (0.0,)}, "std above 0, up to 1"),
        ({"std": (60.0,)}, "std above 0, up to 1"),
        ({"groups": np.zeros(4, int)}, "groups must be a tensor, got ndarray"),
        ({"groups": torch.zeros(2).long()}, r"groups must have shape \(4,\)"),
        ({"groups": torch.zeros(4)}, r"groups must have shape \(4,\), a whole number per image, got torch.float32"),
    ],
)
def test_images_that_do_not_fit_together_are_refused(change, text):
    good = {
        "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 2, 0]),
        "classes": ("a", "b", "c"),
        "mean": (0.5,),
        "std": (0.5,),
    }
    with pytest.raises(DataError, match=text):
        LabelledImages(**{**good, **change})


def test_pixel_statistics_match_a_float_copy():
    pixels = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    mean, std = pixel_statistics(pixels)
    floats = pixels.double() / 255
    assert mean == pytest.approx(floats.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(floats.std((0, 2, 3), unbiased=False).tolist())


def test_a_colour_that_never_changes_does_not_drown_the_others():
    pixels = torch.randint(0, 256, (50, 4, 4, 4), dtype=torch.uint8)
    pixels[:, 3] = 255
    mean, std = pixel_statistics(pixels)
    assert (mean[3], std[3]) == (1.0, 1.0)
    pixels[:, 3] = 254  # in test images: one level off is 1 / 255 off
    found, _ = next(batches(LabelledImages(pixels, torch.zeros(50).long(), ("a",), mean, std), 50))
    assert found[:, 3].unique().tolist() == pytest.approx([-1 / 255])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"classes": ("b", "a", "c", "d")}, "cannot be joined: images whose class 0 is 'b', that of the others 'a'"),
        ({"mean": (0.5,)}, r"cannot be joined: images normalised by mean \(0.5,\), the others by \(0.0,\)"),
        ({"std": (0.5,)}, r"cannot be joined: images normalised by std \(0.5,\), the others by \(1.0,\)"),
        (
            {"images": torch.zeros(120, 1, 2, 3, dtype=torch.uint8)},
            r"joined: images of shape \(1, 2, 3\) in 4 classes, the others \(1, 2, 2\) in 4",
        ),
    ],
)
def test_images_that_mean_different_things_are_not_joined(change, text):
    with pytest.raises(DataError, match=text):
        joined([numbered(), replace(numbered(), **change)])
    assert numbers(joined([numbered(), numbered()])) == numbers(numbered()) * 2


def test_batches_in_order_are_the_normalised_images():
    images = numbered()
    found = torch.cat([batch for batch, _ in batches(images, 50)])
    torch.testing.assert_close(found, images.images.float() / 255)


def test_shuffled_batches_hold_every_image_once_and_a_lone_last_image_joins_the_batch_before():
    images = numbered().take(slice(0, 41))
    drawn = list(batches(images, 20, draw=torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in drawn] == [20, 21]
    seen = torch.cat([batch[:, 0, 0, 0] for batch, _ in drawn]) * 255
    assert sorted(seen.round().int().tolist()) == list(range(41))


def test_a_limit_takes_a_random_part():
    drawn = list(batches(numbered(), 16, limit=24, draw=torch.Generator().manual_seed(0)))
    assert sum(len(labels) for _, labels in drawn) == 24


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_augmentation_draws_once_per_image(name):
    same = torch.rand(1, 2, 32, 32).expand(64, -1, -1, -1) + 0.5
    changed = AUGMENTATIONS[name](same, torch.Generator().manual_seed(0))
    again = AUGMENTATIONS[name](same, torch.Generator().manual_seed(0))
    assert changed.shape == same.shape
    assert changed.equal(again)
    kinds = len({image.numpy().tobytes() for image in changed.contiguous()})
    assert kinds == 2 if name == "flip" else kinds > 20


def test_a_crop_is_a_shifted_copy():
    images = torch.rand(20, 1, 12, 12)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for image, source in zip(AUGMENTATIONS["crop"](images, torch.Generator().manual_seed(0)), padded):
        shifts = [source[:, y : y + 12, x : x + 12] for y in range(9) for x in range(9)]
        assert any(image.equal(shift) for shift in shifts)


def test_cutout_blanks_at_most_sixteen_by_sixteen_pixels():
    blanked = (AUGMENTATIONS["cutout"](torch.ones(50, 1, 40, 40), torch.Generator().manual_seed(0)) == 0).sum((1, 2, 3))
    assert int(blanked.max()) == 256
    assert int(blanked.min()) >= 64


def test_images_print_what_they_are(images):
    assert repr(images) == "LabelledImages(60 images 1x8x8, 3 classes)"


def test_a_translated_image_mirrors_what_is_beside_its_edge():
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    mirrored = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    for image, source in zip(AUGMENTATIONS["translate"](images, torch.Generator().manual_seed(0)), mirrored):
        windows = np.lib.stride_tricks.sliding_window_view(source[0], (8, 8))
        assert (windows == image[0].numpy()).all((2, 3)).sum() >= 1


def test_validation_images_are_drawn_by_the_seed():
    clients = {"a": make_images(60)}
    one, other = (hold_out(clients, 0.2, seed=seed)[1]["a"] for seed in (0, 1))
    assert not torch.equal(one.images, other.images)


def test_augmentations_are_done_one_on_the_other_in_their_order(monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "more", lambda batch, draw: batch + 1)
    monkeypatch.setitem(AUGMENTATIONS, "twice", lambda batch, draw: batch * 2)
    images = make_images(12)
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain, changed = (
        next(batches(images, 12, draw=draw, augment=names))[0] for draw, names in zip(draws, ((), ("more", "twice")))
    )
    assert torch.equal(changed, (plain + 1) * 2)
