"""Methods: what each does to a model, by hand or by a slow version, on clients of one process and on Flower."""

import re
from dataclasses import fields, replace
from functools import partial
from itertools import permutations

import pytest
import torch
from torch import nn

from conftest import classifier, make_images, make_net
from fedunlearn.audits.base import Subject
from fedunlearn.channels.plan import Classifier, Cut
from fedunlearn.channels.scores import Ranking, contrast, tf_idf
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.errors import ModelError, RecipeError
from fedunlearn.federation.averaging import Server
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import Reply
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.measuring import _total
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy
from fedunlearn.federation.rounds import Repair, train_rounds
from fedunlearn.federation.sums import Moments
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.methods import scrub as scrub_module
from fedunlearn.methods.base import LocalSettings, Request, as_many, prunes, resolved, settings_by
from fedunlearn.methods.erase_only import ERASE_ONLY
from fedunlearn.methods.finetune import finetune
from fedunlearn.methods.negate import negate
from fedunlearn.methods.prune import _ranked
from fedunlearn.methods.salun import SalUn, largest, salun
from fedunlearn.methods.scrub import Scrub
from fedunlearn.methods.ssd import Ssd, dampening, ssd
from fedunlearn.methods.svd import Svd, projection, svd
from fedunlearn.methods.table import COMPARED, METHODS
from fedunlearn.run.result import evaluate
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.objectives.scrub import Scrub as Objective
from fedunlearn.training.sgd import Training, one_cycle
from fedunlearn.unlearn import Unlearned, unlearn

CLIENTS = partition(make_images(120), by="iid", clients=3)
TEST = make_images(90, seed=5)
NAMES = tuple(CLIENTS)
REPAIR = Repair(Training(0.05, 8), rounds=2)
REQUEST = Request(
    forget=(2,),
    rank=Ranking(contrast),
    cut=Cut(0.3),
    repair=REPAIR,
    jointly=False,
    clients=NAMES,
    holders=NAMES,
    images=80.0,
)


@pytest.fixture(scope="module")
def known():
    """A model that knows its three classes."""
    fed = Federation(LocalEngine(CLIENTS))
    return train_rounds(make_net(), fed, Training(0.1, 8), rounds=8, server=Server(one_cycle))


def federation():
    return Federation(LocalEngine(CLIENTS))


def done(name, model, fed=None, request=REQUEST, **settings):
    method = COMPARED[name]
    own = method.settings if not settings else replace(method.settings, **settings)
    return method.run(model, fed or federation(), request, own)


def figures(subject):
    accuracy = evaluate(subject.model, TEST, forget=2, row_kept=subject.row_kept)["accuracy"]
    return accuracy["forget_row_kept"], accuracy["retain"]


def same(one, other):
    states = one.module.state_dict(), other.module.state_dict()
    return all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


@pytest.mark.parametrize("name", COMPARED)
def test_every_method_delivers_a_model_without_the_row_and_leaves_the_original_as_it_was(name, known):
    before = known.copy()
    outcome = done(name, known)
    assert same(known, before)
    assert isinstance(outcome.subject, Subject)
    assert outcome.subject.model.labels == (0, 1)
    if name != "head_only":
        assert outcome.subject.row_kept.rows == 3
        assert outcome.cost.client_samples > 0
        assert outcome.cost.client_flops > 0
        assert (name == "ssd") == same(outcome.subject.row_kept, known)  # no weight here is ten times as important


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tf_idf"])
def test_on_flower_a_method_gives_the_same_weights(name, known):
    from loopback import Loopback, nodes

    def of(engine):
        request = replace(REQUEST, clients=tuple(engine.clients), holders=tuple(engine.clients))
        return METHODS[name].run(known, Federation(engine), request, _short(METHODS[name].settings))

    from loopback import CLIENTS as HELD
    from loopback import VALIDATION

    ours = of(LocalEngine(HELD, validation=VALIDATION))
    theirs = of(FlowerEngine(Loopback(nodes()), clients=4, deadline=2.0, patience=0.1))
    assert same(ours.subject.model, theirs.subject.model)
    assert ours.cost.client_flops == theirs.cost.client_flops


def _short(settings):
    """Return settings of fewer epochs: what is compared is the same for any number."""
    return replace(settings, epochs=1.0) if getattr(settings, "epochs", None) else settings


