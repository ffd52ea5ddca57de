"""Each audit against its formula written out, and the laws of the verdict."""

import json
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from conftest import classifier, logits, make_images, make_net, normalised
from fedunlearn.audits import audit as auditing
from fedunlearn.audits import verdict
from fedunlearn.audits.accuracy import confusion
from fedunlearn.audits.artefacts import artefacts
from fedunlearn.audits.audit import Record, audit, measure
from fedunlearn.audits.base import (
    Audit,
    Figure,
    FigureKind,
    Found,
    Shipped,
    Subject,
    View,
    alike,
    by_class,
    error_by_class,
    share,
)
from fedunlearn.audits.findings import Findings
from fedunlearn.audits.images import audit_images
from fedunlearn.audits.linear_probe import linear_probe
from fedunlearn.audits.membership import membership, rmia, signal
from fedunlearn.audits.neighbours import jensen_shannon, mean_output, total_variation
from fedunlearn.audits.observe import observe
from fedunlearn.audits.prototypes import prototype_accuracy
from fedunlearn.audits.reestimation import reestimated
from fedunlearn.audits.relearn import relearn, with_all_rows
from fedunlearn.audits.representation import linear_cka, procrustes
from fedunlearn.audits.rounding import rounded
from fedunlearn.audits.table import AUDITS, FIGURES
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.plan import Classifier, Cut, plan_pruning
from fedunlearn.channels.scores import ChannelScores
from fedunlearn.checkpoint import save_checkpoint
from fedunlearn.errors import DataError, EvidenceError, ModelError, RunError
from fedunlearn.evidence import words
from fedunlearn.run.result import evaluate
from fedunlearn.training.sgd import Training, train_locally

IMAGES = audit_images(make_images(160, 4), make_images(80, 4, seed=1), forget=[2], per_class=30, seed=0)
distributions = st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda p: sum(p) > 0.01)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def trained_net(seed, *, exclude=()):
    """Return a net that knows the striped images of all classes but ``exclude``."""
    net, images = make_net(classes=4, seed=seed), make_images(160, 4).without(exclude)
    for epoch in range(12):
        train_locally(net, images, Training(lr=0.1, batch_size=16), lr=0.1, draw=draw(100 * seed + epoch))
    return net.eval()


def whole_model(net):
    """Return ``net``, which has a row for every class, as it is."""
    model = Classifier.of(net, (1, 8, 8))
    return Subject(model, model)


def delivered(net):
    """Return ``net`` without the row of class 2."""
    return Subject.without_rows(Classifier.of(net, (1, 8, 8)), [2])


