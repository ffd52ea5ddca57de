"""Sums over images for methods that edit weights: against loops, by hand, and from client to server."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import classifier, collected, job, make_images, make_net
from fedunlearn.data.partition import partition
from fedunlearn.errors import RunError
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import ClientData, Reply, handle
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.measuring import summed
from fedunlearn.federation.privacy import Privacy
from fedunlearn.federation.sums import Gradients, Moments
from fedunlearn.training.compute import FLOAT32
from fedunlearn.training.evaluation import count_correct
from fedunlearn.training.moments import (
    gradient_sums,
    input_moments,
    moment_layers,
    patches,
)

IMAGES = make_images(24)


def one_by_one(net):
    """Yield the gradients of each image."""
    x = (IMAGES.images.float() / 255 - IMAGES.mean[0]) / IMAGES.std[0]
    for image, label in zip(x, IMAGES.labels):
        loss = F.cross_entropy(net.eval()(image[None]), label[None])
        yield torch.autograd.grad(loss, list(net.parameters()))


def near(found, expected, apart=1e-4):
    """Values of either sign cancel in these sums, so that one of them alone may be far off in proportion."""
    return float((found - expected).norm()) <= apart * float(expected.norm())


def test_gradients_and_their_squares_are_those_of_single_images_added_up():
    net = make_net()
    sums = [torch.zeros_like(own, dtype=torch.float64) for own in net.parameters()]
    squares = copy.deepcopy(sums)
    for gradients in one_by_one(net):
        for k, own in enumerate(gradients):
            sums[k] += own.double()
            squares[k] += own.double() ** 2
    for found, expected in zip(gradient_sums(make_net(), IMAGES, FLOAT32).values(), sums):
        assert near(found, expected)
    for found, expected in zip(gradient_sums(make_net(), IMAGES, FLOAT32, squared=True).values(), squares):
        assert near(found, expected)


def test_a_frozen_model_has_gradients_and_a_weight_that_is_not_used_has_none():
    net = make_net().requires_grad_(False)
    net.register_parameter("spare", nn.Parameter(torch.ones(2)))
    found = gradient_sums(net, IMAGES, FLOAT32)
    assert bool(found["0.weight"].any())
    assert found["spare"].tolist() == [0, 0]


def test_whole_numbers_have_no_gradient_and_what_was_frozen_stays_so():
    net = make_net()
    net[0].requires_grad_(False)
    net.register_parameter("steps", nn.Parameter(torch.tensor([3]), requires_grad=False))
    found = gradient_sums(net, IMAGES, FLOAT32)
    assert found.keys() == Gradients().layout(classifier(net)).keys()
    assert "steps" not in found
    assert bool(found["0.weight"].any())
    assert [own.requires_grad for own in net[0].parameters()] == [False, False]
    assert all(own.requires_grad for own in net[-1].parameters())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(2, 3, (3, 2), stride=2, padding=(0, 1), dilation=(1, 2)),
        pytest.param(
            nn.Conv2d(2, 3, 4, padding="same"), marks=pytest.mark.filterwarnings("ignore:Using padding='same'")
        ),
        nn.Conv2d(2, 3, 3, padding="valid"),
        nn.Conv2d(2, 3, 1, bias=False),
    ],
)
def test_patches_are_what_a_convolution_multiplies_its_weights_with(layer):
    z = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    rows = patches(z, layer)
    out = layer(z)
    found = rows @ layer.weight.flatten(1).T
    if layer.bias is not None:
        found = found + layer.bias
    torch.testing.assert_close(found, out.flatten(2).transpose(1, 2).reshape(-1, 3))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_patches_are_padded_as_the_layer_pads(mode):
    layer = nn.Conv2d(2, 3, (3, 2), padding=(1, 1), padding_mode=mode, bias=False)
    z = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    found = patches(z, layer) @ layer.weight.flatten(1).T
    torch.testing.assert_close(found, layer(z).flatten(2).transpose(1, 2).reshape(-1, 3))


def test_second_moments_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(64, 3))
    nn.init.constant_(net[0].weight, 2.0)
    found = input_moments(net, IMAGES, FLOAT32)
    x = (IMAGES.images.double() / 255 - IMAGES.mean[0]) / IMAGES.std[0]
    assert float(found["0"]) == pytest.approx(float((x**2).sum()), rel=1e-5)
    assert not found["2"].any()  # 24 images of 64 values for 64 x 65 / 2 numbers
    assert input_moments(net, IMAGES, FLOAT32, hide=False)["2"].any()
    assert not input_moments(net, make_images(127), FLOAT32)["2"].any()  # 128 rows are twice as many as values
    many = make_images(128)
    rows = 2 * (many.images.double().flatten(1) / 255 - many.mean[0]) / many.std[0]
    torch.testing.assert_close(input_moments(net, many, FLOAT32)["2"], rows.T @ rows, rtol=1e-4, atol=1e-2)


def test_the_products_of_few_rows_would_be_the_rows_themselves():
    """Of images that share no feature, each eigenvector of the products is the features of one."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.zero_()
        net[1].weight[:, :64] = torch.eye(64)  # a feature is a pixel
    few = make_images(5, side=32)
    few.images.zero_()
    for image, own in enumerate(few.images):
        own[0, 0, 5 * image : 5 * image + 3] = torch.tensor([90, 120, 200 + image], dtype=torch.uint8)
    few = replace(few, mean=(0.0,), std=(1.0,))
    told = input_moments(net, few, FLOAT32, hide=False)["3"]
    shown = torch.linalg.eigh(told).eigenvectors[:, -5:].abs().T
    for features in few.images[:, 0, 0, :32].double():
        nearest = float((shown[:, :32] @ (features / features.norm())).max())
        assert nearest == pytest.approx(1, abs=1e-6)
    rules = Privacy()
    for data, seen in ((few, False), (make_images(127, side=32), False), (make_images(128, side=32), True)):
        asked = job(Moments(), net)
        reply = handle(asked, copy.deepcopy(net), ClientData("a", data), rules)
        assert reply.error is None
        assert bool(reply.tensors["3"].any()) == seen


