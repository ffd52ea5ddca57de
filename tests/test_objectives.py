"""Local objectives: each by hand, by what torch says of its gradient, and as clients train by it."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from conftest import classifier, job, make_images, make_net
from fedunlearn.errors import RecipeError
from fedunlearn.federation.jobs import ClientData, handle
from fedunlearn.federation.privacy import Privacy
from fedunlearn.federation.tasks import Train
from fedunlearn.training.objectives.ascend import Ascend
from fedunlearn.training.objectives.base import Seen, kl
from fedunlearn.training.objectives.distil import Distil
from fedunlearn.training.objectives.erase import Erasing, complement, separation
from fedunlearn.training.objectives.relabel import Relabel
from fedunlearn.training.objectives.scrub import Scrub
from fedunlearn.training.objectives.sparse import Sparse
from fedunlearn.training.sgd import Forgetting, Training, train_locally

LABELS = torch.tensor([0, 2, 1, 2, 0, 2])  # class 2 is to be forgotten
OF = LABELS == 2


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def values(seed=0):
    return torch.randn(6, 3, generator=draw(seed), dtype=torch.float64)


def seen(logits, *, before=None, progress=0.0, earlier=None, weights=()):
    return Seen(
        logits=logits,
        labels=LABELS,
        features=torch.zeros(6, 1),
        forgotten=OF,
        forget=(2,),
        before=before,
        weights=weights,
        smoothing=0.0,
        progress=progress,
        earlier=earlier,
        draw=draw(),
    )


def gradient(objective, logits, **given):
    own = logits.clone().requires_grad_()
    objective.loss(seen(own, **given)).backward()
    return own.grad


def cross_entropy(logits, which):
    own = logits.clone().requires_grad_()
    F.cross_entropy(own[which], LABELS[which]).backward()
    return own.grad


def test_the_divergence_of_two_coins_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): .75 log 1.5 + .25 log .5
    teacher, student = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64), torch.zeros(1, 2)
    assert float(kl(teacher, student)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kl(teacher, teacher, 4.0)) == pytest.approx(0, abs=1e-7)
    # At a temperature of 2 the teacher is (sqrt 3, 1) / (sqrt 3 + 1), and the result has a factor of 4.
    p = math.sqrt(3) / (math.sqrt(3) + 1)
    by_hand = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert float(kl(teacher, student, 2.0)) == pytest.approx(by_hand)


def test_an_l1_penalty_pulls_each_weight_by_its_sign():
    weight = torch.tensor([1.5, -2.0, 0.0], requires_grad=True)
    loss = Sparse(0.1).loss(seen(values(), weights=[weight]))
    loss.backward()
    torch.testing.assert_close(weight.grad, torch.tensor([0.1, -0.1, 0.0]))
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(values()[~OF], LABELS[~OF])) + 0.35)


def test_neg_grad_goes_down_on_what_stays_and_up_on_what_is_to_go():
    found = gradient(Ascend(0.9), values())
    torch.testing.assert_close(found, 0.9 * cross_entropy(values(), ~OF) - 0.1 * cross_entropy(values(), OF))


def test_the_likeliest_other_class_of_the_received_model_is_the_label():
    before = torch.tensor([[9.0, 0, 0], [1, 2, 9], [0, 9, 0], [2, 1, 9], [9, 0, 0], [0, 5, 4]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    own = values().requires_grad_()
    F.cross_entropy(own, labels).backward()
    torch.testing.assert_close(gradient(Relabel("likeliest"), values(), before=before), own.grad)


def test_random_labels_are_any_of_the_classes_that_stay_and_of_no_other():
    pushed = []
    for seed in range(40):
        own = values().requires_grad_()
        Relabel("random").loss(replace(seen(own), draw=draw(seed))).backward()
        pushed += (own.grad[OF] < 0).nonzero()[:, 1].tolist()
    assert set(pushed) == {0, 1}
    assert 0.35 < pushed.count(0) / len(pushed) < 0.65


def test_distillation_without_the_class_begins_where_the_complement_does():
    """Of a model that is its own teacher both move the same way; then DELETE stays with the first teacher."""
    own = values().requires_grad_()
    complement(own[OF], (2,)).backward()
    torch.testing.assert_close(gradient(Distil(), values(), before=values()), own.grad)
    target = values(1).clone()
    target[:, 2] = float("-inf")
    expected = (values()[OF].softmax(1) - target[OF].softmax(1)) / 3
    torch.testing.assert_close(gradient(Distil(), values(), before=values(1))[OF], expected)


def test_scrub_goes_away_from_the_teacher_on_the_class_then_back_on_the_others_by_turns():
    objective = Scrub(0.5, temperature=1.0, turns=4, ascents=2, away=0.25)
    away = (values().softmax(1) - values(1).softmax(1)) / 3  # of KL(t, z), three images of either kind
    back = cross_entropy(values(), ~OF) + 0.5 * away
    # Sixteen steps, four a turn: the first of a turn goes away in the first two turns, and in none of the last two.
    for step in range(16):
        earlier = (step - 1) / 16 if step else None
        found = gradient(objective, values(), before=values(1), progress=step / 16, earlier=earlier)
        up = step in (0, 4)
        torch.testing.assert_close(found[OF], -away[OF] if up else torch.zeros_like(away[OF]))
        torch.testing.assert_close(found[~OF], torch.zeros_like(back[~OF]) if up else back[~OF])


@pytest.mark.parametrize("steps", [5, 7, 10, 64])
def test_however_few_steps_a_turn_has_its_first_goes_away(steps):
    objective = Scrub(0.5, turns=3, ascents=2, away=0.1)
    up = []
    for step in range(steps):
        earlier = (step - 1) / steps if step else None
        found = gradient(objective, values(), before=values(1), progress=step / steps, earlier=earlier)
        if bool(found[OF].any()):
            up.append(step)
    firsts = [min(step for step in range(steps) if 3 * step // steps == turn) for turn in (0, 1)]
    share = [step for step in range(steps) if 3 * step / steps % 1 < 0.1 and 3 * step // steps < 2]
    assert up == sorted({*firsts, *share})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Sparse(-1), "Sparse(penalty=...) is out of range: got -1"),
        (lambda: Ascend(1.0), "Ascend(kept=...) is out of range: got 1.0"),
        (lambda: Relabel("nearest"), "Relabel(to=...) is out of range: got 'nearest'"),
        (lambda: Sparse(0.1, until=2), "Sparse(until=...) is out of range: got 2"),
        (lambda: Scrub(0.5, temperature=0), "Scrub(temperature=...) is out of range: got 0"),
        (lambda: Scrub(0.5, turns=0), "Scrub(turns=...) is out of range: got 0"),
        (lambda: Scrub(0.5, ascents=1.5), "Scrub(ascents=...) is out of range: got 1.5"),
        (lambda: Scrub(0.5, away=1), "Scrub(away=...) is out of range: got 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, text):
    with pytest.raises(RecipeError, match=re.escape(text)):
        make()


IMAGES = make_images(60)
ANY = Privacy(min_images=1)
MODEL = classifier(make_net())


def answer(objective, *, images=IMAGES, epochs=1.0, rules=ANY):
    training = Training(0.1, 8, epochs, objective=objective)
    asked = job(Train(training=training, lr=0.05, exclude=(2,)), classifier(make_net()))
    return handle(asked, make_net(), ClientData("a", images), rules)


def test_images_to_forget_count_by_their_share_of_the_batch():
    """Two of six: no sum of the two halves with their shares exchanged, or with a sign turned, is the same."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    of = labels == 2
    logits, features = values(), torch.tensor([[0.0], [1], [5], [2], [1], [7]])
    before = torch.tensor([[0.0, 1, 9]]).expand(6, 3)  # class 1 is the likeliest of those that stay
    batch = replace(seen(logits, before=before), labels=labels, forgotten=of, features=features)
    log_p = logits.log_softmax(1)
    kept = -log_p[~of][range(4), [0, 1, 0, 1]].mean()
    away = -torch.log1p(-log_p[of].exp()[:, 2]).mean()
    erased = 2 / 3 * kept + 1 / 3 * (2 * away + 0.5 * separation(features, of))
    assert float(Erasing(complement=2.0, separation=0.5).loss(batch)) == pytest.approx(float(erased))
    relabelled = 2 / 3 * kept - 1 / 3 * log_p[of][:, 1].mean()
    assert float(Relabel("likeliest").loss(batch)) == pytest.approx(float(relabelled))


