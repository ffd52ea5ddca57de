"""Groups, plans and pruning: the identities that tie them together."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import oracles
from conftest import classifier, logits, make_net, settle, tiers
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.plan import Classifier, Cut, PruningPlan, plan_pruning, plan_without_rows, prune
from fedunlearn.channels.taps import reading
from fedunlearn.errors import ModelError, PlanError
from fedunlearn.models import MODELS, build_model

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def plan_for(net, scores=None, *, fraction, example=EXAMPLE, seed=0, **cut):
    """Return the plan by ``scores``, random ones where there are none."""
    channels, draw = find_channels(net, example), torch.Generator().manual_seed(seed)
    drawn = {layer: torch.rand(group.width, generator=draw) for group in channels.groups for layer in group.layers}
    return plan_pruning(channels, drawn if scores is None else scores, Cut(fraction, **cut))


class Seeing(nn.Module):
    """A norm over channels that sees those that stay, by hand; the others are 0."""

    def __init__(self, norm, kept):
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, maps):
        norm, kept = self.norm, list(self.kept)
        axis = 1 if isinstance(norm, (nn.GroupNorm, LastNorm)) else -1
        x, out = maps.movedim(axis, 1), torch.zeros_like(maps.movedim(axis, 1))
        parts = [kept]
        if isinstance(norm, nn.GroupNorm):
            size = norm.num_channels // norm.num_groups
            parts = [[c for c in kept if c // size == group] for group in range(norm.num_groups)]
        for part in filter(None, parts):
            for n in range(len(x)):
                pixels = [x[n, part]] if isinstance(norm, nn.GroupNorm) else x[n, part].flatten(1).T
                values = out[n, part].flatten(1)
                for place, own in enumerate(pixels):
                    mean = 0 if isinstance(norm, nn.RMSNorm) else own.mean()
                    eps = torch.finfo(own.dtype).eps if norm.eps is None else norm.eps
                    scaled = (own - mean) / ((own - mean).square().mean() + eps).sqrt()
                    if isinstance(norm, nn.GroupNorm):
                        values = scaled.flatten(1)
                    else:
                        values[:, place] = scaled
                values = values.view(x[n, part].shape)
                bias = norm.bias[part] if getattr(norm, "bias", None) is not None else torch.zeros(len(part))
                shape = (-1, *[1] * (values.ndim - 1))
                out[n, part] = values * norm.weight[part].view(shape) + bias.view(shape)
        return out.movedim(1, axis)


def masked(net, plan):
    """Return a copy in which nothing is cut away, but the layers that read a removed channel ignore it."""
    copied = copy.deepcopy(net)
    state = copied.state_dict()
    for name, axes in plan.kept.items():
        path = name.rpartition(".")[0]
        if isinstance(net.get_submodule(path), (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
            if name.endswith("weight"):
                parent, _, own = path.rpartition(".")
                setattr(copied.get_submodule(parent), own, Seeing(net.get_submodule(path), axes[0]))
        elif 1 in axes and isinstance(net.get_submodule(path), (nn.Conv2d, nn.Linear)):
            gone = [c for c in range(plan.shapes[name][1]) if c not in axes[1]]
            state[name][:, gone] = 0
    copied.load_state_dict(state, strict=False)
    return copied


SHIPPED = [pytest.param(name, "A", marks=tiers(name)) for name in MODELS]
SHIPPED += [pytest.param(name, "B", marks=tiers(name)) for name in MODELS if name.startswith("resnet")]


@pytest.mark.parametrize(("name", "shortcut"), SHIPPED)
def test_the_sliced_model_equals_the_masked_model(name, shortcut):
    torch.manual_seed(0)
    net = build_model(name, classes=10, colours=3, shortcut=shortcut)
    settle(net, 3, side=32)
    example = torch.randn(2, 3, 32, 32)
    plan = plan_for(net, fraction=0.3, example=example)
    sliced = prune(net, plan)
    assert sum(p.numel() for p in sliced.parameters()) < 0.8 * sum(p.numel() for p in net.parameters())
    expected = logits(masked(net, plan), example)
    torch.testing.assert_close(logits(sliced, example), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_zero_padded_shortcuts_lose_only_block_inner_channels_and_the_plan_says_why():
    net = build_model("resnet20", classes=10, colours=3, shortcut="A")
    example = torch.randn(2, 3, 32, 32)
    channels = find_channels(net, example)
    assert list(channels.taps) == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)]
    assert "layer1.0.conv1: read at the input of layer1.0.conv2" in str(channels)
    assert "layer1.0.conv2: left out, its channels cross" in str(channels)
    plan = plan_for(net, fraction=0.2, example=example)
    assert "zero-padded shortcut" in plan.left_out["layer1.0.conv2"]
    assert "layer1.0.conv2: left out, its channels cross" in str(plan)
    assert "layer1.0.conv1: 3 channels removed" in str(plan)


def test_residual_additions_tie_their_convolutions_together():
    net = build_model("resnet20", classes=10, colours=3, shortcut="B")
    channels = find_channels(net, torch.randn(2, 3, 32, 32))
    assert channels.left_out == {}
    tied = next(group for group in channels.groups if "conv1" in group.layers)
    assert tied.layers == ("conv1", "layer1.0.conv2", "layer1.1.conv2", "layer1.2.conv2")


def test_the_empty_plan_changes_no_logit(net):
    assert logits(prune(net, PruningPlan()), EXAMPLE).equal(logits(net, EXAMPLE))
    none = plan_for(net, {layer: torch.zeros(n) for layer, n in (("0", 6), ("3", 8))}, fraction=0.5)
    assert str(none) == "nothing removed"
    assert logits(prune(net, none), EXAMPLE).equal(logits(net, EXAMPLE))


def test_removing_a_channel_whose_outgoing_weights_are_zero_changes_no_logit(net):
    with torch.no_grad():
        net[3].weight[:, 2] = 0
    scores = {"0": torch.tensor([0, 0, 1.0, 0, 0, 0])}
    plan = plan_for(net, scores, fraction=0.2)
    assert plan.pruned == {"0": (2,)}
    torch.testing.assert_close(logits(prune(net, plan), EXAMPLE), logits(net, EXAMPLE), rtol=1e-5, atol=1e-6)


def test_pruning_leaves_the_original_alone_and_sizes_in_line(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruned = prune(net, plan_for(net, fraction=0.5))
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())
    assert (pruned[0].out_channels, pruned[1].num_features, pruned[3].in_channels) == (3, 3, 3)
    assert (pruned[3].out_channels, pruned[4].num_features, pruned[8].in_features) == (4, 4, 4)
    pruned(torch.randn(4, 1, 8, 8)).sum().backward()  # it can be trained


@given(
    st.lists(st.integers(-3, 5), min_size=6, max_size=6),
    st.lists(st.integers(-3, 5), min_size=8, max_size=8),
    st.floats(0.01, 0.99),
)
@settings(max_examples=25, deadline=None)
def test_the_removed_channels_are_the_highest_scored_ones(first, second, fraction):
    net = make_net()
    scores = {"0": torch.tensor(first, dtype=torch.float64), "3": torch.tensor(second, dtype=torch.float64)}
    plan = plan_for(net, scores, fraction=fraction)
    expected = oracles.to_remove({"0": first, "3": second}, fraction)
    assert {layer: list(channels) for layer, channels in plan.pruned.items()} == expected


def test_a_fraction_is_not_fooled_by_binary_floats():
    net = nn.Sequential(nn.Conv2d(1, 100, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(100, 2))
    plan = plan_for(net, {"0": torch.rand(100) + 1}, fraction=0.29)  # 0.29 * 100 = 28.999...
    assert len(plan.pruned["0"]) == 29


def test_ties_break_by_index():
    plan = plan_for(make_net(), {"0": torch.ones(6)}, fraction=0.5)
    assert plan.pruned["0"] == (0, 1, 2)


def test_a_global_cut_may_take_more_from_one_layer_but_never_its_last_channel():
    scores = {"0": torch.full((6,), 9.0), "3": torch.ones(8)}
    plan = plan_for(make_net(), scores, fraction=0.5, scope="global")
    assert {layer: len(channels) for layer, channels in plan.pruned.items()} == {"0": 5, "3": 2}


def test_the_lowest_end_is_the_other_end_whatever_the_sign():
    scores = {"0": torch.tensor([3.0, -1.0, 0.0, 2.0, 5.0, 4.0])}
    plan = plan_for(make_net(), scores, fraction=0.5, end="lowest")
    assert plan.pruned["0"] == (1, 2, 3)


def test_a_layer_without_scores_is_left_out_by_name():
    plan = plan_for(make_net(), {"0": torch.ones(6)}, fraction=0.5)
    assert plan.left_out == {"3": "it was not scored"}


def test_a_plan_survives_json(net):
    plan = plan_for(net, fraction=0.5)
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_two_plans_in_a_row_equal_the_plan_of_both(net):
    first = plan_for(net, fraction=0.4, seed=1)
    smaller = prune(net, first)
    second = plan_for(smaller, fraction=0.4, seed=2)
    in_turn, at_once = prune(smaller, second), prune(net, first.then(second))
    assert logits(in_turn, EXAMPLE).equal(logits(at_once, EXAMPLE))
    assert len(first.then(second).pruned["0"]) == 6 - in_turn[0].out_channels


def test_output_rows_are_removed_by_a_plan_too(net):
    assert head_layer(net, EXAMPLE) == "8"
    shipped = prune(net, plan_without_rows(net, "8", [1]))
    torch.testing.assert_close(logits(shipped, EXAMPLE), logits(net, EXAMPLE)[:, [0, 2]])


def test_a_classifier_knows_which_class_each_of_its_rows_names(net):
    whole = classifier(net)
    assert whole.rows == 3
    one = whole.without_rows([1])
    assert (one.rows, one.labels, one.shape) == (2, (0, 2), (1, 8, 8))
    two = one.without_rows([2, 1])  # of which class 1 has no row any more
    assert (two.rows, two.labels) == (1, (0,))
    torch.testing.assert_close(logits(two.module, EXAMPLE), logits(net, EXAMPLE)[:, [0]])
    assert logits(prune(net, two.plan), EXAMPLE).equal(logits(two.module, EXAMPLE))
    assert (whole.rows, whole.labels, whole.plan) == (3, None, PruningPlan())


def test_the_plan_of_a_classifier_is_all_that_was_cut(net):
    once = classifier(net).cut(plan_for(net, fraction=0.4, seed=1))
    twice = once.cut(plan_for(once.module, fraction=0.4, seed=2)).without_rows([0])
    assert logits(prune(net, twice.plan), EXAMPLE).equal(logits(twice.module, EXAMPLE))
    assert twice.plan.pruned["0"] != once.plan.pruned["0"]
    with pytest.raises(PlanError, match=r"the plan is for 0.weight of shape \(6, 1, 3, 3\), the model has \(3, "):
        twice.cut(once.plan)


def test_a_copy_of_a_classifier_has_a_module_of_its_own(net):
    whole = classifier(net)
    copied = whole.copy()
    with torch.no_grad():
        copied.module[8].weight.zero_()
    assert not whole.module[8].weight.eq(0).all()
    assert Classifier.of(whole, (3, 9, 9)) is whole
    assert Classifier.of(net, (1, 8, 8)).module is net
    assert whole.example.equal(copied.example)
    assert whole.example.shape == (2, 1, 8, 8)


class Concatenated(nn.Module):
    """Two branches side by side, as in Inception and DenseNet."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)
        self.join, self.linear = nn.Conv2d(10, 5, 1), nn.Linear(5, 3)

    def forward(self, x):
        both = F.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.linear(F.relu(self.join(both)).mean((2, 3)))


