from functools import partial

import pytest
import torch
from torch import nn

from conftest import make_images, make_net
from fedunlearn.audits.observe import observe
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.stats import (
    ChannelStats,
    capped,
    limit_influence,
    mean_of_clients,
    measure_channels,
    pooled,
)
from fedunlearn.data.batches import batches
from fedunlearn.data.partition import partition
from fedunlearn.errors import DataError
from fedunlearn.training.compute import FLOAT32
from fedunlearn.training.moments import input_moments

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def measured(net, images, *, hook="activation", size=7):
    taps = find_channels(net, EXAMPLE, hook=hook).taps
    return measure_channels(net, batches(images, size), taps=taps, classes=3)


@pytest.mark.parametrize("hook", ["activation", "convolution"])
@pytest.mark.parametrize(
    ("by", "options"),
    [
        ("iid", {"clients": 4}),
        ("dirichlet", {"clients": 4, "alpha": 0.5}),
        ("bias", {"clients": 3, "bias": 1.0}),  # one class per client
    ],
)
def test_merging_clients_equals_measuring_their_pooled_data(net, images, hook, by, options):
    parts = [measured(net, part, hook=hook) for part in partition(images, by=by, **options).values()]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = measured(net, images, hook=hook)
    assert merged.counts.tolist() == whole.counts.tolist() == [20, 20, 20]
    for layer in whole.sums:
        torch.testing.assert_close(merged.sums[layer], whole.sums[layer], rtol=1e-5, atol=1e-6)
        assert pooled(iter(parts)).sums[layer].equal(merged.sums[layer])


def test_sums_match_a_loop_over_images_with_the_convolution_hook(net, images):
    stats = measured(net, images, hook="convolution")
    expected = torch.zeros(3, 6, dtype=torch.float64)
    batch, labels = next(batches(images, len(images)))
    for image, label in zip(batch, labels.tolist()):
        with torch.no_grad():
            maps = net[0](image[None])[0]
        for c in range(6):
            expected[label, c] += float(maps[c].clamp(min=0).mean())
    torch.testing.assert_close(stats.sums["0"], expected, rtol=1e-5, atol=1e-6)


def test_the_activation_hook_reads_what_the_next_convolution_receives(net, images):
    stats = measured(net, images)
    batch, labels = next(batches(images, len(images)))
    with torch.no_grad():
        received = net[:3](batch).mean((2, 3)).double()
    torch.testing.assert_close(stats.sums["0"][1], received[labels == 1].sum(0), rtol=1e-5, atol=1e-6)


