"""Which images and which bits each audit reads: its formula has tests of its own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from conftest import classifier, make_images, make_net
from fedunlearn.audits import linear_probe, membership, prototypes, reestimation, relearn, representation, rounding
from fedunlearn.audits.base import Subject, View
from fedunlearn.audits.images import audit_images
from fedunlearn.audits.representation import linear_cka, procrustes

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


def test_prototypes_are_of_one_five_and_ten_images_drawn_by_seed(monkeypatch):
    given = []

    def told(*features, shots, draws, draw):
        given.append((shots, draw.initial_seed()))
        return torch.arange(draws, dtype=torch.float64) / (draws - 1)

    monkeypatch.setattr(prototypes, "prototype_accuracy", told)
    rows = SimpleNamespace(features=torch.zeros(80, 4))
    for seed in (0, 1):
        found = prototypes._measure(None, replace(IMAGES, seed=seed), SimpleNamespace(known=rows, test=rows), ())
    assert [shots for shots, _ in given] == [1, 5, 10] * 2
    assert len({seed for _, seed in given}) == 6
    assert found.details["prototype_draws"]["5"] == pytest.approx([0.05, 0.5, 0.95])


def test_relearning_has_the_rate_the_length_and_the_seed_of_the_audit(monkeypatch):
    given, net = [], classifier(make_net(classes=4))
    subject = relearn.Subject(net, net).checked("a", 4, [2])

    def relearned(model, train, test, **how):
        given.append((how["lr"], how["doublings"], how["draw"].initial_seed()))
        return relearn.Relearned((0, 64), (0.0, 1.0))

    monkeypatch.setattr(relearn, "relearn", relearned)
    for images in (IMAGES, replace(IMAGES, lr=0.07, seed=1)):
        relearn._measure(subject, images, SimpleNamespace(before=True), ())
    (one, other) = given
    assert (one[0], other[0]) == (0.05, 0.07)
    assert (one[1], other[1]) == (5, 5)
    assert one[2] != other[2]


def test_membership_is_told_of_both_kinds_of_images():
    rows = SimpleNamespace(members=torch.randn(len(IMAGES.members), 4), test=SimpleNamespace(logits=torch.randn(80, 4)))
    seen = SimpleNamespace(**vars(rows), images=IMAGES, subject=SimpleNamespace(labels=(0, 1, 2, 3)))
    found = membership._measure(None, IMAGES, seen, [seen]).details["membership"]
    assert [(found[name]["members"], found[name]["others"]) for name in ("forget", "retain")] == [(40, 20), (40, 60)]


def test_members_are_told_by_the_rows_of_their_classes():
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(len(IMAGES.members), 3)
    seen = SimpleNamespace(members=logits, images=IMAGES, subject=SimpleNamespace(labels=(0, 1, 3)))
    told, expected = membership._signal_of_members(seen), logits[0].double().log_softmax(0)
    of = {label: told[IMAGES.members.labels == label].unique() for label in range(4)}
    torch.testing.assert_close(torch.cat([of[label] for label in range(4)]), expected[[0, 1, 0, 2]])


def test_features_are_held_against_the_mean_of_all_retrained_models():
    x, y, z = (torch.randn(20, width, generator=torch.Generator().manual_seed(width)) for width in (3, 4, 5))
    seen, *references = (SimpleNamespace(layers={"features": own}) for own in (x, y, z))
    found = representation._measure(None, None, seen, references).figures
    for name, distance in (("cka", linear_cka), ("procrustes", procrustes)):
        assert found[name].value == pytest.approx((distance(x, y) + distance(x, z)) / 2)


def test_the_probe_tells_what_it_knows_of_the_classes_that_stay():
    """Test images of 0 and 2 have each other's features: of the classes that stay 1 and 3 are told, 0 is not."""
    features = {"known": torch.eye(4)[IMAGES.known.labels], "test": torch.eye(4)[[2, 1, 0, 3]][IMAGES.test.labels]}
    seen = SimpleNamespace(**{part: SimpleNamespace(features=values) for part, values in features.items()})
    assert linear_probe._measure(None, IMAGES, seen, ()).details["probe_retain"] == pytest.approx(2 / 3)


def test_a_digest_is_of_all_images_with_their_classes_and_normalisation():
    own, names = IMAGES, ("a", "b", "c", "d")
    others = (
        replace(own, forget=(1,)),
        replace(own, others=own.others[1:]),
        replace(own, compared=own.compared[1:]),
        *(
            replace(own, **{part: replace(getattr(own, part), **change)})
            for part in ("known", "members", "test")
            for change in ({"std": (0.5,)}, {"classes": names})
        ),
    )
    same = [place for place, other in enumerate(others) if other.digest() == own.digest()]
    assert same == []


def test_layers_are_compared_on_the_images_chosen_for_it():
    images = replace(IMAGES, compared=torch.tensor([5, 9]))
    view = View(Subject(classifier(make_net(classes=4))), images)
    assert view.layers["features"].equal(view.test.features[[5, 9]])