def test_concatenated_branches_are_followed():
    torch.manual_seed(0)
    net = Concatenated()
    taps = find_channels(net, EXAMPLE, hook="activation").taps
    read = [(taps[layer].module, taps[layer].start, taps[layer].stop) for layer in ("left", "right")]
    assert read == [("join", 0, 4), ("join", 4, 10)]
    plan = plan_for(net, fraction=0.5)
    sliced = prune(net, plan)
    assert (sliced.left.out_channels, sliced.right.out_channels, sliced.join.in_channels) == (2, 3, 5)
    torch.testing.assert_close(logits(sliced, EXAMPLE), logits(masked(net, plan), EXAMPLE), rtol=1e-5, atol=1e-6)


def shipped(name, shortcut="A"):
    return build_model(name, classes=10, colours=3, shortcut=shortcut), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: shipped("resnet20", "A"),
        lambda: shipped(
            "resnet20", "B"
        ),  # a convolution in the shortcut stands between a block's last one and its reader
        lambda: shipped("vgg11"),
        lambda: (Concatenated(), EXAMPLE),
        lambda: (make_net(), EXAMPLE),
        lambda: (Between(nn.Conv2d(8, 8, 3, padding=1, groups=8)), EXAMPLE),
    ],
)
def test_what_is_read_for_a_layer_are_its_own_channels(make):
    torch.manual_seed(0)
    net, example = make()
    settle(net, example.shape[1], side=example.shape[2])
    net.eval()
    taps = find_channels(net, example, hook="activation").taps
    with torch.inference_mode(), reading(net, taps) as before:
        net(example)
    for layer, tap in taps.items():
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.get_submodule(layer).weight[0] *= -2
        with torch.inference_mode(), reading(other, {layer: tap}) as after:
            other(example)
        apart = (after[layer] - before[layer]).abs().movedim(tap.axis, 0).flatten(1).amax(1)
        each = (tap.stop - tap.start) // net.get_submodule(layer).weight.shape[0]
        assert each >= 1
        assert len(apart) >= tap.stop, layer
        assert apart.nonzero().flatten().tolist() == list(range(tap.start, tap.start + each)), layer


