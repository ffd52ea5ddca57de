"""Which images, clients, rates and settings reach the formulas: these have tests of their own."""

import os
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import classifier, logits, make_images, make_net, normalised, write_set
from fedunlearn.channels.plan import Cut
from fedunlearn.channels.scores import Ranking, contrast, random_scores
from fedunlearn.channels.stats import ChannelStats
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.errors import RunError
from fedunlearn.evidence.maps import FeatureMaps, save_feature_maps
from fedunlearn.federation.about import asked
from fedunlearn.federation.ask import ask
from fedunlearn.federation.averaging import Server
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.lock import LOCK
from fedunlearn.federation.measuring import measure, reestimate
from fedunlearn.federation.privacy import Privacy
from fedunlearn.federation.rounds import Repair, Watch, _drawn, train_rounds, validation_accuracy
from fedunlearn.federation.sums import Gradients, Moments
from fedunlearn.federation.tasks import Measure, Reestimate
from fedunlearn.methods.base import Request
from fedunlearn.methods.svd import Svd, svd
from fedunlearn.methods.table import COMPARED
from fedunlearn.run import references
from fedunlearn.run.experiment import prepare
from fedunlearn.run.kept import cached
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.references import request
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.sgd import Forgetting, Training, one_cycle, train_locally
from fedunlearn.unlearn import Forgotten, unlearn

CLIENTS = partition(make_images(120), by="iid", clients=3)
NAMES = tuple(CLIENTS)
HALF = Server(lambda _, rounds: 0.5)
REQUEST = Request(
    forget=(2,),
    rank=Ranking(contrast, sample=30),
    cut=Cut(0.3),
    repair=Repair(Training(0.05, 8, 0.5), rounds=2, server=HALF),
    jointly=False,
    clients=NAMES,
    holders=NAMES,
    images=80.0,
)


class Told(LocalEngine):
    """Tells which jobs it was asked."""

    def __init__(self, clients=CLIENTS, **values):
        super().__init__(clients, **values)
        self.jobs = []

    def run(self, job):
        self.jobs.append(job)
        return super().run(job)


def jobs(name, request=REQUEST, fed=None, **settings):
    """Return the jobs that a method asks of its clients."""
    engine, method = Told(rules=Privacy(min_count=0, min_images=1)), COMPARED[name]
    own = replace(method.settings, **settings) if settings else method.settings
    method.run(classifier(make_net()), replace(fed or Federation(engine), engine=engine), request, own)
    return engine.jobs


@pytest.mark.parametrize(
    ("name", "phase", "exclude", "clients", "sample"),
    [
        ("svd", "svd-forgotten", (0, 1), NAMES[:2], 30),
        ("svd", "svd-kept", (2,), NAMES[1:], 30),
        ("ssd", "ssd-forgotten", (0, 1), NAMES[:2], None),
        ("ssd", "ssd-kept", (2,), NAMES[1:], None),
        ("salun", "salun-gradients", (0, 1), NAMES[:2], 30),
    ],
)
def test_sums_are_over_the_images_of_their_name_at_the_clients_that_hold_them(name, phase, exclude, clients, sample):
    asked = {job.phase: job for job in jobs(name, replace(REQUEST, holders=NAMES[:2], clients=NAMES[1:]))}
    assert (asked[phase].task.exclude, asked[phase].clients, asked[phase].task.sample) == (exclude, clients, sample)


def test_each_space_of_the_projection_has_its_own_scale(monkeypatch):
    """The class spans two axes by shares of 3/4 and 1/4: by a scale of 2 the weights keep 1/7 and 3/5 there."""
    from fedunlearn.methods import svd as module

    def sums(model, fed, task, *, phase):
        axes = {0: 3.0, 1: 1.0} if phase == "svd-forgotten" else {2: 5.0, 3: 5.0}
        found = {}
        for name, layer in module.moment_layers(model.module).items():
            d = layer.weight[0].numel()
            found[name] = torch.diag(torch.tensor([axes.get(k, 0.0) for k in range(d)], dtype=torch.float64))
        return found, 10

    monkeypatch.setattr(module, "summed", sums)
    net = classifier(make_net())
    kept = svd(net, Federation(LocalEngine(CLIENTS)), REQUEST, Svd(kept=1e9, forgotten=2.0)).subject.row_kept
    for name, layer in module.moment_layers(kept.module).items():
        expected = net.module.get_submodule(name).weight.flatten(1).clone()
        expected[:, 0] /= 7
        expected[:, 1] *= 3 / 5
        torch.testing.assert_close(layer.weight.flatten(1), expected)