def test_what_retraining_would_do_is_done_by_some_and_not_by_fine_tuning(known):
    assert figures(Subject(known, known))[0] > 0.9
    assert figures(done("finetune", known).subject)[0] > 0.9
    for name, settings in (
        ("relabel", {}),
        ("erase_only", {"until": 1.0, "complement": 5.0}),
        ("delete", {"lr": 0.05, "epochs": 5.0}),
        ("salun", {"lr": 0.1, "epochs": 8.0, "salient": 0.9}),
        ("scrub", {"lr": 0.05, "temperature": 1.0, "epochs": 6.0}),
        ("neg_grad", {"lr": 0.05, "kept": 0.5, "epochs": 4.0}),
    ):
        u, r = figures(done(name, known, **settings).subject)
        assert u < 0.4, name
        assert r > 0.8, name


def test_negation_turns_the_first_convolution_round_and_nothing_else(known):
    request = replace(REQUEST, repair=replace(REPAIR, training=replace(REPAIR.training, lr=1e-12, weight_decay=0.0)))
    kept = negate(known, federation(), request, LocalSettings()).subject.row_kept
    before, after = dict(known.module.named_parameters()), dict(kept.module.named_parameters())
    for name, own in before.items():
        torch.testing.assert_close(after[name], -own if name.startswith("0.") else own)


def test_the_first_convolution_is_the_first_that_is_called():
    class Crossed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(1, 4, 3)
            self.head = torch.nn.Linear(64, 3)

        def forward(self, images):
            return self.head(self.late(self.early(images).relu()).relu().flatten(1))

    net = classifier(Crossed())
    request = replace(REQUEST, repair=replace(REPAIR, training=replace(REPAIR.training, lr=1e-12, weight_decay=0.0)))
    kept = dict(negate(net, federation(), request, LocalSettings()).subject.row_kept.module.named_parameters())
    for name, own in net.module.named_parameters():
        torch.testing.assert_close(kept[name], -own if name.startswith("early.") else own)


def test_masks_hold_the_largest_values_of_all_tensors_together():
    masks = largest({"a": torch.tensor([[0.1, -5.0]]), "b": torch.tensor([3.0, 0.2])}, 0.5)
    assert masks["a"].tolist() == [[False, True]]
    assert masks["b"].tolist() == [True, False]


def test_of_equal_gradients_those_first_in_the_model_are_salient_after_a_kill_too(tmp_path):
    """A journal gives sums back by name, and "10" comes before "3" there."""
    net = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Identity())))
    net.append(nn.Flatten()).append(nn.Linear(64, 3))
    torch.manual_seed(0)
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, -1.0), nn.init.constant_(layer.bias, -0.1)  # all units are silent
    model, settings = Classifier.of(net, (1, 8, 8)), SalUn(0.05, 1.0, 0.99)

    class Killed(LocalEngine):
        def run(self, job):
            if job.phase == "salun" and job.round == 1:
                raise KeyboardInterrupt
            return super().run(job)

    with pytest.raises(KeyboardInterrupt):
        salun(model, Federation(Killed(CLIENTS), Journal(tmp_path)), REQUEST, settings)
    again = salun(model, Federation(LocalEngine(CLIENTS), Journal(tmp_path)), REQUEST, settings)
    whole = salun(model, federation(), REQUEST, settings)
    assert same(again.subject.row_kept, whole.subject.row_kept)


class Lying(LocalEngine):
    """Client 1 sends sums that nothing adds up to, or claims a billion images."""

    lie = "values"

    def run(self, job):
        for reply in super().run(job):
            if reply.client != NAMES[1] or job.task.kind not in ("gradients", "moments"):
                yield reply
            elif self.lie == "values":
                yield replace(reply, tensors={name: tensor * 0 + 1e308 for name, tensor in reply.tensors.items()})
            else:
                yield replace(reply, images=10**9, tensors={n: 2.0**30 * t for n, t in reply.tensors.items()})


@pytest.mark.parametrize("name", ["svd", "ssd", "salun"])
def test_a_client_that_lies_in_a_sum_is_refused_by_name_or_weighs_as_all_others(name, known, caplog):
    held = partition(make_images(360), by="iid", clients=4)
    request = replace(REQUEST, clients=tuple(held), holders=tuple(held))
    chosen, settings = METHODS[name], _short(METHODS[name].settings)
    found = chosen.run(known, Federation(Lying(held)), request, settings)
    assert f"{NAMES[1]} gave no usable reply" in caplog.text
    assert all(bool(tensor.isfinite().all()) for tensor in found.subject.row_kept.module.state_dict().values())
    boasting = Lying(held)
    boasting.lie = "images"
    caplog.clear()
    chosen.run(known, Federation(boasting), request, settings)
    assert f"{NAMES[1]} says that it has 1000000000 images" in caplog.text


