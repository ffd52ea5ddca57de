"""The smallest cut that forgets: which one is chosen, what it costs, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import make_images, make_net, write_set
from fedunlearn.channels.plan import Cut
from fedunlearn.channels.scores import Ranking
from fedunlearn.console import RunProgress, notes
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.errors import FederationError, PlanError, RecipeError, RunError
from fedunlearn.evidence import words
from fedunlearn.evidence.keys import make_keys
from fedunlearn.evidence.verify import problems
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.ledger import Cost
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.privacy import Privacy
from fedunlearn.federation.rounds import Repair, train_rounds
from fedunlearn.run.commands import run
from fedunlearn.run.compare import Plan, compare
from fedunlearn.run.recipe import load_recipe
from fedunlearn.smallest import FRACTIONS, unlearn_smallest
from fedunlearn.training.sgd import Training
from fedunlearn.unlearn import unlearn

REPAIR = Repair(Training(lr=0.05, batch_size=8), rounds=1)


@pytest.fixture(scope="module")
def clients():
    return hold_out(partition(make_images(320, 4), by="iid", clients=2, seed=0), 0.2)


@pytest.fixture(scope="module")
def net(clients):
    """A net that knows the classes."""
    fed = federation(clients)
    return train_rounds(make_net(classes=4), fed, Training(lr=0.1, batch_size=8), rounds=4)


def federation(clients, journal=None, **engine):
    train, held = clients
    return Federation(LocalEngine(train, validation=held, **engine), journal or Journal())


@pytest.fixture
def most(monkeypatch):
    """Set the probability at which an attempt passes."""
    return lambda value: monkeypatch.setattr("fedunlearn.smallest.MOST", value)


def smallest(net, fed, **values):
    return unlearn_smallest(net, fed, **({"forget": 2, "repair": REPAIR, "rank": Ranking()} | values))


def probability(model, held):
    """Return the mean probability of class 2 on validation images of it, each client's in hundredths, the slow way."""
    total, count = 0.0, 0
    for images in held.values():
        given = []
        for pixels, label in zip(images.images, images.labels):
            if int(label) == 2:
                x = (pixels.float() / 255 - torch.tensor(images.mean)) / torch.tensor(images.std)
                with torch.no_grad():
                    given.append(float(model.module.eval()(x[None]).softmax(1)[0, 2]))
        total += round(sum(given) / len(given), 2) * len(given)
        count += len(given)
    return total / count


@pytest.fixture(scope="module")
def tried(net, clients):
    """What each cut would have given, the slow way."""
    models = {f: unlearn(net, federation(clients), forget=2, cut=Cut(f), repair=REPAIR) for f in FRACTIONS}
    return {f: (done, probability(done.repaired, clients[1])) for f, done in models.items()}


@pytest.mark.parametrize("exact", [0.05, 0.15, 0.2, 0.4, None])
def test_the_cut_is_that_which_a_search_by_halves_finds_and_the_model_that_which_it_gives(
    net, clients, tried, exact, most
):
    limit = 0.0 if exact is None else tried[exact][1] + 1e-6
    most(limit)
    cuts = [
        own for own in FRACTIONS if tried[own][0].model.plan.pruned and any(tried[own][0].model.plan.pruned.values())
    ]
    low, high, wanted, best = 0, len(cuts), [], None
    while low < high:
        middle = (low + high) // 2
        wanted.append(cuts[middle])
        if tried[cuts[middle]][1] <= limit:
            high, best = middle, cuts[middle]
        else:
            low = middle + 1
    passed = best is not None
    if not passed:
        best = min(wanted, key=lambda own: tried[own][1])
    fed = federation(clients)
    done = smallest(net, fed)
    assert done.passed == passed
    assert [own.fraction for own in done.attempts] == wanted
    assert done.cut == Cut(best)
    for own in done.attempts:
        assert own.probability == pytest.approx(tried[own.fraction][1], rel=1e-6)
    for name, tensor in tried[best][0].model.module.state_dict().items():
        assert torch.equal(done.model.module.state_dict()[name], tensor), name
    assert done.cost == Cost.of(fed.journal.entries(""))  # every job that was asked
    assert len(fed.journal.entries("measure")) == 1
    spent = sum(own.client_flops for own in done.attempts)
    assert done.cost.client_flops == fed.cost("measure").client_flops + spent


def test_a_killed_search_goes_on_with_the_attempts_that_ended(net, clients, tmp_path, most):
    most(0.3)
    whole = smallest(net, federation(clients, Journal(tmp_path / "whole", header={})))

    class KilledError(Exception):
        pass

    def observe(phase, done, planned):
        if phase == f"attempt-{100 * whole.attempts[1].fraction:g}.repair":
            raise KilledError

    journal = Journal(tmp_path / "cut", header={}, observe=observe)
    with pytest.raises(KilledError):
        smallest(net, federation(clients, journal))
    journal.leave()
    phases = []
    again = Journal(tmp_path / "cut", header={}, observe=lambda phase, done, planned: phases.append((phase, done)))
    resumed = smallest(net, federation(clients, again))
    assert resumed.attempts == whole.attempts
    assert replace(resumed.cost, client_seconds=0) == replace(whole.cost, client_seconds=0)
    first = f"attempt-{100 * whole.attempts[0].fraction:g}.repair"
    assert (first, 0) not in phases  # its rounds were read back