def test_batch_normalisation_without_weights_loses_its_statistics():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(8, affine=False)]
    net = make_net()
    net[1], net[4] = norms
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    plan = plan_for(net, fraction=0.5)
    sliced = prune(net, plan)
    assert (sliced[1].num_features, sliced[4].num_features) == (3, 4)
    assert sliced[1].running_var.equal(norms[0].running_var[list(plan.kept["1.running_var"][0])])
    torch.testing.assert_close(logits(sliced, EXAMPLE), logits(masked(net, plan), EXAMPLE), rtol=1e-5, atol=1e-6)


class Between(nn.Module):
    """Two convolutions, ``mix`` between them, ``tail`` after them."""

    def __init__(self, mix=lambda maps: maps, width=8, tail=lambda maps: maps.mean((2, 3)), features=6):
        super().__init__()
        self.c1, self.norm, self.mix = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), mix
        self.c2, self.tail, self.fc = nn.Conv2d(width, 6, 3, padding=1), tail, nn.Linear(features, 3)

    def forward(self, x):
        return self.fc(self.tail(F.relu(self.c2(self.mix(F.relu(self.norm(self.c1(x))))))))


class LastNorm(nn.LayerNorm):
    """Layer normalisation over the channels of maps, as image networks have it."""

    def forward(self, maps):
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Last(nn.Sequential):
    """Modules that take the channels last."""

    def forward(self, maps):
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Doubled(nn.Module):
    """A module that takes maps beside other maps of theirs."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.other = norm, nn.Conv2d(8, 8, 1)

    def forward(self, maps):
        return self.norm(torch.cat([maps, self.other(maps)], 1))


class Scale(nn.Module):
    """A weight per channel."""

    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.1)

    def forward(self, maps):
        return maps * self.gamma


class Excited(nn.Module):
    """Squeeze and excitation: each channel times a weight that is made of all of them."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, maps):
        return maps * self.up(F.relu(self.down(maps.mean((2, 3))))).sigmoid()[:, :, None, None]


