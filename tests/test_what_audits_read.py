"""Which images and which bits each audit reads: its formula has tests of its own."""

from types import SimpleNamespace

import pytest
import torch

from conftest import classifier, make_images, make_net
from fedunlearn.audits import linear_probe, membership, prototypes, reestimation, relearn, rounding
from fedunlearn.audits.base import Subject
from fedunlearn.audits.images import audit_images

IMAGES = audit_images(make_images(160, 4), make_images(80, 4, seed=1), forget=[2], per_class=30, seed=0)


@pytest.fixture
def subject():
    net = classifier(make_net(classes=4))
    return Subject(net, net).checked("a", 4, [2])


def test_probe_and_prototypes_learn_from_training_images_and_are_asked_for_test_images():
    """Test images of class 2 have the features of training images of class 0, and the other way round."""
    features = {"known": torch.eye(4)[IMAGES.known.labels], "test": torch.eye(4)[[2, 1, 0, 3]][IMAGES.test.labels]}
    seen = SimpleNamespace(**{part: SimpleNamespace(features=values) for part, values in features.items()})
    assert linear_probe._measure(None, IMAGES, seen, ()).figures["probe"].value == 0
    assert {figure.value for figure in prototypes._measure(None, IMAGES, seen, ()).figures.values()} == {0}


def test_membership_is_held_against_what_retrained_models_are_as_sure_of():
    def seen(sure):
        rows = {"members": torch.zeros(len(IMAGES.members), 4), "others": torch.zeros(len(IMAGES.test), 4)}
        rows["members"][:, 2] = sure
        test, labels = SimpleNamespace(logits=rows["others"]), SimpleNamespace(labels=(0, 1, 2, 3))
        return SimpleNamespace(members=rows["members"], test=test, images=IMAGES, subject=labels)

    for theirs, expected in ((3.0, 0.5), (0.0, 1.0)):  # as sure of these images as the model, and not sure of them
        found = membership._measure(None, IMAGES, seen(3.0), [seen(theirs)])
        assert found.figures["membership"].value == expected


def test_statistics_are_re_estimated_without_images_of_the_class(subject, monkeypatch):
    given = []
    monkeypatch.setattr(
        reestimation, "reestimated", lambda model, images, draw: given.append(images.counts().tolist()) or model
    )
    reestimation._measure(subject, IMAGES, None, ())
    assert given == [[30, 30, 0, 30]]


def test_weights_are_rounded_to_the_bits_that_the_figure_names(subject, monkeypatch):
    given = []
    monkeypatch.setattr(rounding, "rounded", lambda model, bits: given.append(bits) or model)
    assert list(rounding._measure(subject, IMAGES, None, ()).figures) == ["int8", "int4"]
    assert given == [8, 4]


def test_a_model_relearns_on_training_images_of_all_classes_and_is_asked_for_test_images_of_the_one(
    subject, monkeypatch
):
    given = []

    def relearned(model, train, test, **how):
        given.append((train.counts().tolist(), test.images))
        return relearn.Relearned((0, 64), (0.0, 1.0))

    monkeypatch.setattr(relearn, "relearn", relearned)
    relearn._measure(subject, IMAGES, SimpleNamespace(before=True), ())
    ((counts, asked),) = given
    assert counts == [30] * 4
    assert asked.equal(IMAGES.test.images[IMAGES.test.labels == 2])