@pytest.mark.parametrize("objective", [Sparse(1e-3), Ascend(0.9), Relabel("random"), Relabel("likeliest"), Scrub(0.5)])
def test_clients_train_by_an_objective_on_as_many_images_and_differ_from_plain_training(objective):
    plain, own = answer(None), answer(objective)
    assert own.error is None
    assert (own.images, own.samples) == (plain.images, plain.samples) == (40, 40)
    assert any(not torch.equal(own.tensors[name], tensor) for name, tensor in plain.tensors.items())
    again = answer(objective)
    assert all(torch.equal(own.tensors[name], tensor) for name, tensor in again.tensors.items())


def test_a_client_without_the_class_trains_plainly_where_an_objective_mixes():
    without = IMAGES.without((2,))
    for objective in (Ascend(0.9), Relabel("random"), Scrub(0.5)):
        plain, own = answer(None, images=without), answer(objective, images=without)
        assert all(torch.equal(own.tensors[name], tensor) for name, tensor in plain.tensors.items())


def test_distillation_sees_the_class_alone_and_weighs_by_its_images():
    own = answer(Distil(), epochs=2.0)
    assert (own.images, own.samples) == (20, 40)
    other = IMAGES.take((IMAGES.labels == 2).nonzero().flatten())
    alone = answer(Distil(), images=other, epochs=2.0)
    assert all(torch.equal(own.tensors[name], tensor) for name, tensor in alone.tensors.items())
    none = answer(Distil(), images=IMAGES.without((2,)))
    assert none.error == "FederationError: the client holds no image of the classes [2]"
    few = answer(Distil(), rules=Privacy(min_images=21))
    assert "the answer would stand for fewer than 21 images" in few.error
    short = answer(Distil(), epochs=0.1, rules=Privacy(min_images=5))
    assert "0.1 epochs of 20 images are fewer than 5" in short.error