class Attending(nn.Module):
    """Each pixel times a weight that is made of the largest and the mean of its channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, maps):
        return maps * self.conv(torch.cat([maps.amax(1, keepdim=True), maps.mean(1, keepdim=True)], 1)).sigmoid()


def unfolded(maps):
    return F.fold(F.unfold(maps, 3, padding=1), (8, 8), 3, padding=1)


def drawn(module):
    """Return ``module`` with weights that tell its channels apart."""
    with torch.no_grad():
        for own in module.parameters():
            own.uniform_(0.3, 1.7)
    return module


BETWEEN = {  # what is between, its channels, whether the first convolution can lose some
    "squeeze and excitation": (Excited(), 8, True),
    "dropout": (nn.Dropout2d(), 8, True),
    "depthwise convolution": (nn.Conv2d(8, 8, 3, padding=1, groups=8), 8, True),
    "depthwise and pointwise": (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 12, 1)), 12, True),
    "convolution of four groups": (nn.Conv2d(8, 8, 3, groups=4), 8, True),
    "convolutions of four and of two groups": (
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 1, groups=2)),
        8,
        True,
    ),
    "convolution of two groups that widens": (nn.Conv2d(8, 12, 3, groups=2), 12, False),
    "depthwise convolution that widens": (nn.Conv2d(8, 16, 3, groups=8), 16, False),
    "group norm of two": (drawn(nn.GroupNorm(2, 8)), 8, True),
    "group norm of four": (drawn(nn.GroupNorm(4, 8)), 8, True),
    "group norm of one": (drawn(nn.GroupNorm(1, 8)), 8, True),
    "group norm of eight": (drawn(nn.GroupNorm(8, 8)), 8, True),
    "group norm after a convolution of four groups": (
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), drawn(nn.GroupNorm(2, 8))),
        8,
        True,
    ),
    "group norms of two and of four": (nn.Sequential(drawn(nn.GroupNorm(2, 8)), drawn(nn.GroupNorm(4, 8))), 8, True),
    "group norm of concatenated maps": (
        Doubled(drawn(nn.GroupNorm(2, 16))),
        16,
        False,
    ),
    "layer norm over channels": (drawn(LastNorm(8)), 8, True),
    "layer norm of channels last": (Last(drawn(nn.LayerNorm(8))), 8, True),
    "root mean square norm of channels last": (Last(drawn(nn.RMSNorm(8))), 8, True),
    "layer norm over pixels": (drawn(nn.LayerNorm((8, 8))), 8, False),
    "linear layers of channels last": (Last(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), 8, True),
    "slopes": (drawn(nn.PReLU(8)), 8, True),
    "instance norm with weights": (drawn(nn.InstanceNorm2d(8, affine=True)), 8, True),
    "one slope": (nn.PReLU(), 8, True),
    "layer scale": (Scale(8, 1, 1), 8, True),
    "layer scale of channels last": (Last(Scale(8)), 8, True),
    "a weight per pixel": (Scale(1, 8, 8), 8, False),
    "instance norm": (F.instance_norm, 8, True),
    "unfold": (unfolded, 8, True),
    "spatial attention": (Attending(), 8, False),
    "itself twice": (lambda maps: torch.cat([maps, maps], 1), 16, False),
    "halves added": (lambda maps: sum(maps.chunk(2, 1)), 4, False),
    "parts swapped": (lambda maps: torch.cat(maps.split([3, 5], 1)[::-1], 1), 8, False),
    "every second": (lambda maps: maps[:, ::2], 4, False),
    "pixel shuffle": (lambda maps: F.pixel_shuffle(maps, 2), 2, False),
    "gated linear unit": (lambda maps: F.glu(maps, 1), 4, False),
    "group norm": (nn.GroupNorm(2, 8, affine=False), 8, False),
    "response norm": (lambda maps: F.local_response_norm(maps, 3), 8, False),
    "mean added": (lambda maps: maps + maps.mean(1, keepdim=True), 8, False),
    "a constant per channel": (lambda maps: maps * torch.linspace(0.5, 2, 8).view(1, 8, 1, 1).to(maps), 8, False),
}


@pytest.mark.parametrize(("mix", "width", "cut"), BETWEEN.values(), ids=BETWEEN)
def test_what_is_between_convolutions_is_followed_or_its_channels_stay(mix, width, cut):
    torch.manual_seed(0)
    net = Between(mix, width)
    settle(net, 1)
    plan = plan_for(net, fraction=0.5)
    assert (bool(plan.pruned.get("c1")), bool(plan.pruned["c2"])) == (cut, True)
    torch.testing.assert_close(
        logits(prune(net, plan), EXAMPLE), logits(masked(net, plan), EXAMPLE), rtol=1e-4, atol=1e-6
    )


def test_two_cuts_of_a_group_norm_are_one_plan():
    """Whole groups first, then as many channels of each group that is left: the sum is neither, and can be applied."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3),
        drawn(nn.GroupNorm(4, 12)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    twice = classifier(net)
    for seed in (0, 1):
        twice = twice.cut(plan_for(twice.module, fraction=0.5, seed=seed))
    assert (twice.module[1].num_groups, twice.module[1].num_channels) == (2, 4)
    assert logits(prune(net, twice.plan), EXAMPLE).equal(logits(twice.module, EXAMPLE))


class Dense(nn.Module):
    """A group normalisation of maps beside maps that are made of them, in groups that no part of them fills."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 28, 3, padding=1), nn.Conv2d(28, 12, 3, padding=1)
        self.norm, self.fc = nn.GroupNorm(8, 40), nn.Linear(40, 3)

    def forward(self, x):
        first = self.a(x)
        both = torch.cat([first, self.b(F.relu(first))], 1)
        return self.fc(F.relu(self.norm(both)).mean((2, 3)))


class Sharing(nn.Module):
    """A weight per channel that two parts of the model share."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.one = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), Scale(8, 1, 1)
        self.two, self.read, self.fc = Scale(8, 1, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)
        self.two.gamma = self.one.gamma

    def forward(self, x):
        maps = self.two(F.relu(self.conv(self.one(F.relu(self.first(x))))))
        return self.fc(F.relu(self.read(maps)).mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "left", "reason"),
    [
        (Dense, {"a", "b"}, "norm divides them among others' channels"),
        (Sharing, {"first", "conv"}, "cross an operation|is the same tensor as"),
    ],
)
def test_layers_whose_channels_lie_across_others_are_left_out_by_name(net, left, reason):
    torch.manual_seed(0)
    if net is Dense:
        with pytest.raises(ModelError, match=reason):
            find_channels(net(), EXAMPLE)
        return
    found = find_channels(net(), EXAMPLE)
    assert set(found.left_out) == left
    assert all(re.search(reason, why) for why in found.left_out.values())