class FunctionalNet(nn.Module):
    """ReLU as a function, a pool and a flattened map before the linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 5, 3, padding=1)
        self.linear = nn.Linear(5 * 16, 3)

    def forward(self, x):
        x = torch.nn.functional.leaky_relu(self.first(x), 0.1)
        x = torch.nn.functional.max_pool2d(torch.relu(self.second(x)), 2)
        return self.linear(x.flatten(1))


def test_the_activation_hook_is_right_for_functional_activations_and_flattened_maps(images):
    torch.manual_seed(0)
    net = FunctionalNet().eval()
    stats = measured(net, images)
    batch, labels = next(batches(images, len(images)))
    with torch.no_grad():
        first = torch.nn.functional.leaky_relu(net.first(batch), 0.1)
        second = torch.nn.functional.max_pool2d(torch.relu(net.second(first)), 2)
    of_two = labels == 2
    torch.testing.assert_close(
        stats.sums["first"][2], first[of_two].clamp(min=0).mean((2, 3)).double().sum(0), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        stats.sums["second"][2], second[of_two].mean((2, 3)).double().sum(0), rtol=1e-5, atol=1e-6
    )


def test_hooks_are_gone_and_the_mode_restored_also_after_a_failure(net, images):
    net.train()
    wrong = [(torch.randn(2, 1, 8, 8), torch.tensor([0, 7]))]
    with pytest.raises(DataError, match=r"labels must lie in 0 \.\. 2, got 0 \.\. 7"):
        measure_channels(net, wrong, taps=find_channels(net, EXAMPLE).taps, classes=3)
    measured(net, images)
    assert net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_class_without_images_has_zero_sums_and_undefined_means(net, images):
    stats = measured(net, images.without([1]))
    assert stats.counts.tolist() == [20, 0, 20]
    assert stats.sums["0"][1].abs().sum() == 0
    assert bool(stats.means("0")[1].isnan().all())


def test_one_vote_per_class_gives_the_mean_of_client_means():
    big = ChannelStats({"0": torch.tensor([[30.0], [4.0]], dtype=torch.float64)}, torch.tensor([10, 2]))
    small = ChannelStats({"0": torch.tensor([[1.0], [0.0]], dtype=torch.float64)}, torch.tensor([1, 0]))
    voted = big.one_vote_per_class().merge(small.one_vote_per_class())
    assert voted.means("0").tolist() == [[2.0], [2.0]]  # (3 + 1) / 2, and the one client that holds class 1
    assert big.merge(small).means("0").tolist() == [[31 / 11], [2.0]]
    assert mean_of_clients([big, small]).means("0").tolist() == [[2.0], [2.0]]


def test_a_capped_pooling_limits_each_client_before_it_pools():
    parts = [
        ChannelStats({"0": torch.tensor([[mean * count]], dtype=torch.float64)}, torch.tensor([count]))
        for mean, count in ((1.0, 10), (2.0, 10), (100.0, 1000))
    ]
    for pooling in (pooled, mean_of_clients):
        found, expected = capped(1.5, pooling)(iter(parts)), pooling(limit_influence(parts, 1.5))
        assert found.sums["0"].equal(expected.sums["0"])
        assert found.counts.equal(expected.counts)
    assert capped(1.5)(parts).counts.tolist() == [10 + 10 + 15]
    assert capped(1.5)(parts).sums["0"].tolist() == [[10 * 1.0 + 10 * 2.0 + 15 * 3.0]]
    assert capped(1.5, mean_of_clients)(parts).means("0").tolist() == [[(1.0 + 2.0 + 3.0) / 3]]


def test_statistics_survive_a_round_trip_to_disk(net, images, tmp_path):
    stats = measured(net, images)
    stats.save(tmp_path / "stats.safetensors")
    read = ChannelStats.load(tmp_path / "stats.safetensors")
    assert read.counts.equal(stats.counts)
    assert all(read.sums[layer].equal(stats.sums[layer]) for layer in stats.sums)
    assert "60 images; 0 (3, 6)" in repr(read)


def test_bad_statistics_are_refused(tmp_path):
    one = ChannelStats({"0": torch.zeros(3, 2)}, torch.zeros(3))
    with pytest.raises(DataError, match=r"must agree in layers and shapes.*\(3, 2\).*\(3, 4\)"):
        one.merge(ChannelStats({"0": torch.zeros(3, 4)}, torch.zeros(3)))
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(DataError, match="expected channel statistics as safetensors, but"):
        ChannelStats.load(tmp_path / "broken")


def test_statistics_of_no_image_are_zero(net):
    stats = measure_channels(net, [], taps=find_channels(net, EXAMPLE).taps, classes=3)
    assert stats.counts.tolist() == [0, 0, 0]
    assert stats.shapes() == {"0": (3, 6), "3": (3, 8)}
    assert not any(bool(sums.any()) for sums in stats.sums.values())


def test_statistics_do_not_depend_on_the_batch_size():
    net, images = make_net(), make_images(count=30)
    one, all_at_once = measured(net, images, size=2), measured(net, images, size=30)
    torch.testing.assert_close(one.sums["3"], all_at_once.sums["3"], rtol=1e-5, atol=1e-6)


class Residual(nn.Module):
    """Adds its input to what a convolution made, in place or not."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.first, self.inner = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.outer, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, images):
        images = self.first(images).relu()
        maps = self.outer(self.inner(images).relu())
        if self.inplace:
            maps += images
        else:
            maps = maps + images
        return self.last(maps.relu().mean((2, 3)))


def activated(inplace, activation):
    layers = nn.Conv2d(1, 6, 3), activation(inplace=inplace), nn.Conv2d(6, 8, 3), activation(inplace=inplace)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("hook", ["convolution", "activation"])
@pytest.mark.parametrize(
    "make", [Residual, *(partial(activated, activation=own) for own in (nn.ReLU, nn.SiLU, nn.Hardswish))]
)
def test_what_is_measured_does_not_depend_on_whether_what_follows_works_in_place(images, make, hook):
    apart, within = make(inplace=False).eval(), make(inplace=True).eval()
    within.load_state_dict(apart.state_dict())
    one, other = measured(apart, images, hook=hook), measured(within, images, hook=hook)
    for layer, sums in one.sums.items():
        assert sums.equal(other.sums[layer]), layer
        assert bool((sums >= 0).all())


class Overwritten(nn.Module):
    """Goes on to use, in place or not, what a convolution and the last layer were given."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.first, self.second, self.last = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)

    def forward(self, images):
        maps = self.first(images).relu()
        made = self.second(maps)
        maps = maps.add_(made) if self.inplace else maps + made
        features = maps.mean((2, 3))
        logits = self.last(features)
        if self.inplace:
            features.zero_()
        return logits


def test_audits_and_moments_read_what_a_layer_was_given(images):
    torch.manual_seed(0)
    apart, within = Overwritten(inplace=False).eval(), Overwritten(inplace=True).eval()
    within.load_state_dict(apart.state_dict())
    one, other = (observe(net, images) for net in (apart, within))
    assert one.logits.equal(other.logits)
    assert one.features.equal(other.features)
    one, other = (input_moments(net, images, FLOAT32, hide=False) for net in (apart, within))
    assert one.keys() == other.keys()
    for layer, moments in one.items():
        assert moments.equal(other[layer]), layer