@pytest.fixture(scope="module")
def nets():
    """The original, and four nets retrained without class 2."""
    return trained_net(0), [trained_net(seed, exclude=(2,)) for seed in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def set_of_images():
    return audit_images(make_images(160, 4), make_images(80, 4, seed=1), forget=[2], per_class=30, seed=0)


# what a model makes of images


def test_observing_gives_logits_features_and_mean_activations(net, images):
    seen = observe(net, images, layers=True)
    inputs = normalised(images)
    torch.testing.assert_close(seen.logits, logits(net, inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.features, logits(net[:-1], inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.layers["0"], logits(net[:3], inputs).mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.layers["3"], logits(net[:6], inputs).mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_a_rare_class_that_is_named_is_seen_beside_one_that_is_not():
    right, truth = torch.tensor([False] * 1000 + [True] * 5), torch.tensor([3] * 1000 + [7] * 5)
    found = by_class(right, truth)
    assert found.value == 0.5
    assert found.error == pytest.approx(math.hypot(share(0, 1000).error, share(5, 5).error) / 2)
    assert by_class(right, torch.zeros(1005, dtype=torch.int64)) == share(5, 1005)
    assert error_by_class(0.25, truth) == pytest.approx(math.hypot(share(250, 1000).error, share(1, 5).error) / 2)


def test_of_a_rare_class_and_a_frequent_one_all_figures_are_means_over_both(nets):
    original, _ = nets
    train, test = make_images(160, 4), make_images(80, 4, seed=1)
    few = torch.cat([(test.labels != 1).nonzero().flatten(), (test.labels == 1).nonzero().flatten()[:2]])
    images = audit_images(train, test.take(few), forget=[1, 2], per_class=30, seed=0)
    gone = Classifier.of(original, (1, 8, 8))
    with torch.no_grad():
        gone = gone.copy()
        gone.module[-1].weight[2], gone.module[-1].bias[2] = 0, -100  # class 2 is never named, class 1 as before
    view = View(Subject(gone, gone).checked("a", 4, [1, 2]), images)
    figures = measure([own for own in AUDITS if own.name in ("accuracy", "rounding")], view).figures
    for name in ("forget", "int8"):
        assert figures[name].value == pytest.approx(0.5), name
    accuracy = evaluate(gone, test.take(few), forget=[1, 2])["accuracy"]
    assert accuracy["forget"] == accuracy["forget_row_kept"] == pytest.approx(0.5)


def test_confusion_counts_what_a_loop_counts():
    scores, truth = torch.randn(50, 3, generator=draw()), torch.randint(0, 4, (50,), generator=draw())
    table = torch.zeros(4, 4, dtype=torch.int64)
    for row, label in zip(scores, truth):
        table[label, [0, 1, 3][int(row.argmax())]] += 1
    assert confusion(scores, truth, labels=[0, 1, 3], classes=4).equal(table)


def test_reestimation_brings_back_what_only_the_statistics_hid(nets):
    original, _ = nets
    hidden, test = make_net(classes=4), make_images(80, 4, seed=1)
    hidden.load_state_dict(original.state_dict())
    hidden[4].running_mean += 100  # as if pruning had shifted what this layer receives: its channels fall silent
    fitted = reestimated(hidden, make_images(160, 4).without([2]), draw=draw())
    before, after = ((observe(own, test).logits.argmax(1) == test.labels).float().mean() for own in (hidden, fitted))
    assert before <= 0.3
    assert after > 0.8
    assert hidden[4].running_mean.equal(original[4].running_mean + 100)


def test_a_probe_finds_what_is_separable_and_nothing_in_noise():
    truth = torch.arange(300) % 3
    told = torch.nn.functional.one_hot(truth, 5).float() + 0.1 * torch.randn(300, 5, generator=draw())
    noise = torch.randn(300, 5, generator=draw(1))
    assert (linear_probe(told[:200], truth[:200], told[200:]) == truth[200:]).float().mean() == 1
    assert (linear_probe(noise[:200], truth[:200], noise[200:]) == truth[200:]).float().mean() < 0.5


def test_prototypes_of_all_images_are_the_class_means_of_a_loop():
    features, truth = torch.randn(40, 6, generator=draw()), torch.arange(40) % 4
    test, test_truth = torch.randn(20, 6, generator=draw(1)), torch.arange(20) % 4
    unit = [row / row.norm() for row in features]
    right = 0
    for row, label in zip(test, test_truth):
        distances = [
            float(((row / row.norm()) - torch.stack([u for u, t in zip(unit, truth) if t == k]).mean(0)).norm())
            for k in range(4)
        ]
        right += distances.index(min(distances)) == int(label)
    found = prototype_accuracy(features, truth, test, test_truth, shots=10, draws=2, draw=draw())
    assert found.tolist() == [right / 20, right / 20]


def test_relearning_a_retrained_model_twice_gives_the_same_curve(nets, set_of_images):
    own = delivered(nets[1][0])
    forgotten = set_of_images.forgotten(set_of_images.test)
    curves = [relearn(own.model, set_of_images.known, forgotten, lr=0.05, doublings=3, draw=draw()) for _ in range(2)]
    assert curves[0] == curves[1]
    assert curves[0].forget[0] == 0
    assert curves[0].samples_until(1.1) is None


def test_what_was_delivered_frozen_relearns_as_what_was_not(nets, set_of_images):
    forgotten = set_of_images.forgotten(set_of_images.test)
    whole, delivered_frozen = Classifier.of(nets[0], forgotten.shape), delivered(nets[1][0])
    for model in (whole, delivered_frozen.model):
        frozen = model.copy()
        frozen.module.requires_grad_(False)
        one, two = (
            relearn(own, set_of_images.known, forgotten, lr=0.05, doublings=2, draw=draw()) for own in (model, frozen)
        )
        assert one == two
        assert not any(own.requires_grad for own in frozen.module.parameters())


def test_relearning_ends_with_fewer_images_than_a_batch(nets):
    few = make_images(20, 4)
    curve = relearn(Classifier.of(nets[0], few.shape), few, few, lr=0.01, doublings=2, draw=draw())
    assert curve.samples == (0, 80, 140, 260)  # epochs of 20, beyond 64, 128 and 256


def test_relearning_starts_from_the_rows_that_are_there(nets):
    rowless = delivered(nets[0]).model
    inputs = normalised(make_images(20, 4))
    grown = with_all_rows(rowless, 4)
    assert grown.labels == (0, 1, 3, 2)
    torch.testing.assert_close(logits(grown.module, inputs)[:, :3], logits(rowless.module, inputs))
    torch.testing.assert_close(logits(grown.module, inputs)[:, 3], rowless.module[-1].bias.mean().expand(20))
    whole = with_all_rows(Classifier.of(nets[0], (1, 8, 8)), 4)
    torch.testing.assert_close(logits(whole.module, inputs), logits(nets[0], inputs))


@given(distributions, distributions)
@example([0.0, 1.0], [5e-324, 1.0])
def test_distances_of_outputs_are_symmetric_in_0_to_1_and_0_to_themselves(p, q):
    p, q = (torch.tensor(own, dtype=torch.float64) / sum(own) for own in (p, q))
    for distance in (total_variation, jensen_shannon):
        assert distance(p, q) == pytest.approx(distance(q, p), abs=1e-12)
        assert -1e-12 <= distance(p, q) <= 1 + 1e-12
        assert distance(p, p) == pytest.approx(0, abs=1e-12)


def test_the_mean_output_leaves_the_forgotten_row_out():
    scores = torch.randn(30, 3, generator=draw())
    with_row = mean_output(scores, labels=[0, 1, 2], kept=[0, 2])
    without = mean_output(scores[:, [0, 2]], labels=[0, 2], kept=[0, 2])
    torch.testing.assert_close(with_row, without)


def test_membership_is_a_coin_toss_when_seen_and_unseen_come_from_one_pool():
    """The 95 % intervals hold chance in 95 of 100 draws: 88 are three standard deviations fewer."""
    pools = torch.randn(100, 1000, generator=draw())
    found = [membership(pool[:250], pool[250:]).to_dict() for pool in pools]
    for name, chance, width in (("auc", 0.5, 0.1), ("tpr", 0.01, 0.05)):
        intervals = torch.tensor([own[f"{name}_interval"] for own in found])
        held = (intervals[:, 0] <= chance) & (chance <= intervals[:, 1])
        assert int(held.sum()) >= 88, name
        assert float((intervals[:, 1] - intervals[:, 0]).median()) < width, name


def test_the_auc_is_the_share_of_pairs_in_order_and_the_tpr_that_above_all_but_1_percent():
    members, others = torch.randn(30, generator=draw()) + 1, torch.randn(200, generator=draw(1))
    pairs = [float(m > o) + 0.5 * float(m == o) for m in members for o in others]
    found = membership(members, others)
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))
    threshold = sorted(others.tolist())[-3]  # two of 200 lie above
    assert found.tpr == sum(m > threshold for m in members.tolist()) / 30
    resampled = [
        membership(
            members[torch.randint(0, 30, (30,), generator=g)], others[torch.randint(0, 200, (200,), generator=g)]
        )
        for g in [draw(2)]
        for _ in range(300)
    ]
    assert found.auc_error == pytest.approx(float(np.std([own.auc for own in resampled])), rel=0.3)


@pytest.mark.parametrize("members", [[1.0, math.nan], [-math.inf, 1.0], []])
def test_membership_of_scores_that_are_no_numbers_is_refused(members):
    with pytest.raises(EvidenceError, match=r"membership needs scores of at least one member .* all of them finite"):
        membership(torch.tensor(members), torch.tensor([0.0, 1.0]))


def test_rmia_orders_images_as_the_count_over_other_images_does():
    target, references = torch.rand(25, generator=draw()).log(), torch.rand(3, 25, generator=draw(1)).log()
    z, z_references = torch.rand(400, generator=draw(2)), torch.rand(3, 400, generator=draw(3))
    ratio_z = z / z_references.mean(0)
    counted = [
        sum(float(target[i].exp() / references[:, i].exp().mean()) / float(other) >= 1 for other in ratio_z)
        for i in range(25)
    ]
    score = rmia(target, references)
    assert all(counted[i] <= counted[j] for i in range(25) for j in range(25) if score[i] < score[j])


def test_the_signal_of_an_image_without_a_row_is_its_largest_probability():
    scores = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    expected = scores[0].softmax(0).log()[[0, 1, 0]]
    torch.testing.assert_close(signal(scores, torch.tensor([0, 3, 7]), labels=[0, 3]), expected.double())


def test_cka_and_procrustes_agree_with_gram_matrices_and_ignore_rotation_scale_and_dead_channels():
    x, y = torch.randn(20, 4, generator=draw()), torch.randn(20, 3, generator=draw(1))
    centring = torch.eye(20) - 1 / 20
    k, other = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    assert linear_cka(x, y) == pytest.approx(float((k * other).sum() / (k.norm() * other.norm())), abs=1e-6)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=draw(2)))
    assert linear_cka(x, 5 * x @ rotation + 2) == pytest.approx(1, abs=1e-6)
    assert procrustes(x, 5 * x @ rotation + 2) == pytest.approx(0, abs=1e-5)
    padded = torch.cat([y, torch.zeros(20, 2)], 1)
    assert linear_cka(x, padded) == pytest.approx(linear_cka(x, y))
    assert procrustes(x, padded) == pytest.approx(procrustes(x, y), abs=1e-6)
    assert linear_cka(x, torch.ones(20, 2)) == 0
    assert procrustes(x, torch.ones(20, 2)) == 2