def test_a_claim_weighs_in_a_sum_as_much_as_all_others_together():
    """Of 1, 2 and 9 over 10, 30 and 1,000 images: 1 + 2 + 9 * 40 / 1000, over 80 images."""
    told = [
        Reply(name, {"w": torch.tensor(value)}, images)
        for name, value, images in zip("abc", (1.0, 2.0, 9.0), (10, 30, 1000))
    ]
    for order in permutations(told):
        sums = _total(iter(order))
        assert int(sums.pop("images:")) == 80
        assert float(sums["w"]) == pytest.approx(3.36)
    assert float(_total(iter(told[:2]))["w"]) == 3.0


@pytest.mark.parametrize("name", ["delete", "ssd", "svd", "salun"])
def test_holders_of_few_images_whose_rules_let_none_answer_do_not_end_a_method(name, known):
    """Of seven clients that hold the class five have four images of it, and refuse for ever."""
    images = make_images(600)
    of, others = (
        torch.isin(images.labels, torch.tensor([2])).nonzero().flatten(),
        (images.labels != 2).nonzero().flatten(),
    )
    rows = [*(of[4 * k : 4 * k + 4] for k in range(5)), of[20:60], of[60:100]]
    held = {f"client-{k}": images.take(torch.cat([some, others[50 * k : 50 * k + 50]])) for k, some in enumerate(rows)}
    engine = LocalEngine(held, rules=DEFAULT_RULES)
    request = replace(REQUEST, clients=tuple(held), holders=tuple(held))
    outcome = METHODS[name].run(known, Federation(engine), request, _short(METHODS[name].settings))
    assert outcome.subject.model.labels == (0, 1)


def test_salun_changes_salient_weights_alone(known):
    kept = salun(known, federation(), REQUEST, SalUn(0.05, 1.0, 0.25)).subject.row_kept
    changed = total = 0
    for name, own in kept.module.named_parameters():
        changed += int((own != dict(known.module.named_parameters())[name]).sum())
        total += own.numel()
    assert 0.2 < changed / total <= 0.25 + 1 / total


def test_damping_by_hand():
    own, everything = {"w": torch.tensor([1.0, 8.0, 40.0, 0.0])}, {"w": torch.tensor([1.0, 1.0, 2.0, 0.0])}
    assert dampening(own, everything, Ssd(10.0, 1.0))["w"].tolist() == pytest.approx([1, 1, 0.05, 1])
    assert dampening(own, everything, Ssd(4.0, 2.0))["w"].tolist() == pytest.approx([1, 0.25, 0.1, 1])
    assert dampening(own, everything, Ssd(4.0, 100.0))["w"].tolist() == [1, 1, 1, 1]  # nothing grows


def test_ssd_damps_by_the_means_over_images_of_the_class_and_of_all(known):
    """A slow version: a gradient an image, over all clients' images."""
    x = make_images(120)
    pixels = (x.images.float() / 255 - x.mean[0]) / x.std[0]
    net = known.copy().module.eval()
    squares = {name: torch.zeros(2, *own.shape, dtype=torch.float64) for name, own in net.named_parameters()}
    for image, label in zip(pixels, x.labels):
        loss = torch.nn.functional.cross_entropy(net(image[None]), label[None])
        for name, gradient in zip(squares, torch.autograd.grad(loss, list(net.parameters()))):
            squares[name][0] += gradient.double() ** 2 / 120
            squares[name][1] += (gradient.double() ** 2 if label == 2 else 0 * gradient.double()) / 40
    kept = ssd(known, federation(), REQUEST, Ssd(1.5, 1.0)).subject.row_kept
    for name, own in kept.module.named_parameters():
        all_images, of_class = squares[name]
        factor = torch.where(of_class > 1.5 * all_images, (all_images / of_class).clamp_max(1), torch.tensor(1.0))
        expected = dict(known.module.named_parameters())[name].detach().double() * factor
        assert float((own.detach() - expected).norm()) <= 0.02 * float(expected.norm())