def test_one_client_does_not_choose_the_cut_by_a_claim_of_images(net):
    """It says that of a billion images of the class none is named any more."""
    clients = hold_out(partition(make_images(320, 4), by="iid", clients=3, seed=0), 0.3)

    class Claiming(LocalEngine):
        def run(self, job):
            for reply in super().run(job):
                none = {name: torch.zeros_like(tensor) for name, tensor in reply.tensors.items()}
                lie = replace(reply, images=10**9, tensors=none | {"counts": torch.tensor(10**9)})
                yield lie if (job.task.kind, reply.client) == ("evaluate", "client-0") else reply

    honest = smallest(net, federation(clients))
    fed = replace(federation(clients), engine=Claiming(clients[0], validation=clients[1], rules=Privacy(min_images=1)))
    claimed = smallest(net, fed)
    assert claimed.attempts[0].probability > 0.3 * honest.attempts[0].probability
    assert claimed.attempts[0].forget > 0.3 * honest.attempts[0].forget


def test_where_no_cut_passes_the_words_say_so():
    attempts = [
        {"fraction": 0.2, "probability": 0.3, "forget": 0.0},
        {"fraction": 0.4, "probability": 0.1, "forget": 0},
    ]
    said = words.chosen({"chosen": 0.4, "removed": 0.4, "passed": False, "attempts": attempts})
    assert said.startswith(
        "40 % of the channels went, by a cut of 40 %: of the cuts that were tried none brought the probability that"
    )
    assert "and this one came nearest" in said
    assert said.endswith(": 20 % (30 %, U 0 %), 40 % (10 %, U 0 %). The cost is that of all attempts.")


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"scope": "model"}, PlanError, "unlearn.scope must be one of layer, global, got 'model'"),
        ({"forget": [1, 2]}, PlanError, "classes that go one after another have one each: forget them jointly"),
        ({"repair": None}, RecipeError, "unlearn_smallest(repair=...) must be a Repair, such as"),
    ],
)
def test_what_cannot_be_chosen_is_refused(net, clients, values, error, text):
    with pytest.raises(error, match=re.escape(text)):
        smallest(net, federation(clients), **values)


def test_a_share_that_is_no_channel_is_not_tried(clients):
    thin = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    tried = [own.fraction for own in smallest(thin, federation(clients)).attempts]
    assert min(tried) > 0.2  # a fifth of four channels is none
    one = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 4))
    with pytest.raises(PlanError, match=r"no cut up to 0\.5 removes a channel: the model's layers are too narrow"):
        smallest(one, federation(clients))


def test_classes_that_are_scored_as_one_have_one_cut(net, clients, most):
    most(0.6)
    done = smallest(net, federation(clients), forget=[1, 2], jointly=True)
    assert done.model.labels == (0, 3)


def test_without_validation_images_of_the_class_nothing_is_chosen(net, clients):
    with pytest.raises(FederationError, match="no client counts validation images of the classes to forget"):
        smallest(net, Federation(LocalEngine(clients[0])))
    with pytest.raises(FederationError, match="no client counts validation images of the classes to forget"):
        smallest(net, federation(clients, rules=Privacy(min_images=30)))  # of each client's few, none is counted


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["data.validation=0"], "is chosen by validation images: set data.validation above 0"),
        (
            ["unlearn.method=scrub"],
            'unlearn.fraction = "auto" is for the method prune, and unlearn.method is scrub: give a number, '
            "such as --set unlearn.fraction=0.3; the control that prunes random channels takes it",
        ),
        (["unlearn.forget=[1, 2]"], "with several classes needs unlearn.jointly = true: one ranking, one fraction"),
        (["privacy.noise=1", "privacy.clip=1"], "asks for sums that privacy.noise does not hide: give a number"),
        (["unlearn.end=lowest"], 'unlearn.fraction = "auto" cuts the highest scores'),
    ],
)
def test_a_recipe_that_leaves_nothing_to_choose_by_is_refused(settings, text):
    with pytest.raises(RecipeError, match=re.escape(text)):
        load_recipe("digits", ["unlearn.fraction=auto", *settings])


def test_a_comparison_needs_one_fraction_for_all_methods(tmp_path):
    recipe = load_recipe(str(write_set(tmp_path)), ["unlearn.fraction=auto"])
    with pytest.raises(RecipeError, match="is chosen by unlearn and run only: give a number"):
        compare(recipe, tmp_path / "out", Plan(("contrast",), 1))