def test_rounding_leaves_few_levels_per_channel_and_at_16_bits_the_same_logits(net, images):
    coarse = rounded(net, 4)
    for before, after in zip(net[3].weight, coarse[3].weight):
        levels = after / (before.abs().max() / 7)
        torch.testing.assert_close(levels, levels.round())
        assert levels.abs().max() <= 7.001
    inputs = normalised(images)
    torch.testing.assert_close(logits(rounded(net, 16), inputs), logits(net, inputs), rtol=1e-3, atol=1e-3)


# what is shipped


@pytest.fixture
def shipped(tmp_path):
    """A pruned net with its file, and its original."""
    net = make_net(classes=3)
    original = Classifier.of(net, (1, 8, 8))
    scores = ChannelScores({"0": torch.arange(1.0, 7.0), "3": torch.arange(1.0, 9.0)})
    pruned = original.cut(plan_pruning(find_channels(net, original.example), scores, Cut(0.3)))
    small = pruned.without_rows([1])
    write_shipped(tmp_path / "model.safetensors", small)
    return tmp_path / "model.safetensors", net, small


def write_shipped(path, model):
    save_checkpoint(path, model, images=make_images(8, 4), architecture={"name": "x", "shortcut": "A"})


def test_a_clean_file_has_no_artefacts(shipped):
    path, net, _ = shipped
    assert artefacts(path, state=net.state_dict(), forget=[1]) == []


def test_artefacts_are_named(shipped):
    path, net, small = shipped
    write_shipped(path, replace(small, module=net, labels=(0, 1, 2)))
    found = artefacts(path, state=net.state_dict(), forget=[1])
    assert "the labels name the forgotten class 1" in found
    assert "tensor 8.weight has shape [3, 8], the plan leaves [2, 6]" in found
    assert any(line.startswith("filter 5 of 0.weight is still in the file") for line in found)
    small.module.register_buffer("momentum", torch.zeros(3))
    write_shipped(path, small)
    assert artefacts(path, state=net.state_dict(), forget=[1]) == ["tensor momentum is not of the architecture"]


def test_a_file_of_another_kind_is_refused_by_the_artefact_scan(shipped, tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="expected a model written by fedunlearn"):
        artefacts(path, state={}, forget=[1])
    with safe_open(shipped[0], "pt") as file:
        whole = json.loads(file.metadata()["fedunlearn"])
    strange = ({"plan": {"kept": 1}}, {"labels": [[0], 2]}, {"labels": "02"}, {"classes": "ab"})
    nameless = {name: whole[name] for name in whole if name != "classes"}
    for about in ({}, [], nameless, *(whole | own for own in strange)):
        save_file({"a": torch.zeros(1)}, path, {"fedunlearn": json.dumps(about)})
        with pytest.raises(ModelError, match="expected a model written by fedunlearn"):
            artefacts(path, state={}, forget=[1])


def test_what_the_original_does_not_have_is_an_artefact(shipped):
    path, net, _ = shipped
    state = net.state_dict()
    del state["3.weight"]
    state["0.weight"] = torch.tensor(1)  # such as a counter
    found = artefacts(path, state=state, forget=[1])
    assert "tensor 3.weight is not of the architecture" in found
    assert "the plan cuts 3.weight, which is not of the architecture" in found


# images


def test_images_without_the_class_are_refused():
    whole = make_images(40, 4)
    with pytest.raises(DataError, match=r"training images hold none of class 2 \(class 2\)"):
        audit_images(whole.without([2]), whole, forget=[2], per_class=10, seed=0)
    with pytest.raises(DataError, match=r"test images hold none of class 2"):
        audit_images(whole, whole.without([2]), forget=[2], per_class=10, seed=0)
    with pytest.raises(DataError, match="hold forgotten classes only"):
        audit_images(whole.without([0, 1, 3]), whole, forget=[2], per_class=10, seed=0)


def test_duplicates_across_training_and_test_are_left_out_of_membership_and_counted(nets):
    train, test = make_images(160, 4), make_images(80, 4, seed=1)
    pixels = test.images.clone()
    pixels[:3] = train.images[:3]  # classes 0, 1, 2
    own = audit_images(train, replace(test, images=pixels), forget=[2], per_class=30, seed=0)
    assert own.duplicates == 3
    assert own.others.tolist() == list(range(3, 80))
    assert not any(image.equal(train.images[2]) for image in own.members.images)
    views = [View(delivered(net), own) for net in nets[1]]
    found = measure(AUDITS, views[0], views[1:])
    assert found.details["membership"]["duplicates_left_out"] == 3
    assert found.details["membership"]["forget"]["members"] == 39
    assert found.details["membership"]["forget"]["others"] == 19