def test_whole_numbers_among_the_weights_are_left_alone(net):
    net.register_parameter("steps", nn.Parameter(torch.tensor(3), requires_grad=False))
    assert list(find_channels(net, EXAMPLE).taps) == ["0", "3"]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("end", ["flipped", "softmax", "scaled to length 1"])
def test_an_output_that_is_not_a_row_each_is_no_head(classes, end):
    ends = {
        "flipped": lambda out: out.flip(1),
        "softmax": lambda out: out.softmax(1),
        "scaled to length 1": lambda out: F.normalize(out, dim=1),
    }
    net = Between(tail=lambda maps: maps.mean((2, 3)))
    net.fc = nn.Linear(6, classes)
    with torch.no_grad():
        net.fc.bias[0] = -30.0  # what a model has learnt does not decide
    forward = net.forward
    net.forward = lambda x: ends[end](forward(x))
    with pytest.raises(ModelError, match="must come straight from a Linear layer"):
        head_layer(net, EXAMPLE)


def add_a_number_for_each_class(out):
    out += torch.arange(float(out.shape[1]))
    return out


def write_to(row):
    def write(out):
        out[:, row] -= 5
        return out

    return write


@pytest.mark.parametrize("write", [add_a_number_for_each_class, write_to(0), write_to(3), write_to(-1)])
def test_an_output_that_is_written_into_by_class_is_no_head(write):
    net = Between(tail=lambda maps: maps.mean((2, 3)))
    net.fc = nn.Linear(6, 5)
    forward = net.forward
    net.forward = lambda x: write(forward(x))
    with pytest.raises(ModelError, match="must come straight from a Linear layer"):
        head_layer(net, EXAMPLE)


def test_a_plan_that_cuts_a_grouped_convolution_inside_its_blocks_is_refused():
    net = Between(nn.Conv2d(8, 8, 3, groups=2))
    for kept in ({"mix.weight": {1: (0,)}}, {"mix.bias": {0: (0, 1, 2, 3)}}):
        shapes = {name: tuple(net.state_dict()[name].shape) for name in kept}
        with pytest.raises(PlanError, match="cuts the grouped convolution mix otherwise than by its blocks"):
            prune(net, PruningPlan(shapes, kept))