def test_a_projection_by_hand():
    # Eigenvalues 3 and 1 are shares of 3/4 and 1/4: with a scale of 2, 2 s / (s + 1) is 6/7 and 2/5.
    moments = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(projection(moments, 2.0), torch.diag(torch.tensor([6 / 7, 2 / 5], dtype=torch.float64)))
    assert not projection(torch.zeros(2, 2, dtype=torch.float64), 100.0).any()


def test_the_edit_takes_out_what_only_the_class_spans(known, monkeypatch):
    """With inputs of the class along one axis and of the others along another, the weights lose the first."""
    from fedunlearn.methods import svd as module

    def sums(model, fed, task, *, phase):
        axis = 0 if phase == "svd-forgotten" else 1
        found = {}
        for name, layer in module.moment_layers(model.module).items():
            d = layer.weight[0].numel()
            found[name] = torch.zeros(d, d, dtype=torch.float64)
            found[name][axis, axis] = 5.0
        return found, 10

    monkeypatch.setattr(module, "summed", sums)
    kept = svd(known, federation(), REQUEST, Svd(1e9, 1e9)).subject.row_kept
    for name, layer in module.moment_layers(kept.module).items():
        before = module.moment_layers(known.module)[name].weight.flatten(1).clone()
        before[:, 0] = 0
        torch.testing.assert_close(layer.weight.flatten(1), before)


def test_pruning_by_each_ranking_is_what_unlearning_by_it_is(known):
    for name, criterion in (("tf_idf", tf_idf), ("contrast", contrast)):
        ours = done(name, known).subject.model
        theirs = unlearn(known, federation(), forget=2, cut=Cut(0.3), repair=REPAIR, rank=Ranking(criterion)).model
        assert same(ours, theirs)
        assert ours.plan == theirs.plan


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_random_control_loses_as_many_channels_as_spoke_for_the_class(known, scope):
    def few(stats, label, **_):
        """Two channels of each layer speak for the class, whatever the cut asks for."""
        return {layer: torch.where(torch.arange(own.shape[1]) < 2, 1.0, -1.0) for layer, own in stats.sums.items()}

    request = replace(REQUEST, rank=Ranking(few), cut=Cut(0.5, scope=scope))
    ours = unlearn(known, federation(), forget=[2], cut=request.cut, repair=REPAIR, rank=request.rank)
    gone = {row["layer"]: row["removed"] for row in ours.table()}
    beside = METHODS | COMPARED
    equal = replace(request, cut=replace(request.cut, fraction=as_many(ours)))
    control = beside["random"].run(known, federation(), equal, None)
    lost = {layer: len(own) for layer, own in control.subject.model.plan.pruned.items()}
    assert set(gone.values()) == {2}
    assert sum(lost.values()) == sum(gone.values())
    alone = beside["random"].run(known, federation(), replace(request, rank=Ranking(contrast)), None)
    assert sum(map(len, alone.subject.model.plan.pruned.values())) > sum(gone.values())