def test_known_images_are_balanced_and_members_hold_all_of_the_class(set_of_images):
    assert set_of_images.known.counts().tolist() == [30, 30, 30, 30]
    assert int(set_of_images.members.counts()[2]) == 40
    assert len(set_of_images.members) == 80
    assert set_of_images.kept == (0, 1, 3)


# verdict


def figures(**values):
    always = {"forget": 0.0, "retain": 0.9, "relearn": 0.4, "neighbours": 0.12}
    return {name: Figure(value, 0.01) for name, value in (always | values).items()}


ORACLES = [
    figures(probe=0.74, neighbours=0.11),
    figures(probe=0.75, neighbours=0.12),
    figures(probe=0.76, neighbours=0.13),
]


def test_a_band_is_the_prediction_interval_by_hand():
    band = verdict.calibrate([{"probe": own["probe"]} for own in ORACLES])["probe"]
    half = 4.302653 * 0.01 * math.sqrt(4 / 3)
    assert (band.low, band.high) == (pytest.approx(0.75 - half), pytest.approx(0.75 + half))
    band = verdict.calibrate(ORACLES)["probe"]
    half = 9.924843 * 0.01 * math.sqrt(4 / 3)  # five figures: one in a hundred each
    assert (band.low, band.high) == (pytest.approx(0.75 - half), pytest.approx(0.75 + half))
    band = verdict.calibrate(ORACLES)["forget"]  # they agree, so that the error counts, which is known: z in place of t
    assert band.high == pytest.approx(2.575829 * 0.01 * math.sqrt(4 / 3))
    assert band.sd == pytest.approx(0.01 * 2.575829 / 9.924843)


@pytest.mark.parametrize("figures", [1, 5])
@pytest.mark.parametrize("oracles", [3, 5, 10])
def test_one_more_retrained_model_passes_19_times_in_20(oracles, figures):
    names = ("probe", "relearn", "forget", "retain", "cka")[:figures]
    values = torch.randn(2000, oracles + 1, figures, generator=draw(), dtype=torch.float64) * 0.1 + 0.5
    inside = 0
    for models in values:
        *others, held = [{name: Figure(float(v)) for name, v in zip(names, own)} for own in models]
        bands = verdict.calibrate(others)
        inside += all(bands[name].low <= own.value <= bands[name].high for name, own in held.items())
    # Bonferroni's inequality is near to an equality for figures that have nothing to do with each other.
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_figures_that_go_together_fail_together():
    values = torch.randn(2000, 6, generator=draw(), dtype=torch.float64)
    inside = 0
    for own in values:
        *others, held = [{"probe": Figure(float(v)), "relearn": Figure(float(v))} for v in own]
        bands = verdict.calibrate(others)
        inside += all(bands[name].low <= figure.value <= bands[name].high for name, figure in held.items())
    assert inside / 2000 > 0.96


@pytest.mark.parametrize(
    ("changed", "expected", "decided"),
    [
        ({}, verdict.INDISTINGUISHABLE, ["forget", "retain", "probe", "relearn", "neighbours"]),
        ({"retain": 0.99}, verdict.INDISTINGUISHABLE, ["forget", "retain", "probe", "relearn", "neighbours"]),
        ({"forget": 0.5}, verdict.NOT_FORGOTTEN, ["forget"]),
        ({"forget": 0.15}, verdict.SUPPRESSED, ["forget"]),  # above the band, below chance
        ({"probe": 1.01}, verdict.SUPPRESSED, ["probe"]),
        ({"neighbours": 0.4}, verdict.SUPPRESSED, ["neighbours"]),
        ({"retain": 0.5}, verdict.SUPPRESSED, ["retain"]),
        ({"probe": 0.1, "neighbours": 0.0}, verdict.SUPPRESSED, ["probe"]),
    ],
)
def test_verdicts(changed, expected, decided):
    own = figures(**({"probe": 0.75, "neighbours": 0.12} | changed))
    found = verdict.judge(own, verdict.calibrate(ORACLES), oracles=3, chance=0.2)
    assert (found["verdict"], found["decided_by"]) == (expected, decided)


def test_the_reason_tells_a_class_that_is_found_from_a_model_that_is_merely_different():
    bands = verdict.calibrate(ORACLES)
    more = verdict.judge(figures(probe=1.01, neighbours=0.12), bands, oracles=3, chance=0.1)
    unlike = verdict.judge(figures(probe=0.75, neighbours=0.4), bands, oracles=3, chance=0.1)
    assert "knows more of the class" in more["reason"]
    assert "no audit finds more of the class" in unlike["reason"]
    assert more["audits"]["probe"]["distance"] == pytest.approx(0.26 / 0.01)


def test_too_few_retrained_models_give_figures_and_no_verdict():
    found = verdict.judge(figures(probe=0.75), verdict.calibrate(ORACLES[:2]), oracles=2, chance=0.1)
    assert found["verdict"] == verdict.NO_VERDICT
    assert "at least 3 are needed: every figure is reported without a verdict" in found["reason"]
    assert found["audits"]["probe"]["figure"] == 0.75
    alone = verdict.judge(figures(probe=0.75), verdict.calibrate([]), oracles=0, chance=0.1)
    assert alone["audits"]["probe"] == {"figure": 0.75, "error": 0.01, "band": None, "distance": None, "verdict": None}


def test_a_pass_needs_the_figures_that_any_model_gives():
    bands = verdict.calibrate([own | {"probe": Figure(0.7)} for own in ORACLES])
    nothing = verdict.judge({}, bands, oracles=3, chance=0.1)
    assert (nothing["verdict"], nothing["decided_by"]) == (verdict.NO_VERDICT, [])
    assert "retain, probe, relearn, neighbours cannot be held against a band" in nothing["reason"]
    alone = verdict.judge({"retain": Figure(0.9, 0.01)}, bands, oracles=3, chance=0.1)
    assert alone["verdict"] == verdict.NO_VERDICT
    assert alone["reason"].endswith("probe, relearn, neighbours cannot be held against a band")
    found = verdict.judge({"probe": Figure(0.99)}, bands, oracles=3, chance=0.1)
    assert found["verdict"] == verdict.SUPPRESSED  # a trace needs no other figure beside it