class Halves(nn.Module):
    """The channels of one convolution go with those of two others, half of them with each."""

    def __init__(self):
        super().__init__()
        self.whole, self.one, self.two = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.read, self.fc = nn.Conv2d(8, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        maps = F.relu(self.whole(x) + torch.cat([self.one(x), self.two(x)], 1))
        return self.fc(F.relu(self.read(maps)).mean((2, 3)))


def test_a_convolution_that_goes_with_two_others_is_cut_with_each_and_scored_by_neither():
    torch.manual_seed(0)
    net = Halves()
    channels = find_channels(net, EXAMPLE)
    assert [group.layers for group in channels.groups] == [("one",), ("two",), ("read",)]
    assert channels.left_out == {}
    scores = {"one": torch.tensor([0, 0, 1.0, 0]), "two": torch.tensor([2.0, 0, 0, 0])}
    plan = plan_for(net, scores, fraction=0.25)
    assert plan.kept["whole.weight"] == {0: (0, 1, 3, 5, 6, 7)}
    torch.testing.assert_close(
        logits(prune(net, plan), EXAMPLE), logits(masked(net, plan), EXAMPLE), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("layer", "went", "left"),
    [
        (nn.Conv2d(8, 8, 3, groups=4), [(4, 5, 6, 7)], (2, 4, 4)),  # blocks of two: those with the highest mean
        (drawn(nn.GroupNorm(2, 8)), [(2, 3, 6, 7)], (2, 4)),  # as many of each half
        (drawn(nn.GroupNorm(4, 8)), [(4, 5, 6, 7)], (2, 4)),  # whole groups
        (nn.Conv2d(8, 8, 3, groups=8), [(4, 5, 6, 7)], (4, 4, 4)),
    ],
    ids=["convolution of four groups", "group norm of two", "group norm of four", "depthwise convolution"],
)
def test_of_grouped_layers_whole_blocks_go_or_as_many_channels_of_each(layer, went, left):
    net = Between(layer)
    settle(net, 1)
    scores = dict.fromkeys(find_channels(net, EXAMPLE).taps, torch.arange(1.0, 9))
    plan = plan_for(net, {name: own for name, own in scores.items() if name != "c2"}, fraction=0.5)
    assert [plan.pruned["c1"]] == went
    cut = prune(net, plan).mix
    sizes = (cut.num_groups, cut.num_channels) if isinstance(cut, nn.GroupNorm) else None
    assert left == (sizes or (cut.groups, cut.in_channels, cut.out_channels))


@pytest.mark.parametrize(
    ("layer", "kept", "text"),
    [
        (
            nn.Conv2d(8, 8, 3, groups=4),
            (0, 2, 3),
            r"keeps \[1, 2, 0, 0\] of the 2 channels in each of the 4 blocks of mix",
        ),
        (
            drawn(nn.GroupNorm(2, 8)),
            (0, 1, 4),
            r"keeps \[2, 1\] of the 4 channels in each of the 2 blocks of mix.*or as many",
        ),
        (
            drawn(nn.GroupNorm(4, 8)),
            (0, 2, 3),
            r"keeps \[1, 2, 0, 0\] of the 2 channels in each of the 4 blocks of mix",
        ),
    ],
)
def test_a_plan_that_leaves_blocks_of_several_sizes_is_refused(layer, kept, text):
    plan = PruningPlan({"mix.weight": tuple(layer.weight.shape)}, {"mix.weight": {0: kept}})
    with pytest.raises(PlanError, match=text):
        prune(Between(layer), plan)


class Pooled(nn.Module):
    """A network that ends in a convolution with a row per class, which is pooled, as SqueezeNet does."""

    def __init__(self, end=lambda logits: logits):
        super().__init__()
        self.conv, self.head, self.end = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 1), end

    def forward(self, x):
        return self.end(F.relu(self.head(F.relu(self.conv(x)))).mean((2, 3)))


@pytest.mark.parametrize("end", [lambda logits: logits, lambda logits: logits.log_softmax(1)], ids=["pooled", "log"])
def test_the_row_of_a_class_goes_from_a_convolution_that_is_pooled_and_before_a_log_softmax(end):
    torch.manual_seed(0)
    net = Pooled(end)
    assert head_layer(net, EXAMPLE) == "head"
    whole = classifier(net)
    smaller = whole.without_rows([1])
    assert smaller.labels == (0, 2)
    expected, found = logits(net, EXAMPLE)[:, [0, 2]], logits(smaller.module, EXAMPLE)
    torch.testing.assert_close(found.softmax(1), expected.softmax(1))