def test_the_random_control_is_cut_as_the_run_where_enough_channels_speak_for_the_class():
    """Where channels go in units fewer go than the cut asks for, of random ones too."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 10, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(10, 16, 3, padding=1),
        torch.nn.GroupNorm(8, 16),
        torch.nn.ReLU(),
        torch.nn.Conv2d(16, 12, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(12 * 64, 3),
    )
    for end, value in (("highest", 1.0), ("lowest", -1.0)):

        def alike(stats, label, value=value, **_):
            return {layer: torch.full((own.shape[1],), value) for layer, own in stats.sums.items()}

        cut = Cut(0.6, end=end)
        ours = unlearn(net, federation(), forget=[2], cut=cut, repair=REPAIR, rank=Ranking(alike))
        request = replace(REQUEST, rank=Ranking(alike), cut=replace(cut, fraction=as_many(ours)))
        control = COMPARED["random"].run(classifier(net), federation(), request, None)
        lost, gone = (
            {name: len(own) for name, own in model.plan.pruned.items()} for model in (control.subject.model, ours.model)
        )
        assert lost == gone == {"0": 6, "2": 8, "5": 7}


def test_the_random_control_draws_its_channels_by_the_seed(known):
    plans = [done("random", known, replace(federation(), seed=seed)).subject.model.plan.pruned for seed in range(4)]
    assert len({str(plan) for plan in plans}) > 1
    assert {str({name: len(own) for name, own in plan.items()}) for plan in plans} == {"{'0': 1, '3': 2}"}


def test_the_control_takes_the_erase_step_of_the_recipe_and_the_method_its_own():
    erasing = Erasing(0.5, 0.0, 0.4, 0.9)
    assert settings_by(COMPARED["erase_only"], erasing).objective() == erasing
    assert COMPARED["erase_only"].settings.objective() == Erasing(1.0, 0.1, until=0.3)


def test_settings_are_resolved_to_what_is_done():
    sparse = replace(COMPARED["l1_sparse"].settings, until=0.4)
    used = resolved(sparse, REQUEST, federation())
    assert used == {"lr": 0.01, "epochs": 10.0, "penalty": 5e-4, "until": 0.5}  # one of two rounds
    longer = replace(REQUEST, repair=replace(REPAIR, rounds=222))
    assert resolved(sparse, longer, federation())["until"] == 0.401
    once = replace(REQUEST, repair=replace(REPAIR, rounds=1))
    assert resolved(sparse, once, federation())["until"] == 1.0
    assert resolved(COMPARED["relabel"].settings, REQUEST, federation()) == {"lr": 0.05, "epochs": 2.0}
    assert resolved(COMPARED["contrast"].settings, REQUEST, federation()) == {"fraction": 0.3, "lr": 0.05}
    assert resolved(COMPARED["head_only"].settings, REQUEST, federation()) is None
    of_equal_cost = replace(REQUEST, spent=Cost(client_flops=1))
    assert resolved(COMPARED["finetune"].settings, of_equal_cost, federation()) == {"lr": 0.05}


@pytest.mark.parametrize("name", ["relabel", "erase_only", "negate"])
def test_epochs_by_the_recipe_are_told_without_a_rounding_error(name):
    ten = {f"client-{k}": make_images(12, seed=k) for k in range(10)}
    fed = Federation(LocalEngine(ten), participation=0.2)
    rounds = replace(REPAIR, training=replace(REPAIR.training, local_epochs=0.027), rounds=222)
    asked = replace(REQUEST, repair=rounds, clients=tuple(ten), holders=tuple(ten))
    assert resolved(METHODS[name].settings, asked, fed)["epochs"] == 0.027 * 222 * 0.2


@pytest.mark.parametrize("participation", [2 / 3, 0.5, 0.1])  # two, two and one of three clients in each round
def test_the_epochs_that_are_resolved_are_those_that_are_trained(known, participation):
    some = replace(federation(), participation=participation)
    images = sum(len(own.without((2,))) for own in CLIENTS.values())
    by_recipe = resolved(COMPARED["negate"].settings, REQUEST, some)
    spoken = LocalSettings(lr=by_recipe["lr"], epochs=by_recipe["epochs"])
    for settings in (LocalSettings(), spoken):
        cost = METHODS["negate"].run(known, some, REQUEST, settings).cost
        assert cost.client_samples == pytest.approx(by_recipe["epochs"] * images, rel=0.02)


@pytest.mark.parametrize("name", ["relabel", "neg_grad", "salun"])
def test_the_one_client_that_holds_the_class_does_no_more_epochs_than_are_asked_for(known, name):
    few, own = replace(federation(), participation=0.4), CLIENTS[NAMES[0]]  # one of three in a round, if all hold it
    asked = replace(REQUEST, holders=NAMES[:1])
    settings = replace(METHODS[name].settings, lr=0.05, epochs=4.0)
    METHODS[name].run(known, few, asked, settings)
    trained = [entry for entry in few.journal.entries("") if entry.job == "train"]
    assert {entry.clients for entry in trained} == {NAMES[:1]}
    # Of each batch a quarter is of the class, so that an epoch is three quarters of a pass over the others.
    steps = sum(entry.samples for entry in trained) / 4
    assert steps == pytest.approx(len(own.without((2,))), rel=0.35)
    assert resolved(METHODS[name].settings, asked, few)["epochs"] == (2.0 if name == "relabel" else 10.0)


@pytest.mark.parametrize(
    ("name", "takes_part"),
    [(own, NAMES[:1]) for own in ("erase_only", "neg_grad", "relabel", "salun", "scrub", "delete")]
    + [(own, NAMES) for own in ("finetune", "l1_sparse")],
)
def test_rounds_that_need_images_of_the_class_are_of_those_who_hold_it(known, name, takes_part):
    fed = federation()
    METHODS[name].run(known, fed, replace(REQUEST, holders=NAMES[:1]), METHODS[name].settings)
    trained = [entry.clients for entry in fed.journal.entries("") if entry.job == "train"]
    assert trained[0] == tuple(takes_part)


@pytest.mark.parametrize("name", ["finetune", "random", "negate", "delete"])
def test_the_weight_decay_of_the_repair_reaches_controls_and_other_methods(known, name):
    def norm(decay):
        asked = replace(REQUEST, repair=replace(REPAIR, training=replace(REPAIR.training, weight_decay=decay)))
        settings = LocalSettings() if name == "random" else replace(COMPARED[name].settings, lr=None, epochs=None)
        model = COMPARED[name].run(known, federation(), asked, settings).subject.model
        return sum(float(own.detach().square().sum()) for own in model.module.parameters())

    assert norm(0.15) < 0.9 * norm(0.0)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("l1_sparse", {"penalty": -1}, "Sparse(penalty=...) is out of range: got -1"),
        ("neg_grad", {"kept": 1.0}, "Ascend(kept=...) is out of range: got 1.0"),
        ("salun", {"salient": 7}, "SalUn(salient=...) is out of range: got 7"),
        ("ssd", {"above": -1}, "Ssd(above=...) is out of range: got -1"),
        ("svd", {"kept": 0}, "Svd(kept=...) is out of range: got 0"),
        ("delete", {"lr": 0}, "Delete(lr=...) is out of range: got 0"),
        ("contrast", {"fraction": 1.0}, "Prune(fraction=...) is out of range: got 1.0"),
        ("erase", {"until": 0}, "Erasing(until=...) is out of range: got 0"),
        ("erase_only", {"every": 0.5}, "Erasing(every=...) is out of range: got 0.5"),
        ("erase_only", {"complement": -1}, "Erasing(complement=...) is out of range: got -1"),
    ],
)
def test_settings_out_of_range_are_refused(name, values, text):
    with pytest.raises(RecipeError, match=re.escape(text)):
        replace(COMPARED[name].settings, **values)


def test_a_model_without_a_convolution_cannot_be_negated():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    with pytest.raises(ModelError, match=r"NoT negates the first convolution, and the model has none: choose another"):
        negate(classifier(net), federation(), REQUEST, LocalSettings())


def test_a_layer_of_which_clients_tell_nothing_is_not_edited(known):
    """With rules that hide images, eight images of a client, three of the class, do not tell of the second layer."""
    few = Federation(LocalEngine(partition(make_images(24), by="iid", clients=3), rules=Privacy(min_images=2)))
    kept = svd(known, few, REQUEST, Svd(1.0, 100.0)).subject.row_kept
    after, before = (dict(own.module.named_parameters()) for own in (kept, known))
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["3.weight"], before["3.weight"])


def test_moments_cost_their_products_too():
    # Kernels of 9 and 54 at 64 positions, and 8 inputs: 2 (64 81 + 64 2916 + 64) operations beside the pass.
    assert Moments().operations(classifier(make_net()), 1000, 3000) == 1000 + 2 * (64 * 81 + 64 * 2916 + 64)


def test_a_target_that_the_original_is_at_does_not_end_a_method(known):
    request = replace(REQUEST, repair=replace(REPAIR, target=0.5))
    held = hold_out(CLIENTS, 0.2)
    fed = Federation(LocalEngine(held[0], validation=held[1]))
    assert done("erase_only", known, fed, request).cost.rounds == 2


def test_fine_tuning_stops_at_the_cost_of_pruning_where_that_is_known(known):
    spent = done("contrast", known).cost
    fed = federation()
    cost = done("finetune", known, fed, replace(REQUEST, spent=spent)).cost
    assert cost.client_flops == pytest.approx(spent.client_flops, rel=0.1)


def test_fine_tuning_of_equal_cost_has_more_rounds_of_the_same_batches_and_not_longer_ones(known):
    repair = replace(REPAIR, rounds=12, training=replace(REPAIR.training, local_epochs=0.5))
    request = replace(REQUEST, repair=repair)
    alone = done("erase_only", known, request=request, until=0.05).cost
    spent = replace(alone, client_flops=alone.client_flops * 5 // 4)
    cost = done("finetune", known, request=replace(request, spent=spent)).cost
    assert (alone.rounds, cost.rounds) == (12, 15)
    assert cost.client_samples / cost.rounds == 40  # half of the 80 images that stay


def test_epochs_are_of_all_rounds_together(known):
    for rounds in (1, 2, 4):
        request = replace(REQUEST, repair=replace(REPAIR, rounds=rounds))
        cost = done("l1_sparse", known, request=request, epochs=2.0).cost
        assert (cost.rounds, cost.client_samples) == (rounds, 160)


def test_a_method_says_what_it_needs_and_tunes_settings_that_it_has():
    for name, method in COMPARED.items():
        assert method.name == name
        assert method.label
        assert method.needs
        known = set() if method.settings is None else {own.name for own in fields(method.settings)}
        assert set(method.space) <= known
        assert all(len(values) > 1 for values in method.space.values())


def test_validation_images_are_never_trained_on(known):
    """The clients of a method are given apart from their validation images: nothing changes where those do."""
    held = hold_out(CLIENTS, 0.2)
    fed = Federation(LocalEngine(held[0], validation=held[1]))
    other = Federation(LocalEngine(held[0], validation={name: make_images(9, seed=9) for name in held[1]}))
    assert same(done("scrub", known, fed).subject.model, done("scrub", known, other).subject.model)
    assert classifier(make_net()).labels is None


def test_a_method_beside_a_repair_without_rounds_has_one():
    none = replace(REQUEST, repair=replace(REQUEST.repair, rounds=0))
    outcome = negate(classifier(make_net()), Federation(LocalEngine(CLIENTS)), none, LocalSettings())
    assert outcome.cost.rounds == 1


def test_fine_tuning_beside_a_pruning_without_repair_has_a_round():
    spent = Cost(rounds=0, client_flops=10**7)
    outcome = finetune(
        classifier(make_net()), Federation(LocalEngine(CLIENTS)), replace(REQUEST, spent=spent), LocalSettings()
    )
    assert outcome.cost.rounds == 1


def test_a_ranking_keeps_the_options_that_the_recipe_gives_it():
    rank = Ranking(partial(contrast))
    assert _ranked(replace(REQUEST, rank=rank), contrast, None).rank is rank
    assert _ranked(replace(REQUEST, rank=rank), tf_idf, None).rank.criterion is tf_idf


def test_controls_of_pruning_stand_beside_runs_that_prune():
    pruned = object.__new__(Unlearned)
    erasing = replace(REQUEST.repair, training=replace(REQUEST.repair.training, objective=Erasing()))
    with_step = replace(REQUEST, repair=erasing, unlearned=pruned)
    assert prunes(with_step)
    assert ERASE_ONLY.applies(with_step)
    uncut = replace(with_step, cut=Cut(0))
    assert not prunes(uncut)
    assert not ERASE_ONLY.applies(uncut)
    assert not ERASE_ONLY.applies(replace(REQUEST, unlearned=pruned))


def test_two_of_three_epochs_of_scrub_go_away(monkeypatch):
    told = []

    def trained_once(model, fed, request, settings, *, objective, phase):
        told.append(objective)
        return model

    monkeypatch.setattr(scrub_module, "trained_once", trained_once)
    fed = Federation(LocalEngine(CLIENTS))
    scrub_module.scrub(classifier(make_net()), fed, REQUEST, Scrub(epochs=4.0))
    assert told == [Objective(1e-3, 4.0, turns=4, ascents=3, away=0.1)]


def counting():
    net = make_net()
    net.register_parameter("steps", nn.Parameter(torch.tensor([3]), requires_grad=False))
    return net


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_training_leaves_a_weight_of_whole_numbers_as_it_is(momentum):
    fed, server = Federation(LocalEngine(CLIENTS)), Server(momentum=momentum)
    net = train_rounds(counting(), fed, Training(0.05, 20), rounds=2, server=server)
    assert net.module.steps.item() == 3


@pytest.mark.parametrize(("method", "settings"), [(ssd, Ssd()), (salun, SalUn(0.05, 1.0))], ids=["ssd", "salun"])
def test_methods_by_gradients_leave_a_weight_of_whole_numbers_as_it_is(method, settings):
    outcome = method(classifier(counting()), Federation(LocalEngine(CLIENTS)), REQUEST, settings)
    assert outcome.subject.row_kept.module.steps.item() == 3