def test_what_of_the_class_lies_in_the_space_of_the_others_stays(monkeypatch):
    """The class along (1, 0), the others along (1, 1): of the class's input half of (1, 1) is left, by hand."""
    from fedunlearn.methods import svd as module

    def sums(model, fed, task, *, phase):
        corner = [[1.0, 0.0], [0.0, 0.0]] if phase == "svd-forgotten" else [[1.0, 1.0], [1.0, 1.0]]
        found = {}
        for name, layer in module.moment_layers(model.module).items():
            d = layer.weight[0].numel()
            found[name] = torch.zeros(d, d, dtype=torch.float64)
            found[name][:2, :2] = torch.tensor(corner)
        return found, 10

    monkeypatch.setattr(module, "summed", sums)
    net = classifier(make_net())
    kept = svd(net, Federation(LocalEngine(CLIENTS)), REQUEST, Svd(kept=1e9, forgotten=1e9)).subject.row_kept
    for name, layer in module.moment_layers(kept.module).items():
        before = net.module.get_submodule(name).weight.flatten(1)
        expected = before.clone()
        expected[:, 0] = before[:, :2].sum(1) / 2  # W (1/2, 1/2), of the input (1, 0)
        torch.testing.assert_close(layer.weight.flatten(1), expected)


@pytest.mark.parametrize(
    ("name", "rate"),  # in rounds of the recipe's schedule, of half the rate; once where a teacher stands still
    [("contrast", 0.01), ("negate", 0.01), ("l1_sparse", 0.01), ("finetune", 0.01), ("delete", 0.02), ("scrub", 0.02)],
)
def test_a_method_trains_by_the_rate_of_its_settings_and_the_schedule_of_the_recipe(name, rate):
    asked = replace(REQUEST, spent=Cost(rounds=1, client_flops=2 * 10**7) if name == "finetune" else None)
    rates = {job.task.lr for job in jobs(name, asked, lr=0.02) if job.task.kind == "train"}
    assert rates == {rate}


@pytest.mark.parametrize("name", ["scrub", "delete"])
def test_a_method_with_a_teacher_asks_everybody_once_whatever_the_participation(name):
    asked = jobs(name, fed=Federation(LocalEngine(CLIENTS), participation=0.3))
    assert [job.clients for job in asked] == [NAMES]


def test_a_client_that_holds_nothing_but_the_class_distils_it():
    assert [job.clients for job in jobs("delete", replace(REQUEST, holders=NAMES[:1], clients=NAMES[1:]))] == [
        NAMES[:1]
    ]


def test_fine_tuning_of_equal_cost_never_erases():
    training = replace(REQUEST.repair.training, objective=Erasing(separation=0.1))
    asked = replace(
        REQUEST, repair=replace(REQUEST.repair, training=training), spent=Cost(rounds=1, client_flops=2 * 10**7)
    )
    assert {job.task.training.objective for job in jobs("finetune", asked)} == {None}


def test_pruning_cuts_by_the_fraction_of_its_settings():
    request, fed = replace(REQUEST, cut=Cut(0.3, end="lowest")), Federation(LocalEngine(CLIENTS))
    settings = replace(COMPARED["contrast"].settings, fraction=0.5)
    outcome = COMPARED["contrast"].run(classifier(make_net()), fed, request, settings)
    assert {name: len(gone) for name, gone in outcome.subject.model.plan.pruned.items()} == {"0": 3, "3": 4}


@pytest.mark.parametrize("jointly", [True, False])
def test_the_random_control_asks_what_pruning_asks(jointly):
    both = replace(REQUEST, forget=(1, 2), jointly=jointly)
    kinds = [[job.task.kind for job in jobs(name, both)] for name in ("contrast", "random")]
    assert kinds[0] == kinds[1] == ["measure"] * (1 if jointly else 2) + ["reestimate", "train", "train"]


def test_validation_and_measurement_ask_all_clients_whoever_trains():
    train, held = hold_out(CLIENTS, 0.2)
    fed = Federation(LocalEngine(train, validation=held), clients=NAMES[:1])
    _, entry = validation_accuracy(classifier(make_net()), fed, phase="look")
    assert entry.clients == NAMES
    stats, holdings = measure(classifier(make_net()), fed)
    assert int(stats.counts.sum()) == sum(map(len, train.values()))
    assert set(holdings.counts) == set(NAMES)