@pytest.mark.parametrize(
    ("tail", "cut"),
    [
        (nn.Flatten(), True),
        (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6 * 64)), True),
        (lambda maps: maps.permute(0, 2, 3, 1).flatten(1), False),
    ],
    ids=["flattened", "flattened and normalised", "flattened with the channels last"],
)
def test_maps_that_are_flattened_are_followed_or_their_channels_stay(tail, cut):
    torch.manual_seed(0)
    net = Between(tail=tail, features=6 * 64)
    settle(net, 1)
    plan = plan_for(net, fraction=0.5)
    assert bool(plan.pruned.get("c2")) == cut
    torch.testing.assert_close(
        logits(prune(net, plan), EXAMPLE), logits(masked(net, plan), EXAMPLE), rtol=1e-4, atol=1e-6
    )


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(1, 4, 3), nn.LayerNorm(6), nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(self.norm(self.conv(x)).mean((2, 3)))


class Softened(Normed):
    def forward(self, x):
        return super().forward(x).softmax(1)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "no Conv2d layer.*use a CNN"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 3)),
            r"can lose channels \(0: 1 is a grouped convolution with 4 inputs and 8 outputs",
        ),
        (Normed(), "no convolution of the model can lose channels.*conv: its channels cross an operation"),
        (nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), "no convolution of the model can lose channels.*output"),
    ],
)
def test_unprunable_models_are_refused_with_module_reason_and_remedy(model, text):
    with pytest.raises(ModelError, match=text):
        find_channels(model, EXAMPLE)


def test_a_model_whose_output_is_not_a_linear_layer_is_refused():
    with pytest.raises(ModelError, match="must come straight from a Linear layer"):
        head_layer(Softened(), EXAMPLE)


def test_images_that_the_model_cannot_take_are_refused():
    net = build_model("vgg11", classes=3, colours=1)  # five times halved: 8 x 8 pixels are too few
    with pytest.raises(ModelError, match=r"the model cannot take images of shape \(1, 8, 8\)"):
        find_channels(net, EXAMPLE)


def test_a_convolution_that_is_never_called_is_left_alone(net):
    net.spare = nn.Identity()
    net.spare.unused = nn.Conv2d(1, 2, 3)
    assert list(find_channels(net, EXAMPLE).taps) == ["0", "3"]


def test_unknown_hooks_are_refused(net):
    with pytest.raises(ModelError, match=r"unlearn.hook must be one of activation, convolution, got 'output'"):
        find_channels(net, EXAMPLE, hook="output")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(({"fraction": f}, f"at least 0 and below 1, got {f}") for f in (1, -0.1, 2, float("nan"))),
        ({"end": "top"}, "unlearn.end must be one of highest, lowest, got 'top'"),
        ({"scope": "block"}, "unlearn.scope must be one of layer, global, got 'block'"),
        ({"scores": {"0": torch.ones(5)}}, r"scores of 0 must be 6 finite numbers, one per channel, got shape \(5,\)"),
        ({"scores": {"0": torch.full((6,), float("nan"))}}, "scores of 0 must be 6 finite numbers"),
    ],
)
def test_plans_refuse_bad_arguments(net, options, text):
    with pytest.raises(PlanError, match=text):
        plan_for(net, **{"scores": {"0": torch.ones(6)}, "fraction": 0.5, **options})


def test_a_plan_for_another_model_is_refused(net):
    plan = plan_for(net, fraction=0.5)
    with pytest.raises(PlanError, match=r"for 0.weight of shape \(6, 1, 3, 3\), the model has \(6, 3, 3, 3\)"):
        prune(make_net(colours=3), plan)
    with pytest.raises(PlanError, match=r"the plan is for 0.weight of shape .* the model has None"):
        prune(nn.Sequential(nn.Flatten()), plan)
    with pytest.raises(PlanError, match=r"keeps positions of '', whose shape it does not tell: it was changed"):
        prune(net, PruningPlan({}, {"": {}}))


@pytest.mark.parametrize("rows", [[], [0, 9], [-1, 2], [2, 1], [1, 1]])
def test_a_plan_that_keeps_impossible_positions_is_refused(net, rows):
    plan = PruningPlan({"0.weight": (6, 1, 3, 3)}, {"0.weight": {0: tuple(rows)}})
    with pytest.raises(PlanError, match=r"keeps positions of 0.weight \(axis 0\)"):
        prune(net, plan)


PLAN = {"schema": 1, "shapes": {}, "kept": {}, "pruned": {}, "left_out": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "expected a pruning plan as JSON"),
        ("[]", "expected a pruning plan as JSON"),
        ("[" * 100_000, "expected a pruning plan as JSON, but RecursionError"),
        *(
            (json.dumps(PLAN | {"shapes": {"0.weight": [size]}}), f"ValueError: {size!r} is no whole number")
            for size in (1.5, True, -1, float("inf"))
        ),
        (json.dumps({"schema": 9}), "expected a pruning plan of schema 1, got 9"),
    ],
)
def test_text_that_is_no_plan_is_refused(text, message):
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_json(text)


def with_log_softmax(classes):
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
    return nn.Sequential(*layers, nn.LogSoftmax(1))