def test_a_signed_run_says_which_cut_was_chosen_and_counts_what_the_choice_cost(tmp_path, capsys):
    strong = ["unlearn.fraction=auto", "unlearn.rounds=8", "unlearn.lr=0.2", "erase.complement=3"]
    small = ["train.rounds=6", "audit.images=10", "evidence.feature_maps=false"]
    recipe = load_recipe(str(write_set(tmp_path, oracles=1)), strong + small)
    make_keys(tmp_path / "operator")
    result = run(recipe, tmp_path / "run", key=tmp_path / "operator")
    attempts = result["fraction"]["attempts"]
    assert result["fraction"]["chosen"] in [own["fraction"] for own in attempts if own["probability"] <= 0.05]
    steps = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[1:]]
    ours = [step for step in steps if step["phase"].startswith(("measure", "attempt-"))]
    spent = sum(entry["flops"] for step in ours for entry in step["entries"])
    assert result["cost"]["unlearn"]["client_flops"] == spent
    assert list(problems(tmp_path / "run", tmp_path / "operator.pub")) == []
    said = " ".join(notes(result).split())
    cut, removed = result["fraction"]["chosen"], result["fraction"]["removed"]
    gone = json.loads((tmp_path / "run" / "plan.json").read_text())["pruned"]
    scores = load_file(tmp_path / "run" / "scores.safetensors")
    assert removed == sum(map(len, gone.values())) / sum(len(own) for own in scores.values())
    assert f"{100 * removed:.3g} % of the channels went, by a cut of {100 * cut:g} %" in said
    assert said.count(" %, U ") == len(attempts)
    dossier = json.loads((tmp_path / "run" / "dossier.json").read_text("utf-8"))
    assert dossier["key"] in (tmp_path / "run" / "report.html").read_text("utf-8")  # signed at once: the page says it
    for name in ("report.html", "report.md"):
        assert "% of the channels went" in (tmp_path / "run" / name).read_text("utf-8")


def test_the_phases_of_an_attempt_say_how_much_was_pruned():
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    with RunProgress(Console(file=text, width=100)) as progress:
        progress.observe("attempt-20.repair", 2, 2)
    assert text.getvalue() == "repairing (20 % pruned): done\n"


def test_a_fraction_that_nobody_can_choose_is_refused_before_any_work(tmp_path):
    recipe = load_recipe(
        str(write_set(tmp_path)), ["unlearn.fraction=auto", "federation.clients=40", "data.validation=0.1"]
    )
    with pytest.raises(PlanError, match=r"hold none of them \(data.validation is 0.1\): raise it, take fewer clients"):
        run(recipe, tmp_path / "out", command="unlearn")
    assert not (tmp_path / "out").exists()
    assert "original" in run(recipe, tmp_path / "out", command="train")  # which chooses none


def test_u_of_an_attempt_is_counted_over_the_clients_images(clients, most):
    most(0.0)
    done = smallest(make_net(classes=4), federation(clients))
    for own in done.attempts:
        model = unlearn(
            make_net(classes=4), federation(clients), forget=2, cut=Cut(own.fraction), repair=REPAIR
        ).repaired
        right = counts = 0
        for images in clients[1].values():
            x = (images.only([2]).images.float() / 255 - torch.tensor(images.mean)) / torch.tensor(images.std)
            right += int((model.module.eval()(x).argmax(1) == 2).sum())
            counts += len(x)
        assert own.forget == pytest.approx(right / counts)
        assert done.clients == tuple(sorted(clients[0]))


def test_the_smallest_cut_has_the_scope_that_was_asked_for(clients, most):
    most(0.6)
    fed = federation(clients)
    net = make_net(classes=4)
    done = smallest(net, fed, scope="global")
    assert done.cut.scope == "global"
    slow = unlearn(net, federation(clients), forget=2, cut=done.cut, repair=REPAIR)
    assert done.model.plan == slow.model.plan


def test_all_clients_are_asked_what_the_model_still_names(clients, most):
    """Those chosen to train are not alone asked what the model still names."""
    most(0.6)
    asked = []

    class Told(LocalEngine):
        def run(self, job):
            if job.task.kind == "evaluate":
                asked.append(job.clients)
            return super().run(job)

    fed = federation(clients)
    fed = replace(fed, engine=Told(clients[0], validation=clients[1]), clients=tuple(clients[0])[:1])
    smallest(make_net(classes=4), fed)
    assert set(asked) == {None}


def test_attempts_by_another_threshold_are_not_taken_up(clients, most, tmp_path):
    most(0.6)
    journal = Journal(tmp_path, header={})
    smallest(make_net(classes=4), federation(clients, journal))
    journal.leave()
    most(0.0)
    with pytest.raises(RunError):
        smallest(make_net(classes=4), federation(clients, Journal(tmp_path, header={})))