def test_a_teacher_costs_a_forward_pass_more():
    training = Training(0.1, 8)
    assert Train(training=training, lr=0.1).operations(MODEL, 2, 6) == 6
    assert Train(training=replace(training, objective=Distil()), lr=0.1).operations(MODEL, 2, 6) == 8
    assert Train(training=replace(training, objective=Sparse(0.1)), lr=0.1).operations(MODEL, 2, 6) == 6


def test_an_objective_is_told_the_smoothing_and_the_step_and_sees_batches_of_the_size_asked_for():
    seen = []

    def loss(told):
        seen.append((told.smoothing, told.progress, told.earlier, len(told.labels), int(told.forgotten.sum())))
        return told.logits.square().mean()

    objective = SimpleNamespace(kind="told", share=0.25, until=1.0, every=1, teacher=False, loss=loss)
    training, images = Training(0.05, 16, label_smoothing=0.3), make_images(80, 4)
    object.__setattr__(training, "objective", objective)
    own = Forgetting((images.only((2,)), images.only((3,))), 3, (2, 3), "8")
    train_locally(make_net(4), images.without((2, 3)), training, lr=0.05, draw=torch.Generator(), forgetting=own)
    smoothing, progress, earlier, sizes, forgotten = zip(*seen)
    assert set(smoothing) == {0.3}
    assert earlier == (None, *progress[:-1])
    assert progress[:2] == (0.0, 16 / 40)
    assert (sizes[0], forgotten[0]) == (16, 6)


def test_a_smoothed_cross_entropy_of_an_objective_is_that_of_the_formula():
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])
    told = Seen(logits, labels, torch.zeros(4, 1), labels == 2, (2,), None, (), 0.3, 0.0, None, torch.Generator())
    kept = labels != 2
    target = 0.7 * torch.nn.functional.one_hot(labels, 3) + 0.1
    expected = -(target * logits.log_softmax(1)).sum(1)[kept].mean()
    assert float(told.cross_entropy(kept)) == pytest.approx(float(expected))
