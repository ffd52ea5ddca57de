"""The erase step: what it adds to the loss, which images it takes, and what is left of the class."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from conftest import job, make_images, make_net
from fedunlearn.channels.plan import Cut
from fedunlearn.channels.scores import Ranking, contrast
from fedunlearn.data.batches import batches
from fedunlearn.data.partition import partition
from fedunlearn.data.readers import read_digits
from fedunlearn.errors import RecipeError
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import ClientData
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy
from fedunlearn.federation.rounds import Repair, train_rounds
from fedunlearn.federation.tasks import Train
from fedunlearn.models import build_model
from fedunlearn.run.result import evaluate
from fedunlearn.training.compute import FLOAT32
from fedunlearn.training.mixing import again_and_again, each_of, fewest, fewest_by_turns, mixed
from fedunlearn.training.objectives.erase import Erasing, complement, separation
from fedunlearn.training.objectives.scrub import Scrub
from fedunlearn.training.objectives.sparse import Sparse
from fedunlearn.training.sgd import Forgetting, Training, train_locally
from fedunlearn.unlearn import unlearn


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(seed=0, rows=6, classes=5):
    return torch.randn(rows, classes, generator=draw(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("forget", [(2,), (0, 4)])
def test_the_complement_moves_as_distillation_from_the_model_itself_without_the_classes_does(forget):
    own, other = logits(), logits()
    complement(own, forget).backward()
    target = other.detach().softmax(1)
    target[:, list(forget)] = 0
    target /= target.sum(1, keepdim=True)
    F.cross_entropy(other, target).backward()
    torch.testing.assert_close(own.grad, other.grad)
    share = other.detach().softmax(1)[:, list(forget)].sum(1)
    assert float(complement(own.detach(), forget)) == pytest.approx(float(-torch.log1p(-share).mean()))


def test_the_complement_of_a_model_that_is_sure_is_finite():
    sure = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss = complement(sure, [1])
    loss.backward()
    assert float(loss.detach()) == 200
    assert sure.grad.tolist() == [[-1, 1]]


def test_the_separation_of_one_feature_by_hand():
    features = torch.tensor([[1.0], [3.0], [4.0], [8.0]])  # means 6 and 2, deviation sqrt(26 / 3)
    found = separation(features, torch.tensor([False, False, True, True]))
    assert float(found) == pytest.approx(4 / (26 / 3) ** 0.5)


@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-3, 3))
def test_the_separation_knows_neither_scale_nor_place_nor_sides(seed, scale, shift):
    features = torch.randn(20, 4, generator=draw(seed))
    forgotten = torch.arange(20) < 6
    found = float(separation(features, forgotten))
    assert found > 0
    assert float(separation(scale * features + shift, forgotten)) == pytest.approx(found, rel=1e-3)
    assert float(separation(features, ~forgotten)) == pytest.approx(found, rel=1e-3)


def test_steps_along_the_separation_make_a_class_hard_to_tell_by_any_linear_probe():
    features = torch.randn(200, 8, generator=draw())
    forgotten = torch.arange(200) < 50
    features[forgotten] += torch.tensor([3.0, -2, 0, 0, 1, 0, 0, 0])

    def told():
        h = torch.cat([features, torch.ones(200, 1)], 1)
        weights = torch.linalg.lstsq(h, forgotten.float()[:, None]).solution
        return float(1 - ((h @ weights - forgotten.float()[:, None]) ** 2).mean() / forgotten.float().var())

    before = told()
    for _ in range(200):
        moved = features.clone().requires_grad_()
        separation(moved, forgotten).backward()
        features = features - 2 * moved.grad
    assert before > 0.7
    assert told() < 0.05


@pytest.mark.parametrize("rows", [torch.eye(4), torch.zeros(4, 4), torch.full((4, 4), 3.0), torch.full((4, 4), 1e-22)])
def test_a_class_at_the_place_of_the_others_is_not_moved(rows):
    features = torch.cat([rows, rows]).requires_grad_()
    found = separation(features, torch.arange(8) < 4)
    found.backward()
    assert float(found.detach()) == 0
    assert bool(features.grad.isfinite().all())


@given(
    kept=st.integers(1, 60),
    forgotten=st.integers(1, 20),
    size=st.integers(2, 16),
    share=st.floats(0.01, 0.99),
    limit=st.integers(1, 60),
)
def test_a_pass_shows_at_least_as_many_different_images_of_either_kind_as_is_counted(
    kept, forgotten, size, share, limit
):
    few = each_of(size, share)

    def drawn(images, part, *, limit):
        return batches(images, part, limit=limit, draw=draw())

    erased = again_and_again(drawn, [images(forgotten, 1)], few)
    found = list(mixed(drawn, erased, few, images(kept, 0), size, limit=limit))
    counts = [(int((labels == 0).sum()), int((labels == 1).sum())) for _, labels in found]
    assert sum(own for own, _ in counts) == min(kept, max(1, round(limit * (size - few) / size)))
    assert all(1 <= other <= few + 1 for _, other in counts)  # an image left over joins the batch before it
    different = [
        len({tuple(picture.flatten().tolist()) for pictures, labels in found for picture in pictures[labels == kind]})
        for kind in (0, 1)
    ]
    assert min(different) >= fewest(kept, [forgotten], size, few, limit)


@settings(deadline=None)
@given(
    kept=st.integers(1, 40),
    forgotten=st.integers(1, 20),
    size=st.integers(2, 16),
    share=st.floats(0.01, 0.99),
    limit=st.integers(1, 120),
    turns=st.integers(1, 4),
    ascents=st.integers(1, 4),
    away=st.floats(0.01, 0.99),
)
def test_steps_of_one_kind_show_at_least_as_many_different_images_as_is_counted(
    kept, forgotten, size, share, limit, turns, ascents, away
):
    shuffles, few, scrub = draw(), each_of(size, share), Scrub(1.0, 1.0, turns, ascents, away, share)

    def drawn(images, part, *, limit):
        return batches(images, part, limit=limit, draw=shuffles)

    erased = again_and_again(drawn, [images(forgotten, 1)], few)
    seen, earlier, shown, by_turn = 0, None, set(), {}
    while seen < limit:
        for pictures, labels in mixed(drawn, erased, few, images(kept, 0), size, limit=limit - seen):
            turn = scrub.turn(seen / limit, earlier)
            of = shown if turn is None else by_turn.setdefault(turn, set())
            of |= {tuple(own.flatten().tolist()) for own in pictures[labels == (turn is not None)]}
            earlier = seen / limit
            seen += len(labels)
    counted = fewest_by_turns(kept, [forgotten], size, few, limit, scrub.turn)
    assert counted <= min(len(of) for of in (shown, *by_turn.values()))
    assert (counted == 0) == (not shown)


def test_no_image_is_erased_again_before_all_others_were_though_the_passes_over_the_rest_are_short():
    def drawn(images, part, *, limit):
        return batches(images, part, limit=limit, draw=shuffles)

    shuffles = draw()
    erased = again_and_again(drawn, [images(6, 1)], 1)
    seen = []
    for _ in range(3):
        for pictures, labels in mixed(drawn, erased, 1, images(6, 0), 4, limit=8):
            seen += [tuple(picture.flatten().tolist()) for picture in pictures[labels == 1]]
    assert len(set(seen[:6])) == 6


@given(share=st.floats(0.01, 0.9), classes=st.integers(1, 20))
def test_each_of_several_classes_has_as_many_images_beside_the_kept_ones_as_one_alone(share, classes):
    size = 10**6
    each, alone = each_of(size, share, classes), each_of(size, share)
    assert each / (size - classes * each) == pytest.approx(alone / (size - alone), rel=0.01)


@given(size=st.integers(2, 64), share=st.floats(0.01, 0.99), classes=st.integers(1, 20))
def test_a_batch_has_an_image_of_each_class_and_of_the_kept_ones_where_there_is_room(size, share, classes):
    each = each_of(size, share, classes)
    assert each >= 1
    assert each * classes < size or each == 1


@pytest.mark.parametrize(
    ("forget", "in_a_batch"),
    [((1,), {1: 4}), ((1, 2), {1: 3, 2: 3}), ((1, 2, 7), {1: 3, 2: 3}), ((1, 3), {1: 4}), ((1, 2, 3), {1: 3, 2: 3})],
)
def test_a_client_mixes_in_every_forgotten_class_that_it_holds_many_images_of_alike(forget, in_a_batch):
    whole, seen, net = make_images(400, classes=4), [], make_net(classes=8)
    rows = [(whole.labels == label).nonzero().flatten()[:count] for label, count in enumerate((100, 100, 20, 4))]
    data = replace(whole.take(torch.cat(rows)), classes=tuple("abcdefgh"))
    for label in range(4):
        data.images[data.labels == label] = 10 * label  # told by how light they are, whatever is mixed with them
    light = [round((10 * label / 255 - 0.3) / 0.25, 3) for label in range(4)]
    net.register_forward_pre_hook(lambda _, given: seen.append([round(float(own.amin()), 3) for own in given[0]]))
    training = Training(0.1, 16, 0.2, objective=Erasing(share=0.25))
    asked = job(Train(training=training, lr=0.1, exclude=forget), net)
    asked.task.answer(asked, net, ClientData("a", data), DEFAULT_RULES, FLOAT32)
    trained = next(batch for batch in seen if len(batch) >= 16)
    assert {
        label: trained.count(light[label]) for label in forget if label < 4 and light[label] in trained
    } == in_a_batch


def images(count, label):
    found = make_images(130, classes=2)
    return found.take((found.labels == label).nonzero().flatten()[:count])


def test_a_client_without_images_of_the_class_or_too_few_trains_as_ever():
    data = make_images(90, classes=3)
    shares = {"a": data.without((1,)).take(slice(0, 30)), "b": data.take(slice(30, 60)), "c": data.take(slice(60, 90))}
    plain, erasing = Training(0.1, 8), Training(0.1, 8, objective=Erasing())

    def trained(training, names, rules=DEFAULT_RULES):
        engine = LocalEngine({name: shares[name] for name in names}, rules=rules)
        fed = Federation(engine).keeping(exclude=(1,))
        return train_rounds(make_net(), fed, training, rounds=1).module.state_dict()

    changed, without = trained(erasing, "ab"), trained(plain, "ab")
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in without.items())
    few = Privacy(min_images=15)  # more than the 10 of the class
    for name, tensor in trained(plain, "bc", few).items():
        assert torch.equal(tensor, trained(erasing, "bc", few)[name])


def of_one_client():
    """Give ten clients of whom the first alone holds class 1."""
    data = make_images(300, classes=3)
    shares = {f"client-{k}": data.take(slice(30 * k, 30 * k + 30)) for k in range(10)}
    return {name: own if name == "client-0" else own.without((1,)) for name, own in shares.items()}


def test_who_holds_the_class_is_alone_in_the_rounds_of_the_step():
    engine = LocalEngine(of_one_client())
    known = replace(Federation(engine, participation=0.3).keeping(exclude=(1,)), holders=("client-0", "client-99"))
    training = Training(0.1, 8, objective=Erasing(until=0.5))
    train_rounds(make_net(), known, training, rounds=4)
    drawn = [step.entries[0].clients for step in known.journal.steps("train")]
    assert drawn[:2] == [("client-0",)] * 2
    assert [len(own) for own in drawn[2:]] == [3, 3]
    assert known.able(training.objective) == ["client-0"]
    assert known.able() == list(engine.clients)
    nobody = replace(known, holders=("client-99",))
    assert nobody.able(training.objective) == list(engine.clients)


def test_it_is_said_where_nobody_can_do_the_step(caplog):
    data = make_images(90, classes=3)
    engine = LocalEngine({"a": data.only([1]), "b": data.without([1])})  # a has nothing to repair with
    repair = Repair(Training(0.05, 8, objective=Erasing()), rounds=1)
    unlearn(make_net(), Federation(engine), forget=1, cut=Cut(0), repair=repair)
    assert "no client that holds images of the classes [1] takes part in training, for which it needs" in caplog.text
    caplog.clear()
    unlearn(make_net(), Federation(LocalEngine(of_one_client())), forget=1, cut=Cut(0), repair=repair)
    assert caplog.text == ""


def test_an_objective_that_needs_no_image_of_the_class_is_that_of_all_clients():
    fed = replace(Federation(LocalEngine(of_one_client())).keeping(exclude=(1,)), holders=("client-0",))
    assert len(fed.able(Sparse(0.1))) == 10


def test_what_one_client_erases_is_not_averaged_away():
    everywhere = Federation(LocalEngine(partition(make_images(300, classes=3), by="iid", clients=2)))
    original = train_rounds(make_net(), everywhere, Training(0.1, 8), rounds=4)
    fed, test = Federation(LocalEngine(of_one_client())), make_images(90, classes=3, seed=5)
    repair = Repair(Training(0.05, 8, objective=Erasing(until=0.5)), rounds=4)
    done = unlearn(original, fed, forget=1, cut=Cut(0), repair=repair)
    assert evaluate(original, test, forget=(1,))["accuracy"]["forget_row_kept"] > 0.9
    accuracy = evaluate(done.repaired, test, forget=(1,))["accuracy"]
    assert accuracy["forget_row_kept"] <= 0.1
    assert accuracy["retain"] > 0.9


def test_erasing_ends_after_its_share_of_the_rounds():
    training = Training(0.1, objective=Erasing(until=0.5))
    assert [training.of_round(k, 5).objective is None for k in range(5)] == [False, False, False, True, True]
    assert Training(0.1).of_round(0, 5) == Training(0.1)
    thrifty = Training(0.1, objective=Erasing(until=0.07))
    assert sum(thrifty.of_round(k, 100).objective is not None for k in range(100)) == 7
    assert thrifty.of_round(0, 2).objective is not None


def test_the_pull_of_l1_sparse_goes_to_nothing_in_a_straight_line():
    training = Training(0.1, objective=Sparse(0.8, until=0.4))
    of_rounds = [training.of_round(k, 10).objective for k in range(10)]
    assert [own and own.penalty for own in of_rounds] == pytest.approx([0.8, 0.6, 0.4, 0.2, *[None] * 6])


def test_erasing_comes_again_in_every_so_many_th_round_until_its_share_of_them_is_over():
    training = Training(0.1, objective=Erasing(until=0.6, every=3))
    assert [k for k in range(12) if training.of_round(k, 12).objective is not None] == [0, 3, 6]
    assert training.of_round(3, 12) == training
    assert training.of_round(1, 12) == Training(0.1)


def test_a_round_with_erasing_sees_as_many_images_and_starts_no_gradient_for_the_next_client():
    data = make_images(60, classes=3)
    net = make_net()
    own = Forgetting((data.only([1]),), 2, (1,), "8")
    training = Training(0.1, 8, objective=Erasing(separation=0.1))
    kept = data.without((1,))
    seen = train_locally(net, kept, training, lr=0.1, draw=draw(), forgetting=own)
    assert abs(seen - len(kept)) <= 8
    assert all(parameter.grad is None for parameter in net.parameters())


def test_erasing_without_pruning_forgets_what_training_on_the_others_alone_does_not():
    train, test = read_digits()
    fed = Federation(LocalEngine(partition(train, by="iid", clients=3, seed=0)))
    net = build_model("small-cnn", classes=10, colours=1)
    original = train_rounds(net, fed, Training(0.1, 16), rounds=6)
    plain = Repair(Training(0.05, 16), rounds=2)
    erasing = replace(plain, training=replace(plain.training, objective=Erasing()))
    found = {}
    for name, repair in (("plain", plain), ("erasing", erasing)):
        own = replace(fed, journal=Journal())
        done = unlearn(original, own, forget=9, cut=Cut(0), repair=repair, rank=Ranking(contrast))
        assert done.model.plan.pruned == {} or not any(done.model.plan.pruned.values())
        found[name] = evaluate(done.repaired, test, forget=(9,))["accuracy"]
    assert found["plain"]["forget_row_kept"] > 0.8
    assert found["erasing"]["forget_row_kept"] <= 0.03
    assert found["erasing"]["retain"] > found["plain"]["retain"] - 0.03


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Erasing(complement=-1), "Erasing(complement=...) is out of range: got -1"),
        (lambda: Erasing(separation=float("nan")), "Erasing(separation=...) is out of range: got nan"),
        (lambda: Erasing(share=1.0), "Erasing(share=...) is out of range: got 1.0"),
        (lambda: Erasing(until=0), "Erasing(until=...) is out of range: got 0"),
        (lambda: Erasing(every=0), "Erasing(every=...) is out of range: got 0"),
        (lambda: Erasing(complement=0), "are both 0, so that nothing is erased: set one"),
        (
            lambda: Training(0.1, 1, objective=Erasing()),
            "must be at least 2 with this objective",
        ),
        (lambda: Training(0.1, objective=0.5), "Training(objective=...) must be such as Erasing(), or None"),
    ],
)
def test_settings_out_of_range_are_refused(make, text):
    with pytest.raises(RecipeError, match=re.escape(text)):
        make()


def test_erasing_nothing_is_refused_before_any_client_is_asked():
    fed = Federation(LocalEngine(partition(make_images(60, classes=3), by="iid", clients=2, seed=0)))
    with pytest.raises(RecipeError, match=r"this one leaves none out: use fed\.keeping"):
        train_rounds(make_net(), fed, Training(0.1, objective=Erasing()), rounds=1)
    assert fed.journal.steps("train") == []