def test_a_pass_means_nothing_beside_a_control_that_fails_only_by_what_the_candidate_lacks():
    bands = verdict.calibrate([own | {"retain": Figure(0.9)} for own in ORACLES])
    knows = figures(probe=0.75, neighbours=0.12, forget=0.9)  # nothing but U tells it from retraining

    def held(controls, **own):
        judgement = verdict.judge(own, bands, oracles=3, chance=0.1)
        assert judgement["verdict"] == verdict.INDISTINGUISHABLE
        return verdict.controlled(judgement, controls, bands, oracles=3, chance=0.1)

    whole = figures(probe=0.75, neighbours=0.12)
    rowless = {name: figure for name, figure in whole.items() if name != "forget"}
    assert held({"original": knows}, **whole)["verdict"] == verdict.INDISTINGUISHABLE
    found = held({"original": knows}, **rowless)
    assert (found["verdict"], found["decided_by"]) == (verdict.NO_VERDICT, [])
    assert "the audits cannot tell original from retraining" in found["reason"]
    assert held({}, **whole)["reason"] == verdict.NO_CONTROL
    fails = {"original": figures(probe=1.01, neighbours=0.12)}
    assert held(fails, **rowless)["verdict"] == verdict.INDISTINGUISHABLE
    suppressed = verdict.judge(figures(probe=1.01), bands, oracles=3, chance=0.1)
    assert verdict.controlled(suppressed, {}, bands, oracles=3, chance=0.1) == suppressed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_in_a_retrained_model_has_no_band(value):
    oracles = [*ORACLES, figures(probe=value, neighbours=0.12)]
    bands = verdict.calibrate(oracles)
    assert "probe" not in bands
    found = verdict.judge(figures(probe=0.75), bands, oracles=4, chance=0.1)
    assert found["verdict"] == verdict.NO_VERDICT
    assert found["reason"].endswith("of every retrained model too: probe cannot be held against a band")


def test_a_model_does_not_pass_by_a_figure_that_retrained_models_lack(nets, set_of_images):
    """Retrained models that came without the row give U no band: no model that names the class is held against one."""
    bands = verdict.calibrate([{name: own for name, own in one.items() if name != "forget"} for one in ORACLES])
    found = verdict.judge(figures(probe=0.75, neighbours=0.12, forget=0.567), bands, oracles=3, chance=0.1)
    assert found["verdict"] == verdict.NO_VERDICT
    assert "of every retrained model too: forget cannot be held against a band" in found["reason"]
    rowless = {str(k): Subject(Classifier.of(net, (1, 8, 8)).without_rows([2])) for k, net in enumerate(nets[1][:3])}
    before = {"original": whole_model(nets[0])}
    done = audit(whole_model(nets[1][3]), set_of_images, oracles=rowless, controls=before)
    assert done.verdict in (verdict.NO_VERDICT, verdict.SUPPRESSED)
    suppressed = verdict.judge(figures(probe=1.01, forget=1.0), bands, oracles=3, chance=0.1)
    told = {"classes": ["a", "b", "c", "d"], "forget": [2], **suppressed, "model": {}}
    assert "no more often than" not in words.summary(told)
    assert "The model names “c” in 100.0 % of its images, which no retrained model is held against" in words.summary(
        told
    )


def test_a_model_with_some_rows_of_forgotten_classes_or_in_another_order_is_refused(nets):
    model = Classifier.of(nets[0], (1, 8, 8))
    for some in (model.without_rows([3]), replace(model, labels=(0, 1, 3, 2))):
        with pytest.raises(
            ModelError, match=r"the audit of a: its output rows are of the classes \[.*expected all of 0"
        ):
            Subject(some).checked("a", 4, [2, 3])
    assert Subject(model.without_rows([2, 3])).checked("a", 4, [2, 3]).row_kept is None


def test_relearning_does_not_start_with_a_row_that_was_left_in_place(nets, set_of_images):
    """With its bias at -60 the row says nothing of what the features know; the original alone keeps its own."""
    model = Classifier.of(nets[0], (1, 8, 8)).copy()
    with torch.no_grad():
        model.module[-1].bias[2] -= 60
    audits = [own for own in AUDITS if own.name == "relearn"]

    def relearned(subject, **options):
        view = View(subject.checked("a", 4, [2]), set_of_images, **options)
        return measure(audits, view).details["relearn"]["forget"]

    assert relearned(Subject(model)) == relearned(Subject.without_rows(model, [2])) == relearned(delivered(nets[0]))
    assert relearned(Subject(model), before=True)[0] == 0.0
    assert relearned(Subject(model))[0] > 0.0
    oracles = {str(k): delivered(net) for k, net in enumerate(nets[1][1:])}
    found = audit(delivered(nets[1][0]), set_of_images, oracles=oracles, controls={"original": Subject(model)})
    assert found.models["original"].details["relearn"]["forget"] == relearned(Subject(model), before=True)


def test_relearning_draws_its_dropout_and_leaves_the_draws_of_others(nets, set_of_images):
    net = nn.Sequential(*nets[0][:-1], nn.Dropout(0.5), nets[0][-1])
    view = View(delivered(net).checked("a", 4, [2]), set_of_images)
    audits, before = [own for own in AUDITS if own.name == "relearn"], torch.get_rng_state()
    first = measure(audits, view).details["relearn"]
    torch.rand(3)
    assert measure(audits, view).details["relearn"] == first
    torch.set_rng_state(before)
    measure(audits, view)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("seed", range(5))
def test_of_features_that_are_all_alike_no_class_is_known(seed, set_of_images):
    """A network that collapsed names everything as one class: which one, rounding decides or the order of classes."""
    same = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
    truth = torch.cat([torch.arange(120) % 3, torch.full((7,), 3)])  # prototypes of unlike numbers of images
    features = same.expand(127, -1) + 0.0
    for label in range(4):
        rows = truth == label
        shares = prototype_accuracy(
            features, truth, features[rows], truth[rows], shots=10, draws=3, draw=torch.Generator().manual_seed(0)
        )
        assert shares.tolist() == [0.25] * 3
    net = make_net(classes=4, seed=seed).eval()
    with torch.no_grad():
        net[4].weight.zero_(), net[4].bias.fill_(0.3)
    view = View(delivered(net).checked("a", 4, [2]), set_of_images)
    assert measure([own for own in AUDITS if own.name == "linear_probe"], view).figures["probe"].value == 0.25