def test_grouped_convolutions_are_left_out():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 3))
    assert list(moment_layers(net)) == ["1", "3"]


@pytest.mark.parametrize(
    ("task", "images"),
    [(Gradients(), 240), (Gradients(squared=True), 240), (Gradients(exclude=(0, 1)), 80), (Moments(), 240)],
)
def test_the_server_adds_up_what_clients_of_any_split_sum(task, images):
    model = classifier(make_net())
    found = []
    for clients in (2, 4):
        fed = Federation(LocalEngine(partition(make_images(240), by="iid", clients=clients)))
        found.append(summed(model, fed, task, phase="sums"))
    (one, count), (four, same) = found
    assert count == same == images
    assert all(near(four[name], tensor) for name, tensor in one.items())


def test_sums_are_read_back_and_not_asked_for_again_nor_taken_for_another_task(tmp_path):
    engine = LocalEngine(partition(make_images(60), by="iid", clients=3))
    model = classifier(make_net())
    first = Federation(engine, Journal(tmp_path))
    sums, count = summed(model, first, Gradients(), phase="sums")
    assert first.cost("sums").client_samples == 60
    assert first.cost("sums").client_flops == 60 * Gradients().operations(model, *flops(model))
    first.journal.leave()
    again = Federation(engine, Journal(tmp_path))
    read, same = summed(model, again, Gradients(), phase="sums")
    assert same == count
    assert all(torch.equal(read[name], tensor) for name, tensor in sums.items())
    with pytest.raises(
        RunError, match=r"holds sums, step 1, of another request \(squared is 'false' there, 'true' here"
    ):
        summed(model, again, Gradients(squared=True), phase="sums")


def test_gradients_of_a_frozen_weight_are_taken_and_counted():
    net = make_net()
    whole = flops(classifier(net))[1]
    net[0].requires_grad_(False)
    frozen = classifier(net)
    assert flops(frozen)[1] < whole
    assert Gradients().operations(frozen, *flops(frozen)) == whole


def flops(model):
    from fedunlearn.federation.ledger import flops_per_image

    return flops_per_image(model.module, model.shape)


@pytest.mark.parametrize(
    ("task", "tensors", "images", "flaw"),
    [
        (Gradients(squared=True), {"w": torch.tensor([-1.0])}, 5, "w has negative values"),
        (Gradients(), {"w": torch.tensor([-1.0])}, 5, None),
        (Gradients(), {"w": torch.tensor([1.0])}, 0, "it reports 0 images"),
        (Moments(), {"l": torch.tensor([[1.0, -9], [-9, -1]])}, 5, "l has negative squares"),
        (Gradients(), {"w": torch.tensor([-1e300]).double()}, 5, "w has values beyond what 5 images can add up to"),
        (Gradients(squared=True), {"w": torch.tensor([1e300]).double()}, 5, "w has values beyond what 5 images can"),
        (Moments(), {"l": torch.tensor([[1.0, -9], [-9, 1]])}, 5, "l has products beyond its squares"),
        (Moments(), {"l": torch.tensor([[1.0, -9], [-9, 81]])}, 5, None),
        (Moments(), {"l": torch.eye(2).double() * 1e308}, 5, "l has values beyond what images can add up to"),
        (Moments(), {"l": torch.eye(2)}, 0, "it reports 0 images"),
    ],
)
def test_what_no_honest_client_sums_is_refused(task, tensors, images, flaw):
    found = task.flaw(Reply("a", tensors, images))
    assert found == flaw or (flaw and found.startswith(flaw))


def test_replies_have_the_layout_that_is_asked_for():
    engine = LocalEngine(partition(make_images(240), by="iid", clients=2))
    for task in (Gradients(), Gradients(squared=True), Moments()):
        replies, entry = collected(engine, job(task, make_net()))
        assert len(replies) == 2
        assert entry.refused == {}


def states_equal(one, other):
    return all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    "of",
    [
        lambda net, images: gradient_sums(net, images, FLOAT32),
        lambda net, images: input_moments(net, images, FLOAT32, hide=False),
        lambda net, images: {"p": count_correct(net, images).probability},
    ],
    ids=["gradients", "moments", "answers"],
)
def test_a_model_that_was_left_in_training_is_read_in_evaluation(of):
    images = make_images(24)
    assert states_equal(of(make_net().eval(), images), of(make_net().train(), images))