def pooled_convolution(classes):
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(("make", "head"), [(with_log_softmax, "4"), (pooled_convolution, "2")])
def test_a_head_is_known_down_to_its_last_row(make, head):
    torch.manual_seed(0)
    model = classifier(make(4))
    rows = model.module.get_submodule(head).weight.detach().clone()
    for label in range(3):
        assert head_layer(model.module, model.example) == head
        model = model.without_rows([label])
    assert model.checked(4).labels == (3,)
    assert model.module.get_submodule(head).weight.equal(rows[3:])


def test_a_layer_of_two_rows_that_is_no_head_is_not_taken_for_one():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 2, bias=False), nn.Hardtanh())
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head, Mixed())
    with pytest.raises(ModelError, match="the model's output must come straight from a Linear layer"):
        head_layer(net, torch.rand(2, 1, 8, 8))


class Mixed(nn.Module):
    """Weighs the classes unequally."""

    def forward(self, logits):
        return logits * torch.tensor([1.0, 2.0])[: logits.shape[1]]


class Flattened(nn.Module):
    """Joins branches that were flattened before."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(1, 5, 3)
        self.last = nn.Linear(6 + 5 + 4, 3)

    def forward(self, images):
        one = self.a(images).relu()
        parts = self.b(one).relu(), self.c(images).relu(), one
        return self.last(torch.cat([part.mean((2, 3)) for part in parts], 1))


def test_every_convolution_is_cut_or_left_out_by_name():
    torch.manual_seed(0)
    found = find_channels(Flattened().eval(), torch.rand(2, 1, 8, 8))
    named = {layer for group in found.groups for layer in group.layers} | found.left_out.keys()
    assert named == {"a", "b", "c"}


class ByName(nn.Module):
    """Gives a layer its input by name."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 6, 3), nn.Linear(6, 3)

    def forward(self, images):
        return self.last(input=self.conv(images).relu().mean((2, 3)))


def test_a_layer_may_be_given_its_input_by_name():
    found = find_channels(ByName().eval(), torch.rand(2, 1, 8, 8))
    assert [group.layers for group in found.groups] == [("conv",)]


class Gated(nn.Module):
    """Weighs its maps by a convolution of one row, after the head of its classes."""

    def __init__(self, classes):
        super().__init__()
        self.conv, self.head, self.gate = nn.Conv2d(1, 6, 3), nn.Conv2d(6, classes, 1), nn.Conv2d(6, 1, 1)

    def forward(self, images):
        maps = self.conv(images).relu()
        return (self.head(maps) * self.gate(maps).sigmoid()).mean((2, 3))


def test_a_gate_is_not_taken_for_the_row_of_the_last_class():
    torch.manual_seed(0)
    model = classifier(Gated(2))
    assert head_layer(model.module, model.example) == "head"
    with pytest.raises(ModelError, match="the model's output must come straight from a Linear layer"):
        model.without_rows([0]).checked(2)


class Normalised(nn.Module):
    """Scales the logits of an image to the length 1."""

    def forward(self, logits):
        return F.normalize(logits)


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("last", [nn.Softmax(1), Normalised()])
def test_an_output_in_which_classes_scale_each_other_is_refused_for_any_number_of_classes(classes, last):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
    net = nn.Sequential(*layers, last)
    with pytest.raises(ModelError, match="the model's output must come straight from a Linear layer"):
        head_layer(net, torch.rand(2, 1, 8, 8))


def test_a_later_plan_numbers_channels_as_the_first_model_did(net):
    first = plan_for(net, {"0": torch.tensor([9.0, 0, 8, 0, 0, 0])}, fraction=0.34)
    second = plan_for(prune(net, first), {"0": torch.tensor([0, 5.0, 0, 0])}, fraction=0.25)
    assert first.then(second).pruned["0"] == (0, 2, 3)


def test_a_later_plan_says_what_it_left_out(net):
    first = plan_for(net, {"0": torch.ones(6), "3": torch.ones(8)}, fraction=0.5)
    second = plan_for(prune(net, first), {"0": torch.ones(3)}, fraction=0.5)
    assert first.then(second).left_out == {"3": "it was not scored"}


class Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        maps = self.c1(x).relu()
        return self.fc((maps + self.c2(maps).relu()).mean((2, 3)))


def test_tied_layers_are_ranked_by_the_mean_of_their_scores():
    torch.manual_seed(0)
    scores = {"c1": torch.tensor([1.0, 4, 0, 0]), "c2": torch.tensor([5.0, 0, 0, 0])}
    plan = plan_for(Added(), scores, fraction=0.25)
    assert plan.pruned == {"c1": (0,), "c2": (0,)}


def test_a_global_share_is_of_all_channels_together():
    scores = {"0": torch.full((6,), 9.0), "3": torch.ones(8)}
    plan = plan_for(make_net(), scores, fraction=0.3, scope="global")
    assert {layer: len(channels) for layer, channels in plan.pruned.items()} == {"0": 4, "3": 0}  # floor(.3 * 14)