@pytest.mark.parametrize("constant", [0.0, 3e3, 1e6])
@pytest.mark.parametrize("copies", [1, 3])  # a product of matrices is taken above 25 rows, and cancels
def test_one_large_channel_does_not_hide_what_the_others_tell(constant, copies):
    truth = torch.arange(60) % 3
    features = torch.eye(3)[truth] + 0.01 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    features = torch.cat([features, torch.full((60, 1), constant)], 1)
    assert not alike(features)
    draw = torch.Generator().manual_seed(0)
    rows = (torch.arange(12).repeat(copies), truth[:12].repeat(copies))
    shares = prototype_accuracy(features, truth, features[rows[0]], rows[1], shots=5, draws=4, draw=draw)
    assert shares.tolist() == [1.0] * 4
    assert (linear_probe(features, truth, features) == truth).all()


@pytest.mark.parametrize("forgotten", [0, 2])
def test_which_of_two_classes_of_the_same_features_comes_first_decides_nothing(forgotten):
    other = 2 - forgotten
    truth = torch.tensor([forgotten] * 5 + [other] * 5 + [1] * 5)
    features = torch.tensor([[1.0, 0.0]] * 10 + [[0.0, 1.0]] * 5)
    rows = truth == forgotten
    draw = torch.Generator().manual_seed(0)
    shares = prototype_accuracy(features, truth, features[rows], truth[rows], shots=1, draws=2, draw=draw)
    assert shares.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("u", "known"), [(0.0, False), (0.1, False), (0.11, True), (0.9, True)])
def test_what_the_original_never_knew_is_no_verdict(u, known):
    bands = verdict.calibrate(ORACLES)  # U of 0 +- 2.97 x 0.01
    own = verdict.judge(figures(probe=1.01), bands, oracles=3, chance=0.1)
    found = verdict.never_known(own, {"forget": Figure(u)}, chance=0.1)
    assert found["verdict"] == (verdict.SUPPRESSED if known else verdict.NO_VERDICT)
    if not known:
        assert f"the original itself names the class in {100 * u:.1f} %" in found["reason"]
        assert "(train.rounds)" in found["reason"]
    assert verdict.never_known(own, {}, chance=0.1) == own
    few = verdict.judge(figures(probe=1.01), verdict.calibrate(ORACLES[:2]), oracles=2, chance=0.1)
    assert ("train.rounds" in verdict.never_known(few, {"forget": Figure(u)}, chance=0.1)["reason"]) == (not known)


def test_leaving_one_out_counts_figures_outside():
    four = {str(k): figures(probe=p) for k, p in enumerate((0.70, 0.71, 0.72, 0.9))}
    found = verdict.leave_one_out(four, {"head only": figures(probe=0.99)}, chance=0.1)
    assert found["models"]["3"]["outside"] == ["probe"]
    assert found["models"]["3"]["verdict"] == verdict.SUPPRESSED
    assert (found["figures"], found["false_positives"]) == (20, 1)
    assert found["models"]["0"]["controls"]["head only"] == verdict.INDISTINGUISHABLE  # by a band that 0.9 widened
    assert found["models"]["3"]["controls"]["head only"] == verdict.SUPPRESSED


def test_the_error_of_a_share_is_not_0_at_0_of_30():
    assert share(0, 30).error == pytest.approx(math.sqrt(2 / 34 * 32 / 34 / 34))


# the whole


def whole(nets, images, folder, *, fixed=lambda digest: None):
    original, oracles = nets
    return audit(
        whole_model(original),
        images,
        oracles={f"retrained-{k}": delivered(net) for k, net in enumerate(oracles)},
        controls={"head_only": Subject(delivered(original).model)},
        record=Record(folder, fixed),
    )


def test_thresholds_are_on_disk_before_the_candidate_or_a_control_is_measured(nets, set_of_images, tmp_path):
    there = []
    found = whole(nets, set_of_images, tmp_path, fixed=lambda digest: there.extend((tmp_path / "audits").iterdir()))
    assert sorted(path.stem for path in there) == [f"retrained-{k}" for k in range(4)]
    assert found.verdict == verdict.NOT_FORGOTTEN
    assert json.loads((tmp_path / "thresholds.json").read_text())["oracles"] == 4
    assert set(found.models["unlearned"].figures) == set(verdict.KINDS) - {"artefacts"}
    missing = {"forget", "reestimated", "int8", "int4", "artefacts"}  # they need the row that is gone
    assert set(found.models["head_only"].figures) == set(verdict.KINDS) - missing


def test_a_model_with_all_its_rows_is_asked_what_it_names(nets, set_of_images, tmp_path):
    original, oracles = nets
    found = audit(
        Subject(whole_model(original).model),
        set_of_images,
        oracles={f"retrained-{k}": delivered(net) for k, net in enumerate(oracles)},
    )
    assert found.verdict == verdict.NOT_FORGOTTEN
    assert found.models["unlearned"].figures["forget"].value > 0.8


def test_figures_of_the_same_weights_in_other_layers_are_not_taken_for_theirs(nets, set_of_images, tmp_path):
    original, oracles = nets

    def audited(net):
        return audit(
            whole_model(net),
            set_of_images,
            oracles={f"retrained-{k}": delivered(net) for k, net in enumerate(oracles)},
            record=Record(tmp_path),
        )

    audited(original)
    other = make_net(classes=4)
    other[2] = torch.nn.ELU()
    other.load_state_dict(original.state_dict())
    with pytest.raises(RunError, match=r"unlearned.json holds the figures of another model named unlearned"):
        audited(other.eval())


def test_an_audit_that_was_cut_off_goes_on_to_the_same_figures(nets, set_of_images, tmp_path):
    whole(nets, set_of_images, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "audits").iterdir()}
    (tmp_path / "audits" / "unlearned.json").unlink()
    whole(nets, set_of_images, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "audits").iterdir()} == before


def test_thresholds_that_were_fixed_are_not_changed(nets, set_of_images, tmp_path):
    whole(nets, set_of_images, tmp_path)
    (tmp_path / "thresholds.json").write_text("{}\n")
    with pytest.raises(RunError, match="was fixed before and says something else"):
        whole(nets, set_of_images, tmp_path)


def test_damaged_figures_of_an_audit_are_named(nets, set_of_images, tmp_path):
    (tmp_path / "audits").mkdir()
    (tmp_path / "audits" / "retrained-0.json").write_text("{}")
    with pytest.raises(RunError, match=r"retrained-0\.json: expected the figures of an audit"):
        whole(nets, set_of_images, tmp_path)


