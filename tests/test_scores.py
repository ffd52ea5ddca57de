import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracles
from fedunlearn.channels.scores import contrast, forget_classes, margin, random_scores, tf_idf
from fedunlearn.channels.stats import ChannelStats
from fedunlearn.errors import PlanError


def stats_of(means, counts=None):
    means = torch.as_tensor(means, dtype=torch.float64)
    counts = torch.full((len(means),), 4) if counts is None else torch.tensor(counts)
    return ChannelStats({"conv": means * counts[:, None]}, counts)


MEANS = hnp.arrays(
    "float64",
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
    # multiples of 1/64: sums are exact, so that a tie is a tie in both versions
    elements=st.integers(0, 640).map(lambda n: n / 64),
)


@given(MEANS, st.data())
def test_scores_match_the_formulas_written_out_in_loops(means, data):
    target = data.draw(st.integers(0, len(means) - 1))
    a, stats = torch.tensor(means), stats_of(means)
    pairs = [(contrast(stats, target), oracles.contrast(a, target)), (margin(stats, target), oracles.margin(a, target))]
    for reference in ("class", "channel"):
        for smoothing in (0.0, 1.0):
            expected = oracles.tf_idf(a, target, reference=reference, smoothing=smoothing)
            pairs.append((tf_idf(stats, target, reference=reference, smoothing=smoothing), expected))
    for found, expected in pairs:
        torch.testing.assert_close(found["conv"], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_tf_idf_matches_numbers_worked_out_by_hand():
    # class 0: tf = 6/8, 2/8. Channel 0 is above its class's mean in class 0 alone: idf log(4/2); channel 1 in 1 and 2.
    found = tf_idf(stats_of([[6, 2], [0, 2], [0, 2]]), 0)["conv"].tolist()
    assert found == pytest.approx([0.75 * math.log(2), 0.25 * math.log(4 / 3)])


@pytest.mark.parametrize("width", [2, 7, 48])
def test_channels_alike_in_all_classes_score_zero_whatever_the_mean_rounds_to(width):
    assert tf_idf(stats_of([[0.1] * width] * 10), 0)["conv"].tolist() == pytest.approx([0.0] * width, abs=1e-12)


def test_contrast_and_margin_match_numbers_worked_out_by_hand():
    stats = stats_of([[3.0], [1.0], [2.0]])
    assert float(contrast(stats, 0)["conv"]) == pytest.approx((3 - 1.5) / (3 + 1.5))
    assert float(margin(stats, 0)["conv"]) == pytest.approx((3 - 2) / (3 + 2))


@pytest.mark.parametrize("criterion", [tf_idf, contrast, margin])
def test_a_channel_active_for_every_class_never_outranks_one_active_for_the_forgotten_class_alone(criterion):
    scores = criterion(stats_of([[5.0, 5.0, 0.0], [0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]), 0)["conv"]
    assert scores[0] > scores[1]
    assert scores[2] <= 0


@pytest.mark.parametrize("criterion", [tf_idf, contrast, margin])
def test_a_silent_layer_scores_zero_not_nan(criterion):
    assert criterion(stats_of([[0.0, 0.0], [0.0, 0.0]]), 1)["conv"].tolist() == [0, 0]


@pytest.mark.parametrize("criterion", [tf_idf, contrast, margin])
def test_a_class_that_nobody_holds_changes_nothing(criterion):
    means = [[3.0, 1.0], [1.0, 2.0], [9.0, 9.0]]
    with_absent = criterion(stats_of(means, [4, 4, 0]), 0)["conv"]
    assert with_absent.tolist() == criterion(stats_of(means[:2]), 0)["conv"].tolist()


@given(MEANS)
def test_several_classes_are_pooled_into_one(means):
    means = torch.cat([torch.tensor(means), torch.ones(1, means.shape[1])])  # at least one class stays
    pooled = torch.cat([means[:2].mean(0, keepdim=True), means[2:]])
    for criterion in (tf_idf, contrast, margin):
        torch.testing.assert_close(criterion(stats_of(means), [0, 1])["conv"], criterion(stats_of(pooled), 0)["conv"])


def test_random_scores_are_repeatable_positive_and_differ_by_seed():
    stats = stats_of(torch.ones(2, 50))
    one, again, other = (random_scores(stats, 0, seed=seed)["conv"] for seed in (1, 1, 2))
    assert one.equal(again)
    assert not one.equal(other)
    assert float(one.min()) > 0


def test_scores_print_their_layers():
    assert repr(contrast(stats_of([[3.0], [0.0]]), 0)) == "ChannelScores(conv max 1)"


@pytest.mark.parametrize(
    ("forget", "text"),
    [
        ([3], r"must lie in 0 \.\. 2, got 3: check unlearn.forget"),
        (-1, r"must lie in 0 \.\. 2, got -1"),
        ([], r"one or more different ones, got \[\]"),
        ([1, 1], r"one or more different ones, got \[1, 1\]"),
        ([0, 1, 2], "all 3 classes are to be forgotten"),
    ],
)
def test_classes_that_cannot_be_forgotten_are_refused(forget, text):
    with pytest.raises(PlanError, match=text):
        forget_classes(forget, 3)


def test_criteria_refuse_what_they_cannot_score():
    stats = stats_of([[1.0], [1.0]], [4, 0])
    with pytest.raises(PlanError, match=r"no client holds an image of class 1, or enough of them to tell \(privacy"):
        tf_idf(stats, 1)
    with pytest.raises(PlanError, match=r"no client holds an image of any class but \[0\]"):
        contrast(stats, 0)
    with pytest.raises(PlanError, match=r"unlearn.reference must be one of class, channel, got 'rows'"):
        tf_idf(stats, 0, reference="rows")


def test_several_classes_are_pooled_by_their_images():
    stats, one = stats_of([[4.0, 0.0], [0.0, 4.0], [1.0, 1.0]], [3, 1, 4]), stats_of([[3.0, 1.0], [1.0, 1.0]])
    for criterion in (tf_idf, contrast, margin):
        torch.testing.assert_close(criterion(stats, [0, 1])["conv"], criterion(one, 0)["conv"])


def test_random_scores_are_drawn_anew_for_each_layer_and_seed():
    stats = ChannelStats({"a": torch.ones(2, 50), "b": torch.ones(2, 50)}, torch.ones(2).long())
    assert not random_scores(stats, 0)["a"].equal(random_scores(stats, 0)["b"])
    assert not random_scores(stats, 0)["a"].equal(random_scores(stats, 1)["a"])