def test_clients_draw_by_the_seed_of_the_federation():
    def trained(seed):
        net = train_rounds(make_net(), Federation(LocalEngine(CLIENTS), seed=seed), Training(0.05, 8), rounds=1)
        return torch.nn.utils.parameters_to_vector(net.module.parameters())

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_statistics_are_re_estimated_as_if_the_images_left_out_were_not_there():
    model, without = classifier(make_net()), {name: images.without((2,)) for name, images in CLIENTS.items()}
    ours = reestimate(model, Federation(LocalEngine(CLIENTS)).keeping(exclude=(2,))).module.state_dict()
    theirs = reestimate(model, Federation(LocalEngine(without))).module.state_dict()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "task", [Measure(classes=3, sample=7), Reestimate(sample=7), Gradients(sample=7), Moments(sample=7)]
)
def test_a_client_answers_over_as_many_images_as_are_asked_for(task):
    fed = Federation(LocalEngine(CLIENTS, rules=Privacy(min_count=0)))
    replies, _ = ask(fed.engine, fed.job(task, classifier(make_net()), phase="some"), list)
    assert [reply.images for reply in replies] == [7, 7, 7]


def test_the_sample_of_a_ranking_is_that_of_the_statistics_and_of_batch_normalisation():
    engine = Told()
    repair = Repair(Training(0.05, 8), rounds=0)
    unlearn(make_net(), Federation(engine), forget=2, cut=Cut(0.3), repair=repair, rank=Ranking(contrast, sample=17))
    assert {job.task.kind: job.task.sample for job in engine.jobs} == {"measure": 17, "reestimate": 17}


def test_participation_is_a_share_of_those_whose_rules_let_them_answer():
    ten = {f"client-{k}": make_images(12, seed=k) for k in range(10)}
    fed = Federation(LocalEngine(ten), participation=0.5)
    assert len(_drawn(fed, None, "train", 0, ())) == 5
    assert len(_drawn(fed, None, "train", 0, [f"client-{k}" for k in range(6)])) == 2


def test_unlearning_costs_what_all_its_steps_cost():
    fed, repair = Federation(LocalEngine(CLIENTS)), Repair(Training(0.05, 8), rounds=1)
    done = unlearn(make_net(), fed, forget=2, cut=Cut(0.3), repair=repair, rank=Ranking(contrast))
    assert done.cost == Cost.of(fed.journal.entries(""))
    assert done.cost.client_samples == 120 + 80 + 80  # all are measured, those that stay normalise and train


def test_the_teacher_normalises_by_the_statistics_it_came_with():
    images, net, seen = make_images(24), make_net(), []
    expected = logits(net, normalised(images)).sum(0)

    def loss(told):
        seen.append(told.before)
        return told.logits.square().mean()

    objective = SimpleNamespace(kind="told", share=0.0, until=1.0, every=1, teacher=True, loss=loss)
    training = Training(0.05, 24)
    object.__setattr__(training, "objective", objective)
    net.train()  # as the last client left it
    train_locally(net, images, training, lr=0.05, draw=torch.Generator(), forgetting=Forgetting((), 0, (2,), "8"))
    torch.testing.assert_close(seen[0].sum(0), expected, rtol=1e-4, atol=1e-4)


def test_what_a_recipe_says_reaches_the_parts_of_a_run(tmp_path):
    said = ["federation.clients=4", "federation.participation=0.5", "federation.seed=3", "unlearn.seed=8"]
    said += ["train.server_momentum=0.4", "unlearn.server_momentum=0.2", "unlearn.schedule=one-cycle"]
    said += ["unlearn.sample=17", "unlearn.end=lowest", "unlearn.scope=global", "unlearn.target=0.9"]
    said += ["unlearn.influence=2.0", "audit.lr=0.07", "unlearn.local_epochs=2.0"]
    experiment = prepare(load_recipe(str(write_set(tmp_path)), said))
    fed = experiment.federation(Journal())
    assert (fed.participation, fed.seed, experiment.unlearning(fed).seed) == (0.5, 3, 8)
    assert experiment.server() == Server(one_cycle, 0.4)
    repair = experiment.repair()
    assert (repair.server, repair.target, repair.rounds) == (Server(one_cycle, 0.2), 0.9, 2)
    assert (repair.training.lr, repair.training.local_epochs) == (0.05, 2.0)
    ranking = experiment.ranking()
    assert ranking.sample == 17
    told = [ChannelStats({"conv": torch.ones(1, 1)}, torch.tensor([images])) for images in (1, 1, 100)]
    assert ranking.pooling(told).counts.tolist() == [1 + 1 + 2]  # no client weighs more than twice the median
    assert experiment.cut() == Cut(0.3, "lowest", "global")
    assert experiment.audit_images().lr == 0.07