def test_without_retrained_models_what_compares_with_them_is_left_out(nets, set_of_images):
    found = audit(whole_model(nets[0]), set_of_images, oracles={})
    assert found.verdict == verdict.NO_VERDICT
    assert not {"neighbours", "membership", "cka", "procrustes"} & set(found.models["unlearned"].figures)
    assert found.held_out["models"] == {}


def test_a_network_of_another_kind_is_held_against_retrained_models_by_its_features(nets, set_of_images):
    torch.manual_seed(0)
    layers = {
        "own": nn.Conv2d(1, 5, 3),
        "pool": nn.AdaptiveAvgPool2d(2),
        "flat": nn.Flatten(),
        "head": nn.Linear(20, 4),
    }
    other = nn.Sequential(OrderedDict(layers))
    oracles = {f"retrained-{place}": whole_model(net) for place, net in enumerate(nets[1][:2])}
    found = audit(whole_model(other), set_of_images, oracles=oracles)
    distances = found.models["unlearned"].details["representation"]
    assert set(distances) == {"features"}
    assert 0 <= distances["features"]["cka"] < 1


def test_figures_of_another_model_are_not_taken_for_this_one_s(nets, set_of_images, tmp_path):
    whole(nets, set_of_images, tmp_path)
    with pytest.raises(RunError, match=r"retrained-0\.json holds the figures of another model named retrained-0"):
        whole((nets[0], nets[1][::-1]), set_of_images, tmp_path)


def test_figures_of_other_images_settings_or_references_are_not_taken_for_these(nets, set_of_images, tmp_path):
    whole(nets, set_of_images, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "audits").iterdir()}
    noise = torch.randint(0, 256, set_of_images.test.images.shape, dtype=torch.uint8)
    for other in (
        replace(set_of_images, test=replace(set_of_images.test, images=noise)),
        replace(set_of_images, test=replace(set_of_images.test, labels=set_of_images.test.labels.flip(0))),
        replace(set_of_images, known=replace(set_of_images.known, mean=(0.4,))),
        replace(set_of_images, lr=0.01),
        replace(set_of_images, seed=7),
    ):
        with pytest.raises(
            RunError, match=r"retrained-0\.json holds the figures of retrained-0 on other images, or by"
        ):
            whole(nets, other, tmp_path)
    with pytest.raises(
        RunError, match=r"retrained-0\.json holds the figures of retrained-0 beside other retrained mod"
    ):
        whole((nets[0], nets[1][:-1]), set_of_images, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "audits").iterdir()} == before


def test_two_models_of_one_name_are_refused(nets, set_of_images):
    same = delivered(nets[1][0])
    with pytest.raises(EvidenceError, match="two models are named 'unlearned'"):
        audit(same, set_of_images, oracles={"unlearned": same})


def test_a_candidate_does_not_pass_where_head_only_passes(nets, set_of_images, tmp_path):
    oracles = {str(k): delivered(net) for k, net in enumerate(nets[1][:3])}
    same = delivered(nets[1][0])
    fails = delivered(nets[0])
    once = Record(tmp_path)  # the models that all three have in common are measured once
    passes = audit(same, set_of_images, oracles=oracles, controls={"head_only": fails}, record=once)
    assert passes.verdict == verdict.INDISTINGUISHABLE
    alone = audit(same, set_of_images, oracles=oracles, controls={"finetune": fails}, record=once)
    assert alone.verdict == verdict.NO_VERDICT
    assert "no model that must fail was audited beside it" in alone.judgements["unlearned"]["reason"]
    (tmp_path / "audits" / "head_only.json").unlink()
    blind = audit(same, set_of_images, oracles=oracles, controls={"head_only": same}, record=once)
    assert blind.verdict == verdict.NO_VERDICT
    assert "cannot tell head_only from retraining" in blind.judgements["unlearned"]["reason"]


def test_an_original_that_never_knew_the_class_leaves_nothing_to_judge(nets, set_of_images):
    oracles, never = {"0": delivered(nets[1][0])}, delivered(nets[1][1])
    found = audit(delivered(nets[1][2]), set_of_images, oracles=oracles, controls={"original": never})
    assert found.verdict == verdict.NO_VERDICT
    assert "there was nothing to forget; train the original for longer" in found.judgements["unlearned"]["reason"]


def test_all_images_of_the_class_may_be_duplicates(nets):
    same = make_images(160, 4)
    own = audit_images(same, same, forget=[2], per_class=30, seed=0)
    assert (len(own.members), len(own.others)) == (0, 0)
    found = audit(delivered(nets[1][0]), own, oracles={"a": delivered(nets[1][1])})
    assert "membership" not in found.models["unlearned"].figures


def test_an_audit_is_one_file_and_one_row(nets, set_of_images, tmp_path, monkeypatch):
    def unsure(subject, images, seen, references):
        of_class = torch.isin(images.test.labels, torch.tensor(images.forget))
        return Found({"doubt": Figure(float(1 - seen.test.logits[of_class].softmax(1).amax(1).mean()))}, {"doubt": 7})

    made_up = Audit("doubt", {"doubt": FigureKind("doubt", "How unsure is the model of the class?", "class")}, unsure)
    monkeypatch.setattr(auditing, "AUDITS", (*AUDITS, made_up))  # as if the row were in the table
    monkeypatch.setitem(FIGURES, "doubt", made_up.figures["doubt"])
    monkeypatch.setitem(verdict.KINDS, "doubt", made_up.figures["doubt"].kind)
    found = whole(nets, set_of_images, tmp_path)
    assert list(found.bands)[-1] == "doubt"
    assert found.judgements["head_only"]["audits"]["doubt"]["verdict"] in ("inside", "above", "below")
    assert json.loads((tmp_path / "audits" / "unlearned.json").read_text())["details"]["doubt"] == 7
    assert words.clipped((-1.0, 3.0), "doubt") == (0.0, 1.0)
    above = {"figure": 0.9, "band": [0.1, 0.3], "verdict": "above"}
    (only,) = words.outside({"verdict": verdict.SUPPRESSED, "forget": [2], "audits": {"doubt": above}})
    assert only[1] == ["doubt: 90.0 % (retrained models: mean 20.0 %, band to 30.0 %)"]


