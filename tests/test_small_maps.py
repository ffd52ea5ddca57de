"""Convolutions of small maps as products: the same maps and gradients, and which convolutions are left to torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedunlearn.models import build_model
from fedunlearn.training.compute import FLOAT32, Compute

BFLOAT16 = Compute("bfloat16")


def drawn(*shape, seed):
    """Values that bfloat16 holds exactly, so that products of them differ by the order of their sums alone."""
    values = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 8
    return values.requires_grad_()


def plain_autocast():
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.sampled_from([(1, 1), (1, 16), (2, 2), (3, 5), (4, 4), (4, 1)]), st.booleans())
def test_maps_and_gradients_are_those_of_the_convolution(batch, size, has_bias):
    maps, weight = drawn(batch, 128, *size, seed=1), drawn(130, 128, 3, 3, seed=2)
    bias = drawn(130, seed=3) if has_bias else None
    grad = drawn(batch, 130, *size, seed=4).detach()
    inputs = [each for each in (maps, weight, bias) if each is not None]
    with BFLOAT16.autocast():
        made = F.conv2d(maps, weight, bias, (1, 1), (1, 1), (1, 1), 1)
    ours = torch.autograd.grad(made, inputs, grad.bfloat16())
    exact = F.conv2d(maps.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    theirs = torch.autograd.grad(exact, inputs, grad.double())
    assert made.dtype == torch.bfloat16
    for one, other in zip([made, *ours], [exact, *theirs]):
        assert one.shape == other.shape
        torch.testing.assert_close(one.float(), other.float(), rtol=2**-7, atol=2**-6 if has_bias else 1e-6)
    assert all(one.dtype == torch.float32 for one in ours)


@pytest.mark.parametrize(
    ("channels", "size", "change"),
    [
        (128, 5, {}),
        (127, 4, {}),
        (128, 4, {"stride": 2}),
        (128, 4, {"padding": 2}),
        (128, 4, {"padding": "same"}),
        (128, 4, {"dilation": 2}),
        (128, 4, {"groups": 128}),
        (128, 4, {"kernel_size": 1}),
        (128, 4, {"padding_mode": "reflect"}),
    ],
)
def test_other_convolutions_are_those_of_torch_to_the_bit(channels, size, change):
    layer = nn.Conv2d(channels, 128 if channels == 128 else 256, **{"kernel_size": 3, "padding": 1} | change)
    maps = drawn(2, channels, size, size, seed=1).detach()
    with BFLOAT16.autocast():
        made = layer(maps)
    assert "Convolution" in made.grad_fn.name()
    with plain_autocast():
        assert torch.equal(made, layer(maps))


@pytest.mark.parametrize("maps", [drawn(128, 2, 2, seed=1), torch.zeros(0, 128, 2, 2)])
def test_an_image_without_a_batch_and_a_batch_without_images_are_left_to_torch(maps):
    layer = nn.Conv2d(128, 128, 3, padding=1)
    with BFLOAT16.autocast():
        made = layer(maps.detach())
    with plain_autocast():
        assert torch.equal(made, layer(maps.detach()))


def test_maps_of_other_channels_are_refused_as_torch_does():
    with BFLOAT16.autocast(), pytest.raises(RuntimeError, match="to have 128 channels, but got 130 channels"):
        nn.Conv2d(128, 128, 3, padding=1)(torch.zeros(1, 130, 2, 2))


def test_where_a_network_turns_autocast_off_nothing_is_rounded():
    layer = nn.Conv2d(128, 128, 3, padding=1)
    maps = drawn(2, 128, 2, 2, seed=1).detach()
    with BFLOAT16.autocast():
        with torch.autocast("cpu", enabled=False):
            made = layer(maps)
        double = layer.double()(maps.double())
    assert torch.equal(made, layer.float()(maps))
    assert double.dtype == torch.float64


class _InPlace(nn.Module):
    """Changes the output of a convolution in place, as a ReLU or a shortcut right after it does."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(128, 128, 3, padding=1, bias=False)
        self.second = nn.Conv2d(128, 128, 3, padding=1, bias=False)

    def forward(self, maps):
        out = self.second(F.relu_(self.first(maps)))
        out += maps
        return out


def test_outputs_may_be_changed_in_place():
    net, maps = _InPlace(), drawn(2, 128, 2, 2, seed=1)

    def gradients(context):
        with context:
            made = net(maps)
        return torch.autograd.grad(made.float().square().sum(), [maps, *net.parameters()])

    exact, plain, ours = map(gradients, (FLOAT32.autocast(), plain_autocast(), BFLOAT16.autocast()))
    for own, theirs, right in zip(ours, plain, exact):
        assert (own - right).norm() < 1.5 * (theirs - right).norm() + 0.01 * right.norm()


def test_clients_take_products_in_bfloat16_alone():
    layer = nn.Conv2d(128, 128, 3, padding=1, bias=False)
    maps = drawn(2, 128, 2, 2, seed=1).detach()
    with BFLOAT16.autocast():
        assert "Permute" in layer(maps).grad_fn.name()
    with FLOAT32.autocast():
        assert "Convolution" in layer(maps).grad_fn.name()
    assert "Convolution" in layer(maps).grad_fn.name()  # nothing of it stays
    with torch.inference_mode(), BFLOAT16.autocast():
        assert layer(maps).dtype == torch.bfloat16


def test_a_vgg_has_the_gradients_that_bfloat16_has_without_products():
    model = build_model("vgg11", classes=10, colours=3)
    maps, labels = drawn(4, 3, 32, 32, seed=1).detach(), torch.arange(4)

    def gradients(context):
        with context:
            loss = F.cross_entropy(model(maps).float(), labels)
        return torch.autograd.grad(loss, [*model.parameters()])

    exact = gradients(FLOAT32.autocast())
    plain = gradients(plain_autocast())
    ours = gradients(BFLOAT16.autocast())
    for own, theirs, right in zip(ours, plain, exact):
        if right.norm() > 1e-4:  # biases before a batch normalisation have none
            assert (own - right).norm() < 1.5 * (theirs - right).norm() + 0.02 * right.norm()