def test_a_round_of_repair_holds_the_kept_images_of_the_clients_that_are_drawn(tmp_path):
    """96 training images of four classes, a quarter of them to forget: two of four clients hold half of the others."""
    said = ["federation.clients=4", "federation.participation=0.5", "federation.partition=iid"]
    experiment = prepare(load_recipe(str(write_set(tmp_path)), said))
    fed = experiment.federation(Journal())
    kept = int(experiment.table[:, [0, 1, 3]].sum())
    asked = request(experiment, fed, cut=experiment.cut(), clients=experiment.keepers())
    assert asked.images == kept / 2


def test_a_kept_model_is_of_its_classes_images_and_seed_alone():
    recipe = load_recipe("digits")
    wanted = [(forget, data, seed) for forget in ((9,), (8,), (8, 9)) for data in "ab" for seed in (1, 2)]
    assert len({cached(recipe, *one) for one in wanted}) == 12
    assert cached(recipe, (9, 8), "a", 1) == cached(recipe, (8, 9), "a", 1)


def test_a_model_is_retrained_as_the_original_was_trained_by_clients_that_keep_images(tmp_path, monkeypatch):
    said = ["federation.seed=3", "unlearn.seed=8", "train.server_momentum=0.4", "unlearn.weight_decay=0.001"]
    experiment, asked = prepare(load_recipe(str(write_set(tmp_path)), said)), []

    def train(model, fed, training, **values):
        asked.append((fed.seed, fed.exclude, fed.clients, training, values["rounds"], values["server"]))
        return model

    monkeypatch.setattr(references, "train_rounds", train)
    references.retrained_models(experiment, experiment.federation(Journal()), data="", count=2)
    training, server = experiment.recipe.training(), experiment.server()
    assert asked == [(seed, (2,), experiment.keepers(), training, 3, server) for seed in (4, 5)]


def test_feature_maps_show_the_channels_that_rank_highest_first_on_images_of_the_class_first(tmp_path):
    scores = {"0": torch.arange(6.0), "3": torch.zeros(8)}
    save_feature_maps(tmp_path / "maps", make_net(), make_images(30), scores, forget=[2])
    shown = FeatureMaps.load(tmp_path / "maps")
    assert (shown.layer, shown.columns) == ("0", (5, 4, 3, 2, 3, 2, 1, 0))
    assert shown.rows[:4] == ("class 2",) * 4
    assert "class 2" not in shown.rows[4:]


@pytest.mark.parametrize(
    ("change", "text"),
    [({"server": Server(momentum=0.5)}, "server_momentum is"), ({"watch": Watch(target=1.0)}, "watch is")],
)
def test_a_journal_does_not_go_on_with_another_momentum_or_target(change, text):
    fed = Federation(LocalEngine(CLIENTS))
    train_rounds(make_net(), fed, Training(0.05, 20), rounds=1)
    with pytest.raises(RunError, match=text):
        train_rounds(make_net(), fed, Training(0.05, 20), rounds=1, **change)


def test_functions_are_told_apart_by_what_they_call_and_by_their_defaults():
    assert asked(f=lambda x: x.sin()) != asked(f=lambda x: x.cos())
    assert asked(f=lambda x, k=1: x) != asked(f=lambda x, k=2: x)
    assert asked(f=partial(random_scores, seed=1)) != asked(f=partial(random_scores, seed=2))


def test_models_are_told_apart_by_the_classes_of_their_rows():
    assert asked(m=classifier(make_net(), labels=(0, 1, 2))) != asked(m=classifier(make_net(), labels=(1, 0, 2)))


def test_the_cost_that_is_printed_has_the_bytes_of_both_ways():
    model = classifier(make_net())
    cost = Cost(bytes_up=10**6, bytes_down=2 * 10**6)
    told = Forgotten(forget=(0,), repaired=model, model=model, clients=(), cost=cost)
    assert told.headline().endswith(" 3 MB")


def test_a_fork_of_a_process_does_not_take_its_lock_away(tmp_path):
    journal = Journal(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            journal.leave()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    journal.leave()
    assert not (tmp_path / LOCK).exists()