def test_the_table_names_every_audit_and_every_figure_once():
    assert len({audit.name for audit in AUDITS}) == len(AUDITS)
    assert len(FIGURES) == sum(len(audit.figures) for audit in AUDITS)
    assert list(FIGURES) == list(verdict.KINDS)


def test_a_figure_that_an_audit_does_not_declare_is_refused(nets, set_of_images):
    odd = Audit("odd", {}, lambda *_: Found({"surprise": Figure(1.0)}))
    with pytest.raises(EvidenceError, match="the audit odd gives the figure 'surprise', which it does not declare"):
        measure([odd], View(delivered(nets[0]), set_of_images))


def test_the_shipped_file_is_looked_at_again_when_an_audit_goes_on(nets, set_of_images, tmp_path):
    path, subject = tmp_path / "model.safetensors", delivered(nets[0])
    subject = replace(subject, shipped=Shipped(path, nets[0].state_dict()))
    write_shipped(path, subject.model)
    found = audit(subject, set_of_images, oracles={}, record=Record(tmp_path))
    assert found.models["unlearned"].figures["artefacts"] == Figure(0.0)
    assert found.judgements["unlearned"]["audits"]["artefacts"]["verdict"] == "inside"
    write_shipped(path, replace(subject.model, module=nets[0], labels=None))
    again = audit(subject, set_of_images, oracles={}, record=Record(tmp_path))
    assert "the labels name the forgotten class 2" in again.models["unlearned"].details["artefacts"]
    assert again.judgements["unlearned"]["audits"]["artefacts"]["verdict"] == "above"


def test_a_figure_without_a_band_or_that_is_no_number_does_not_pass():
    bands = verdict.calibrate(ORACLES)
    unheld = verdict.judge(figures(probe=0.75, int8=0.0), bands, oracles=3, chance=0.1)
    assert (unheld["verdict"], unheld["decided_by"]) == (verdict.NO_VERDICT, [])
    found = verdict.judge(figures(probe=0.75), bands, oracles=3, chance=0.1)
    assert (found["verdict"], found["decided_by"]) == (
        verdict.INDISTINGUISHABLE,
        ["forget", "retain", "probe", "relearn", "neighbours"],
    )
    assert found["reason"].startswith("all 5 figures")
    odd = verdict.judge(figures(probe=math.nan), bands, oracles=3, chance=0.1)
    assert odd["verdict"] == verdict.SUPPRESSED


def test_fewer_than_three_retrained_models_are_not_held_out():
    found = verdict.leave_one_out({"a": ORACLES[0], "b": ORACLES[1]}, {}, chance=0.1)
    assert found == {"models": {}, "figures": 0, "false_positives": 0}


RECORDED = sorted((Path(__file__).parents[1] / "benchmarks" / "audits").glob("cifar10-*.json"))


def test_recorded_audits_are_there():
    assert RECORDED


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_on_cifar10_held_out_retrained_models_pass_and_head_only_and_fine_tuning_never_do(path):
    recorded = json.loads(path.read_text("utf-8"))
    own = {
        model: {name: Figure(**figure) for name, figure in figures.items()}
        for model, figures in recorded["figures"].items()
    }
    oracles = {name: figures for name, figures in own.items() if name.startswith("retrained")}
    controls = {name: own[name] for name in ("original", "head_only", "finetune")}
    found = verdict.leave_one_out(oracles, controls, chance=0.1)
    assert [held["verdict"] for held in found["models"].values()] == 4 * [verdict.INDISTINGUISHABLE]
    assert all(
        own != verdict.INDISTINGUISHABLE for held in found["models"].values() for own in held["controls"].values()
    )
    assert found["false_positives"] == 0


def test_figures_are_kept_by_weights_rows_and_labels():
    model, other = classifier(make_net(classes=4)), classifier(make_net(classes=4, seed=1))
    small = model.without_rows([2])
    subjects = (Subject(small), Subject(replace(small, labels=(0, 3, 1))), Subject(small, model), Subject(small, other))
    a, b, c, d = map(auditing._state_hash, subjects)
    assert a != b
    assert a != c
    assert c != d


def test_an_error_that_is_no_number_is_refused(monkeypatch):
    odd = Audit("odd", {"odd": FigureKind("odd", "?", "class")}, lambda *_: Found({"odd": Figure(0.5, math.nan)}))
    monkeypatch.setattr(auditing, "AUDITS", (odd,))
    net = classifier(make_net(classes=4))
    with pytest.raises(EvidenceError, match=r"odd is 0\.5 with an error of nan, which no"):
        audit(Subject(net), IMAGES, oracles={})


def test_a_control_is_judged_by_the_figures_that_the_candidate_has(monkeypatch):
    nets = [classifier(make_net(classes=4, seed=seed)) for seed in range(5)]
    names = ("retain", "probe", "relearn", "neighbours")

    def measured(subject, images, seen, references):
        figures = {name: Figure(0.5) for name in names}
        if subject.row_kept is None:  # the candidate's row is gone, by which alone the control would fail
            return Found(figures)
        return Found(figures | {"forget": Figure(float(subject.row_kept.module is nets[4].module))})

    kinds = {name: FigureKind(name, "?", verdict.KINDS[name]) for name in (*names, "forget")}
    monkeypatch.setattr(auditing, "AUDITS", (Audit("all", kinds, measured),))
    oracles = {str(k): Subject.without_rows(net, [2]) for k, net in enumerate(nets[:3])}
    controls = {"finetune": Subject.without_rows(nets[4], [2])}
    found = audit(Subject(nets[3].without_rows([2])), IMAGES, oracles=oracles, controls=controls)
    assert found.judgements["finetune"]["verdict"] == verdict.INDISTINGUISHABLE
    assert {own["controls"]["finetune"] for own in found.held_out["models"].values()} == {verdict.INDISTINGUISHABLE}


def test_a_band_is_no_finer_than_a_tenth_of_a_percent():
    assert verdict.calibrate([{"cka": Figure(0.5)}] * 3)["cka"].sd == 0.001


def test_a_table_of_findings_has_bands_of_what_can_be():
    held = {"figure": 0.1, "band": [-0.2, 3.0], "verdict": "inside"}
    rows = Findings({}, {}, {"unlearned": {"audits": {"probe": held, "procrustes": held}}}, {}).table()
    assert [(row["low"], row["high"]) for row in rows] == [(0.0, 1.0), (0.0, 2.0)]
