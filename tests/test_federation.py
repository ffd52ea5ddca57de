"""Clients, engine, averaging, ledger: what the server may rely on."""

import copy
import logging
import math
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from conftest import classifier, collected, job, logits, make_images, make_net
from fedunlearn.channels.plan import Cut
from fedunlearn.channels.stats import mean_of_clients
from fedunlearn.data.batches import batches
from fedunlearn.data.datasets import from_dataset
from fedunlearn.data.images import LabelledImages
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.errors import FederationError, RecipeError, RunError, listed
from fedunlearn.federation.ask import _reasons, ask, refusal
from fedunlearn.federation.averaging import Server, fedavg
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import SUM, Answer, ClientData, Reply, handle, sampled
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import Cost, Entry, Meter, flops_per_image, size_in_bytes
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.measuring import Holdings, measure, reestimate
from fedunlearn.federation.privacy import Privacy
from fedunlearn.federation.rounds import Repair, Watch, _drawn, train_rounds, validation_accuracy
from fedunlearn.federation.tasks import Evaluate, Measure, Reestimate, Train
from fedunlearn.training.batch_norm import fit_batch_norm
from fedunlearn.training.compute import Compute
from fedunlearn.training.evaluation import count_correct
from fedunlearn.training.objectives.distil import Distil
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.objectives.scrub import Scrub
from fedunlearn.training.sgd import Training, constant, one_cycle, train_locally
from fedunlearn.unlearn import unlearn

EXAMPLE = torch.randn(2, 1, 8, 8)


def make_engine(images=None, *, workers=None, validation=0.0, **options):
    options = {"by": "iid", "clients": 4} | options
    clients, held = hold_out(partition(images or make_images(), **options), validation)
    return LocalEngine(clients, validation=held, compute=workers and Compute(workers=workers))


def make_train(net, *, exclude=(), **values):
    task = Train(training=Training(lr=0.1, batch_size=8), lr=0.1, exclude=exclude)
    return job(task, net, **({"phase": "train"} | values))


def states_equal(one, other):
    return all(tensor.equal(other[name]) for name, tensor in one.items())


class Broken(nn.Module):
    """Fails, or gives NaN, for batches that hold a bright first pixel."""

    def __init__(self, net, *, nan):
        super().__init__()
        self.net, self.nan = net, nan

    def forward(self, images):
        if bool((images[:, 0, -1, -1] > 2.5).any()):
            if not self.nan:
                raise RuntimeError("the sensor is unplugged")
            return self.net(images) * float("nan")
        return self.net(images)


def with_marked_client(engine_clients):
    """Mark all images of the first client."""
    name, images = next(iter(engine_clients.items()))
    marked = images.images.clone()
    marked[:, :, -1, -1] = 255
    return {
        **engine_clients,
        name: LabelledImages(marked, images.labels, images.classes, images.mean, images.std),
    }


@pytest.mark.parametrize("objective", [None, Erasing(0.5)])
def test_a_network_that_drops_out_repeats_whichever_thread_trains_it(objective):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = make_net()[:-1], make_net()[-1]

        def forward(self, images):
            return self.head(F.dropout(self.features(images), 0.5, self.training))

    training = Training(0.1, batch_size=8, local_epochs=2.0, objective=objective)
    asked = job(Train(training=training, lr=0.1, exclude=(2,)), Dropping())
    before = torch.get_rng_state()
    found = [list(make_engine(workers=workers).run(asked)) for workers in (1, 3, 3)]
    assert torch.get_rng_state().equal(before)
    for replies in found[1:]:
        for first, other in zip(found[0], replies, strict=True):
            assert first.error is other.error is None
            assert all(other.tensors[name].equal(tensor) for name, tensor in first.tensors.items())
    # Each step and each client has draws of its own.
    assert not found[0][0].tensors["head.weight"].equal(found[0][1].tensors["head.weight"])


def test_the_result_does_not_depend_on_the_number_of_workers(net):
    one, two = (list(make_engine(workers=workers).run(make_train(net))) for workers in (1, 3))
    assert [reply.client for reply in one] == [reply.client for reply in two] == [f"client-{k}" for k in range(4)]
    for a, b in zip(one, two):
        assert states_equal(a.tensors, b.tensors)


def test_the_result_does_not_depend_on_the_order_in_which_clients_are_given(net):
    clients = {f"c{k}": images for k, images in enumerate(partition(make_images(120), by="iid", clients=12).values())}
    trained = [
        train_rounds(net, Federation(LocalEngine(own)), Training(lr=0.1, batch_size=8), rounds=2).module.state_dict()
        for own in (clients, dict(reversed(clients.items())))
    ]
    assert states_equal(*trained)


def test_clients_work_on_copies(net):
    before = copy.deepcopy(net.state_dict())
    replies = list(make_engine().run(make_train(net)))
    assert states_equal(net.state_dict(), before)
    assert not states_equal(replies[0].tensors, replies[1].tensors)


def test_one_model_copy_per_worker(net):
    seen = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def __deepcopy__(self, memo):
            seen.append(threading.get_ident())
            other = Counted()
            other.net = copy.deepcopy(net)
            return other

        def forward(self, images):
            return self.net(images)

    engine, train = make_engine(clients=12, workers=2), make_train(Counted())
    for _ in range(2):
        list(engine.run(train))
    tried_out = seen.count(threading.get_ident())  # once, before any client: does it take maps in the memory format?
    assert tried_out == 1
    assert len(seen) - tried_out <= 2


@pytest.mark.parametrize(
    ("nan", "text"), [(False, "RuntimeError: the sensor is unplugged"), (True, "the loss became NaN or infinite")]
)
def test_one_failing_client_costs_its_reply_and_is_named_in_the_log(caplog, nan, text):
    engine = LocalEngine(with_marked_client(partition(make_images(), by="iid", clients=4)))
    with caplog.at_level(logging.WARNING):
        replies, entry = collected(engine, make_train(Broken(make_net(), nan=nan)))
    assert [reply.client for reply in replies] == ["client-1", "client-2", "client-3"]
    assert text in entry.refused["client-0"]
    assert "train, round 1: client-0 gave no usable reply" in caplog.text


def test_a_fleet_of_which_nobody_can_answer_is_told_once_why(caplog):
    clients = partition(make_images(), by="iid", clients=24)
    assert {len(own) for own in clients.values()} == {2, 3}
    with caplog.at_level(logging.WARNING), pytest.raises(FederationError) as raised:
        collected(LocalEngine(clients), make_train(make_net()))
    warned = [record.getMessage() for record in caplog.records]
    assert [text.split(": ")[1][:34] for text in warned[:-1]] == [
        f"client-{k:02d} gave no usable reply" for k in range(5)
    ]
    assert warned[-1] == "train, round 1: 19 more gave no usable reply"
    text = str(raised.value)
    assert f"{listed(sorted(clients))}: FederationError: the answer would stand for fewer than 5 images" in text
    assert text.count("the answer would stand for") == 1


def test_clients_and_reasons_beyond_the_first_are_counted_not_told():
    assert listed([f"client-{k}" for k in range(5)]) == "client-0, client-1, client-2, client-3, client-4"
    assert listed([f"client-{k}" for k in range(7)]) == "client-0, client-1, client-2, client-3, client-4 and 2 more"
    told = _reasons({f"why {k}": [f"client-{k}", f"other-{k}"] for k in range(7)})
    assert told == "; ".join(f"client-{k}, other-{k}: why {k}" for k in range(5)) + " and 2 more"


def test_a_round_stops_with_a_clear_error_when_too_few_remain():
    clients = partition(make_images(), by="iid", clients=2)
    for _ in range(2):
        clients = dict(reversed(with_marked_client(clients).items()))
    with pytest.raises(FederationError, match=r"train, round 1: only 0 of 2 clients.*the sensor is unplugged.*run the"):
        collected(LocalEngine(clients), make_train(Broken(make_net(), nan=False)))


def test_unusable_replies_are_refused_by_name_and_reason(net):
    train = make_train(net)
    expected = train.task.layout(train.model)
    assert expected == {name: (tuple(t.shape), t.dtype) for name, t in net.state_dict().items()}
    good = dict(net.state_dict())
    nan = good | {"0.bias": torch.full((6,), float("nan"))}
    shape = good | {"0.bias": torch.zeros(7)}
    missing = {name: t for name, t in good.items() if name != "8.bias"}
    assert refusal(Reply("a", good, images=3), train, expected) is None
    assert refusal(Reply("a", nan, images=3), train, expected) == "0.bias has values that are not finite"
    assert (
        refusal(Reply("a", shape, images=3), train, expected)
        == "expected 0.bias of shape (6,), float32, got of shape (7,), float32"
    )
    assert (
        refusal(Reply("a", missing, images=3), train, expected)
        == "expected 8.bias of shape (3,), float32, got nothing of the name"
    )
    assert (
        refusal(Reply("a", good | {"x": torch.zeros(1)}, images=3), train, expected)
        == "expected x nothing of the name, got of shape (1,), float32"
    )
    whole = good | {"0.bias": torch.zeros(6, dtype=torch.int64)}
    assert refusal(Reply("a", whole, images=3), train, expected).endswith("got of shape (6,), int64")
    assert refusal(Reply("a", good, images=0), train, expected) == "it reports 0 images"
    assert refusal(Reply("a", good, images=2**62), train, expected).endswith("more than any client holds")
    statistics = job(Measure(hook="convolution", classes=3), net)
    sums = {"counts": torch.ones(3), "sums.0": -torch.ones(3, 6)}
    layout = {name: (tuple(t.shape), t.dtype) for name, t in sums.items()}
    assert refusal(Reply("a", sums, images=3), statistics, layout) == "sums.0 has negative values"


def test_validation_images_are_those_of_a_client_and_mean_what_its_training_images_do():
    clients = {"a": make_images(), "b": make_images()}
    with pytest.raises(FederationError, match="validation has images of 'c', which is no client; the clients are a, b"):
        LocalEngine(clients, validation={"c": make_images()})
    with pytest.raises(FederationError, match=r"a holds validation images normalised by std \(0.5,\), the others by"):
        LocalEngine(clients, validation={"a": replace(make_images(), std=(0.5,))})


def test_a_claim_of_images_does_not_make_the_model_that_of_one_client(net, caplog):
    """Of weights 1, 2 and 9 with 10, 30 and 10^9 images: (10 * 1 + 30 * 2 + 40 * 9) / 80."""
    values = [({"w": torch.tensor([value]), "n": torch.tensor(1)}, images) for value, images in ((1.0, 10), (2.0, 30))]
    loud = ({"w": torch.tensor([9.0]), "n": torch.tensor(1)}, 10**9)
    for place in range(3):
        updates = [*values[:place], loud, *values[place:]]
        assert float(fedavg(updates)["w"]) == pytest.approx(430 / 80)
    two = fedavg([values[0], loud])  # of two, one may hold nearly all
    assert float(two["w"]) == pytest.approx(9.0)

    class Boasting(LocalEngine):
        def run(self, job):
            for reply in super().run(job):
                yield replace(reply, images=10**9) if reply.client == "client-1" else reply

    fed = Federation(Boasting(partition(make_images(), by="iid", clients=3)))
    train_rounds(net, fed, Training(lr=0.1, batch_size=8), rounds=1)
    assert (
        "client-1 says that it has 1000000000 images, more than all others together (40): it counts as 40"
        in caplog.text
    )


class Claiming(LocalEngine):
    """Client 1 claims a billion images, and answers as if it had them."""

    def run(self, job):
        for reply in super().run(job):
            times = 10**9 // max(1, reply.images)
            many = {name: tensor * times for name, tensor in reply.tensors.items()}
            if "correct" in many:
                many["correct"] = many["counts"]
            images = reply.images * times
            yield replace(reply, tensors=many, images=images) if reply.client == "client-1" else reply


def test_a_claim_of_images_does_not_make_validation_or_normalisation_that_of_one_client(net, caplog):
    shares = partition(make_images(90), by="dirichlet", alpha=1.0, clients=3)
    clients, validation = hold_out(shares, 0.4)
    honest, claimed = (Federation(kind(clients, validation=validation)) for kind in (LocalEngine, Claiming))
    with torch.no_grad():
        net[8].weight.zero_()
        net[8].bias.copy_(torch.tensor([0.0, 0.0, 1.0]))  # all images are of class 2
    own = {name: images.counts() for name, images in validation.items()}
    others = sum(counts for name, counts in own.items() if name != "client-1")
    accuracy, _ = validation_accuracy(classifier(net), claimed, phase="train")
    assert accuracy == pytest.approx((float(others[2] / others.sum()) + 1) / 2)
    assert "client-1 says that it has" in caplog.text
    assert validation_accuracy(classifier(net), honest, phase="train")[0] < accuracy

    def mean_of(names):
        return reestimate(classifier(net), Federation(LocalEngine(clients), clients=names)).module[1].running_mean

    halves = [mean_of(names) for names in (("client-1",), ("client-0", "client-2"))]
    fitted = reestimate(classifier(net), claimed).module[1].running_mean
    torch.testing.assert_close(fitted, sum(halves) / 2)


def test_a_measurement_that_no_activations_add_up_to_is_refused_by_name(net):
    """Of finite numbers, whose means would not be: the step would stand in the journal, and end the run for good."""

    class Boundless(LocalEngine):
        def run(self, job):
            for reply in super().run(job):
                wild = {
                    name: torch.where(tensor > 0, torch.tensor(1.7e308, dtype=torch.float64), 0.0)
                    if name.startswith("sums.")
                    else tensor
                    for name, tensor in reply.tensors.items()
                }
                yield replace(reply, tensors=wild) if reply.client == "client-1" else reply

    fed = Federation(Boundless(partition(make_images(), by="iid", clients=3)))
    stats, _ = measure(classifier(net), fed)
    (step,) = fed.journal.steps("measure")
    why = step.entries[0].refused["client-1"]
    assert why.startswith("sums.")
    assert "has values beyond what 20 images can add up to" in why
    assert all(torch.isfinite(stats.means(layer)).all() for layer in stats.sums)


@pytest.mark.parametrize("part", ["clients", "holders"])
def test_a_client_is_named_once(part):
    engine = make_engine(make_images(), clients=2)
    with pytest.raises(FederationError, match=rf"Federation\({part}=\.\.\.\) must name each client once, got"):
        Federation(engine, **{part: ("client-0", "client-0")})


def test_fedavg_weighs_by_images_and_keeps_integers():
    updates = [
        ({"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(3)}, 1),
        ({"w": torch.tensor([4.0, 2.0]), "n": torch.tensor(8)}, 2),
    ]
    average = fedavg(updates)
    assert average["w"].tolist() == pytest.approx([3.0, 4 / 3])
    assert average["w"].dtype == torch.float32
    assert average["n"].tolist() == 8
    assert average["n"].dtype == torch.int64


def test_averaging_equal_states_changes_nothing(net):
    assert states_equal(fedavg([(net.state_dict(), 3), (net.state_dict(), 5)]), net.state_dict())


def test_one_step_of_full_batch_fedavg_equals_one_step_on_the_pooled_data():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))  # no batch normalisation
    images = make_images(40)
    training = Training(lr=0.1, batch_size=100, momentum=0.0, weight_decay=0.0)
    engine = make_engine(images)
    federated = train_rounds(net, Federation(engine), training, rounds=1)
    train_locally(net, images, training, lr=0.1, draw=torch.Generator())
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(federated.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_local_epochs_may_be_a_fraction(net, images):
    for epochs, seen in ((0.25, 15), (1, 60), (2.5, 150), (0.001, 1)):
        training = Training(lr=0.01, batch_size=8, local_epochs=epochs)
        assert train_locally(net, images, training, lr=0.01, draw=torch.Generator()) == seen


def test_a_loss_that_is_not_finite_stops_the_client(net, images):
    with torch.no_grad():
        net[8].weight.fill_(float("inf"))
    with pytest.raises(FederationError, match="the loss became NaN or infinite: lower the learning rate"):
        train_locally(net, images, Training(lr=1.0), lr=1.0, draw=torch.Generator())


def test_an_image_that_is_not_finite_is_told_from_a_learning_rate_that_is_too_high(net, images):
    shown = images.pixels(slice(None)).clone()
    shown[3] = float("nan")
    broken = from_dataset(TensorDataset(shown, images.labels), images.classes)
    with pytest.raises(FederationError, match="images hold values that are not finite"):
        train_locally(net, broken, Training(lr=0.1), lr=0.1, draw=torch.Generator())


@pytest.mark.parametrize("objective", [None, Scrub(1.0)])
def test_no_message_keeps_a_client_training_for_ever(net, objective):
    endless = Train(training=Training(lr=0.1, local_epochs=1e12, objective=objective), lr=0.1, exclude=(2,))
    reply = handle(job(endless, net), copy.deepcopy(net), ClientData("a", make_images(60)))
    assert "1e+12 epochs of 40 images are more than 1,000,000,000 in a round: lower local_epochs" in reply.error


@pytest.mark.parametrize("name", [3, "", "two\nlines"])
def test_a_client_is_named_by_text_in_one_line(images, name):
    with pytest.raises(FederationError, match=r"ClientData\(client\) must be text in one line, got"):
        ClientData(name, images)


def test_the_cycle_rises_then_falls_and_never_wastes_a_round():
    factors = [one_cycle(k, 20) for k in range(20)]
    peak = factors.index(max(factors))
    assert 0.9 < max(factors) <= 1
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors) > 0
    assert constant(3, 7) == 1


def test_participation_draws_repeat_and_change_by_round(net):
    def drawn(seed):
        fed = Federation(make_engine(clients=10), participation=0.3, seed=seed)
        train_rounds(net, fed, Training(lr=0.1), rounds=4)
        return [step.entries[0].clients for step in fed.journal.steps("train")]

    assert drawn(1) == drawn(1)
    assert all(len(clients) == 3 for clients in drawn(1))
    assert len(set(drawn(1))) > 1


def test_training_stops_at_the_target_and_counts_the_evaluations(net):
    fed = Federation(make_engine(make_images(200), validation=0.2))
    train_rounds(net, fed, Training(lr=0.1, batch_size=8), rounds=30, watch=Watch(target=0.9))
    steps = fed.journal.steps("train")
    assert len(steps) < 30
    assert steps[-1].validation >= 0.9 > max([step.validation for step in steps[:-1]], default=0)
    assert [entry.job for entry in steps[0].entries] == ["train", "evaluate"]


def test_training_learns_what_can_be_seen(images):
    fed = Federation(make_engine(make_images(200)))
    trained = train_rounds(make_net(seed=3), fed, Training(lr=0.1, batch_size=8), rounds=8, server=Server(one_cycle))
    correct, counts, _ = count_correct(trained.module, images)
    assert int(correct.sum()) >= 0.95 * int(counts.sum())


def test_the_probability_of_a_class_is_that_of_its_row_and_nothing_without_one():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[1, 0] = math.log(3)  # of an image whose first pixel is 1: 1/4 and 3/4
    pixels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    pixels[:, :, 0, 0] = 255
    images = LabelledImages(pixels, torch.tensor([0, 1, 2]), ("a", "b", "c"), (0.0,), (1.0,))
    counted = count_correct(net, images, labels=(0, 1))
    assert counted.probability.tolist() == pytest.approx([0.25, 0.75, 0])
    assert (counted.correct.tolist(), counted.counts.tolist()) == ([0, 1, 0], [1, 1, 1])
    assert count_correct(net, images, labels=(2, 0)).probability.tolist() == pytest.approx([0.75, 0, 0.25])


def test_excluded_classes_are_not_seen(net):
    data = ClientData("a", make_images(60))
    assert handle(make_train(net, exclude=(1,)), copy.deepcopy(net), data).samples == 40
    nothing = handle(make_train(net, exclude=(0, 1, 2)), copy.deepcopy(net), data)
    assert "the answer would stand for fewer than 5 images" in nothing.error
    alone = handle(make_train(net, exclude=(0, 1, 2)), copy.deepcopy(net), data, Privacy(min_images=1))
    assert alone.error == "FederationError: nothing is left without the classes [0, 1, 2]"


class Count:
    """A task of somebody else's: how many images a client has."""

    kind = "count"

    def answer(self, job, model, data, rules, compute):
        if data.client == "client-0":
            raise ValueError("this client does not count")
        return Answer({"images": torch.tensor(len(data.train))}, len(data.train), 0)

    def layout(self, model):
        return {"images": ((), torch.int64)}

    def operations(self, model, forward, training):
        return forward

    def flaw(self, reply):
        return "it has too many" if int(reply.tensors["images"]) != reply.images or reply.client == "client-1" else None


def test_a_task_of_another_kind_is_asked_and_judged_by_its_own_rules(net, caplog):
    with caplog.at_level(logging.WARNING):
        replies, entry = collected(make_engine(), job(Count(), net))
    assert {reply.client: int(reply.tensors["images"]) for reply in replies} == {"client-2": 15, "client-3": 15}
    assert entry.refused == {"client-0": "ValueError: this client does not count", "client-1": "it has too many"}
    assert entry.job == "count"
    assert "test, round 1: client-1 gave no usable reply: it has too many" in caplog.text


def test_a_fold_that_stops_early_costs_what_all_replies_cost(net):
    engine = make_engine()
    first, entry = ask(engine, make_train(net), next)
    _, whole = collected(engine, make_train(net))
    assert first.client == "client-0"
    assert (entry.clients, entry.samples, entry.bytes_up) == (whole.clients, whole.samples, whole.bytes_up)


def test_samples_are_drawn_at_random_but_repeat(net):
    data = ClientData("a", make_images(60))
    task = Measure(hook="convolution", classes=3, sample=20)

    def counts(seed):
        return handle(job(task, net, phase="measure-0", seed=seed), copy.deepcopy(net), data).tensors["sums.0"]

    assert counts(1).equal(counts(1))
    assert not counts(1).equal(counts(2))


def test_validation_accuracy_is_that_of_the_kept_classes_on_clients_that_have_images(net):
    engine = make_engine(make_images(100), validation=0.3)
    held = [data.validation for data in engine._data.values()]
    right = total = 0
    for images in held:
        kept = images.without([2])
        for batch, labels in batches(kept, 50):
            right += int((logits(net, batch).argmax(1) == labels).sum())
            total += len(labels)
    found, entry = validation_accuracy(classifier(net), Federation(engine, exclude=(2,)), phase="x")
    assert found == right / total
    assert entry.job == "evaluate"
    assert validation_accuracy(classifier(net), Federation(make_engine()), phase="x")[0] is None
    with pytest.raises(FederationError, match=r"no client counts validation images.*data.validation"):
        train_rounds(net, Federation(make_engine()), Training(lr=0.1), rounds=1, watch=Watch(target=0.5))


def test_nobody_to_train_with_is_an_error(net):
    with pytest.raises(FederationError, match="no client has images of the kept classes"):
        train_rounds(net, Federation(make_engine(), clients=()), Training(lr=0.1), rounds=1)


@pytest.mark.parametrize(
    ("clients", "text"),
    [
        ({"a": make_images()}, "needs at least two clients, got 1"),
        ({"a": make_images(), "b": make_images().take(slice(0, 0))}, "b holds no images"),
        ({"a": make_images(), "b": make_images(side=9)}, r"b holds images of shape \(1, 9, 9\).*all must agree"),
        (
            {"a": make_images(), "b": replace(make_images(), classes=("x", "class 1", "class 2"))},
            r"b holds images whose class 0 is 'x', that of the others 'class 0': all must agree",
        ),
        (
            {"a": make_images(), "b": replace(make_images(), mean=(0.9,))},
            r"b holds images normalised by mean \(0.9,\), the others by \(0.3,\): all must agree",
        ),
    ],
)
def test_impossible_federations_are_refused(clients, text):
    with pytest.raises(FederationError, match=text):
        LocalEngine(clients)


def test_unknown_clients_are_refused(net):
    with pytest.raises(FederationError, match="there is no client 'x'; the clients are client-0, client-1"):
        list(make_engine().run(make_train(net, clients=("x",))))


def test_reestimation_gives_the_statistics_of_the_images_and_uses_no_gradient():
    net = make_net()
    images = make_images(64)
    with torch.no_grad():
        net[1].running_mean += 5
    fitted = reestimate(classifier(net), Federation(make_engine(images))).module
    batch, _ = next(batches(images, 64))
    with torch.no_grad():
        maps = net[0](batch).double()
    torch.testing.assert_close(fitted[1].running_mean.double(), maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted[1].running_var.double(), maps.var((0, 2, 3)), rtol=1e-2, atol=1e-5)
    for (name, before), after in zip(net.named_parameters(), fitted.parameters()):
        assert before.equal(after), name


def test_reestimation_weighs_clients_by_their_images():
    images = make_images(60)
    engines = make_engine(images, clients=2), make_engine(images, by="dirichlet", alpha=0.7, clients=3)
    even, skewed = (reestimate(classifier(make_net()), Federation(engine)).module for engine in engines)
    torch.testing.assert_close(even[1].running_mean, skewed[1].running_mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(even[1].running_var, skewed[1].running_var, rtol=2e-2, atol=1e-5)


def test_reestimation_does_not_depend_on_the_order_of_the_images_and_leaves_dropout_out():
    net = nn.Sequential(*make_net()[:6], nn.Dropout(0.9), *make_net()[6:]).train()
    images = make_images(900)
    by_class = images.take(images.labels.argsort(stable=True))
    for source in (images, by_class):
        clients = {"a": source, "b": source}
        fitted = reestimate(classifier(net), Federation(LocalEngine(clients))).module
        batch, _ = next(batches(images, 900))
        with torch.no_grad():
            copied = copy.deepcopy(net).eval()
            copied[1].train().momentum = 1.0
            second = copied[3](torch.relu(copied[1](copied[0](batch))))
        torch.testing.assert_close(fitted[4].running_mean, second.mean((0, 2, 3)), rtol=0.05, atol=0.01)
        torch.testing.assert_close(fitted[4].running_var, second.var((0, 2, 3)), rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0},
        {"batch_size": 0},
        {"local_epochs": 0},
        {"momentum": 1},
        {"weight_decay": -1},
        {"lr": float("nan")},
        {"label_smoothing": 1},
    ],
)
def test_training_settings_out_of_range_are_refused(change):
    (name,) = change
    with pytest.raises(RecipeError, match=rf"Training\({name}=...\) is out of range: got"):
        Training(**({"lr": 0.1} | change))


def test_a_model_without_batch_normalisation_is_not_reestimated():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    fed = Federation(make_engine())
    reestimate(classifier(net), fed)
    assert fed.journal.entries("reestimate") == []


def test_flops_match_the_formula():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))
    forward, training = flops_per_image(net, (1, 8, 8))
    convolution, linear = 2 * 4 * 9 * 64, 2 * 4 * 64 * 3
    assert forward == convolution + linear
    # backwards: the weights of both layers and the input of the second; the image needs no gradient
    assert training == forward + convolution + 2 * linear


class InParts(nn.Module):
    """A grouped convolution as one convolution for each group."""

    def __init__(self, grouped):
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Conv2d(
                grouped.in_channels // grouped.groups,
                grouped.out_channels // grouped.groups,
                grouped.kernel_size,
                stride=grouped.stride,
                padding=grouped.padding,
            )
            for _ in range(grouped.groups)
        )

    def forward(self, images):
        return torch.cat([part(own) for part, own in zip(self.parts, images.chunk(len(self.parts), 1))], 1)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_grouped_convolution_counts_as_one_for_each_group(groups):
    grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)

    def counts(middle):
        return flops_per_image(nn.Sequential(nn.Conv2d(1, 8, 1), middle, nn.Flatten(), nn.Linear(256, 3)), (1, 8, 8))

    assert counts(grouped) == counts(InParts(grouped))


class Attends(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.maps, self.qkv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, images):
        q, k, v = self.qkv(self.maps(images).flatten(2).mT)[:, None].chunk(3, -1)
        plain = (q @ k.mT / 8**0.5).softmax(-1) @ v if not self.fused else None
        out = F.scaled_dot_product_attention(q, k, v) if plain is None else plain
        return self.head(out[:, 0].mean(1))


def test_attention_counts_as_its_products():
    fused, plain = (flops_per_image(Attends(fused), (1, 8, 8)) for fused in (True, False))
    assert fused[0] == plain[0]
    assert fused[1] >= plain[1]  # the fused backward pass makes a product again


class DropsLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, images):
        maps = self.first(images)
        if not self.training or torch.rand(()) < 0.5:
            maps = maps + self.second(maps)
        return self.head(maps.mean((2, 3)))


def test_what_a_network_drops_at_random_does_not_change_what_a_pass_costs():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    counts = {flops_per_image(DropsLayers(), (1, 8, 8)) for _ in range(8)}
    ((forward, training),) = counts
    assert forward == 2 * (4 * 9 * 36 + 4 * 4 * 9 * 36 + 4 * 3)  # evaluation drops nothing
    assert training > 2 * forward
    assert not torch.get_rng_state().equal(before)  # by the weights alone
    torch.set_rng_state(before)
    net = DropsLayers()
    drawn = torch.get_rng_state()
    with torch.no_grad():
        assert flops_per_image(net, (1, 8, 8)) == (forward, training)
    assert torch.get_rng_state().equal(drawn)


@pytest.mark.parametrize("epochs", [1.09, 2.0, 2.09])
def test_one_image_left_over_is_no_batch(epochs):
    net = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    training = Training(lr=0.01, batch_size=8, local_epochs=epochs)
    seen = train_locally(net, make_images(11), training, lr=0.01, draw=torch.Generator())
    assert seen == 11 * int(epochs)


@pytest.mark.parametrize("seed", range(4))
def test_a_client_of_too_few_images_is_not_drawn_again_and_again(seed):
    train, parts = make_images(300), {}
    for k, name in enumerate("abc"):
        parts[name] = train.take(slice(60 * k, 60 * k + 60))
    few = train.take(slice(180, 300))
    kept = [row for label, number in ((0, 20), (1, 2), (2, 1)) for row in (few.labels == label).nonzero()[:number]]
    parts["d"] = few.take(torch.cat(kept))  # three images of the classes that stay
    fed = Federation(LocalEngine(parts), Journal(), seed=seed, participation=0.34)
    settings = Repair(Training(0.05, 8, 0.2), rounds=6)
    done = unlearn(make_net(), fed, forget=[0], cut=Cut(0.2), repair=settings)
    assert "d" in done.clients
    trained = [entry for entry in fed.journal.entries("repair") if entry.job == "train"]
    assert len(trained) == 6
    assert all(not entry.refused for entry in trained)


def test_too_few_of_some_images_is_not_too_few_of_others():
    train, parts = make_images(300), {}
    for k, name in enumerate("abc"):
        parts[name] = train.take(slice(60 * k, 60 * k + 60))
    parts["c"] = parts["c"].without([0])  # none of the class, forty of the others
    fed = Federation(LocalEngine(parts), Journal()).keeping(exclude=[0])
    alone = Training(0.05, 8, 1.0, objective=Distil())
    train_rounds(make_net(), fed, alone, rounds=2, phase="alone")
    assert all("c" in entry.refused for entry in fed.journal.entries("alone"))
    train_rounds(make_net(), fed, Training(0.05, 8, 0.2), rounds=1, phase="others")
    assert [entry.clients for entry in fed.journal.entries("others")] == [("a", "b", "c")]


def test_where_the_only_holder_has_too_few_others_a_round_is_one_of_all():
    train = make_images(300)
    parts = {name: train.take(slice(60 * k, 60 * k + 60)).without([0]) for k, name in enumerate("abc")}
    own = train.take(slice(180, 300))
    kept = [row for label, number in ((0, 20), (1, 2), (2, 1)) for row in (own.labels == label).nonzero()[:number]]
    parts["d"] = own.take(torch.cat(kept))
    fed = Federation(LocalEngine(parts))
    settings = Repair(Training(0.05, 8, 0.2, objective=Erasing(1.0, 0.1)), rounds=3)
    unlearn(make_net(), fed, forget=[0], cut=Cut(0.2), repair=settings)
    assert [len(entry.clients) for entry in fed.journal.entries("repair") if entry.job == "train"] == [3, 3, 3]


def test_ledger_entries_count_what_was_asked_and_answered(net):
    train = make_train(net, clients=("a", "b", "c"))
    replies = [Reply("a", {"x": torch.zeros(5)}, images=10, samples=20, seconds=1.5), Reply("b", samples=1)]
    replies.append(Reply("c", samples=7, error="late"))
    meter = Meter(train, (1, 8, 8), 3)
    for reply in replies:
        meter.count(reply, refused=reply.error)
    entry = meter.entry()
    assert entry.samples == 28
    assert entry.clients == ("a", "b")
    assert entry.flops == 28 * flops_per_image(net, (1, 8, 8))[1]
    assert entry.bytes_up == 20
    assert entry.bytes_down == 3 * (size_in_bytes(net.state_dict()) + len(train.model.plan.to_json()))
    assert Entry.from_dict(entry.to_dict()) == entry
    total = Cost.of([entry, Entry("evaluate", ("a", "d"), samples=4)])
    assert (total.rounds, total.client_samples, total.clients, total.client_seconds) == (1, 32, 3, 1.5)


def test_the_four_jobs_answer_under_the_names_they_promise(net):
    engine = make_engine(validation=0.2)
    for asked in (
        job(Measure(classes=3), net, phase="measure-0"),
        job(Reestimate(), net, phase="reestimate"),
        make_train(net),
        job(Evaluate(), net, phase="x"),
    ):
        replies, entry = collected(engine, asked)  # refuses other names and shapes
        assert len(replies) == 4
        assert entry.refused == {}
        assert entry.job == asked.task.kind


def test_a_job_for_other_classes_is_refused_by_the_client(net):
    task = Measure(classes=4)
    reply = handle(job(task, net), copy.deepcopy(net), ClientData("a", make_images()))
    assert reply.error == "FederationError: the job is for 4 classes, this client has 3"


# The federation


def test_a_federation_that_keeps_classes_out_keeps_its_clients_unless_others_are_named(net):
    fed = Federation(make_engine(clients=4), seed=7, clients=("client-1", "client-2"))
    kept = fed.keeping(exclude=[1])
    assert (kept.exclude, kept.clients, kept.seed) == ((1,), ("client-1", "client-2"), 7)
    assert kept.keeping(exclude=(), clients=["client-3"]).clients == ("client-3",)
    train_rounds(net, kept, Training(lr=0.1, batch_size=8), rounds=1)
    (entry,) = fed.journal.entries("train")
    assert entry.clients == ("client-1", "client-2")
    assert entry.samples == 20  # of 30, a third is of class 1


def test_the_cost_of_phases_is_that_of_their_entries(net):
    fed = Federation(make_engine(make_images(120), validation=0.2))
    train_rounds(net, fed, Training(lr=0.1, batch_size=8), rounds=2, watch=Watch(every=2))
    reestimate(classifier(net), fed)
    assert fed.cost("train") == Cost.of(fed.journal.entries("train"))
    assert fed.cost("train").rounds == 2
    one = Entry("train", ("a",), samples=2, flops=3, seconds=0.5, bytes_down=5, bytes_up=7)
    two = Entry("evaluate", ("a", "b"), samples=20, flops=30, seconds=1.0, bytes_down=50, bytes_up=70)
    assert Cost.of([one, two]) == Cost(
        rounds=1, client_samples=22, client_flops=33, client_seconds=1.5, bytes_up=77, bytes_down=55, clients=2
    )
    assert fed.cost("train", "reestimate") == Cost.of(fed.journal.entries("train", "reestimate"))
    assert fed.cost("repair") == Cost()


@pytest.mark.parametrize(
    ("task", "operations"),
    [
        (Measure(classes=3), 100),
        (Reestimate(), 100),
        (Evaluate(), 100),
        (Train(training=Training(0.1), lr=0.1), 300),
    ],
)
def test_an_image_of_a_job_costs_a_pass_forth_and_in_training_one_back(net, task, operations):
    assert task.operations(classifier(net), forward=100, training=300) == operations


def test_a_part_of_a_federation_records_its_steps_under_its_own_name(net):
    fed = Federation(make_engine())
    train_rounds(net, fed.part("other"), Training(lr=0.1), rounds=1)
    assert fed.journal.steps("train") == []
    assert [step.phase for step in fed.journal.steps("other.train")] == ["other.train"]
    assert fed.part("other").cost("train") == fed.cost("other.train")


def test_clients_are_measured_once_and_what_they_hold_is_told(net):
    asked = []

    class Counting(LocalEngine):
        def run(self, job):
            asked.append(job.task.kind)
            return super().run(job)

    fed = Federation(Counting(partition(make_images(), by="bias", clients=3, bias=1.0)))
    stats, held = measure(classifier(net), fed)
    again, known = measure(classifier(net), fed)  # as a run that goes on does
    assert asked == ["measure"]
    assert again.counts.equal(stats.counts)
    assert again.sums["0"].equal(stats.sums["0"])
    for holdings in (held, known):
        counts = [row.tolist() for row in holdings.counts.values()]
        assert counts == [[20, 0, 0], [0, 20, 0], [0, 0, 20]]
        assert holdings.with_images_besides([1]) == ("client-0", "client-2")
        assert holdings.with_images_of([1]) == ("client-1",)


def test_clients_of_whom_nothing_is_known_may_hold_images_of_the_kept_classes():
    counts = {"a": torch.tensor([3, 0, 0]), "b": torch.tensor([3, 1, 0]), "c": torch.zeros(3, dtype=torch.int64)}
    holdings = Holdings(counts, ("a", "b", "c", "d"))
    assert holdings.with_images_besides([0]) == ("b", "c", "d")
    assert holdings.with_images_besides([0, 1]) == ("c", "d")
    assert holdings.with_images_of([1]) == ("b", "c", "d")
    assert holdings.with_images_of([2]) == ("c", "d")


def test_the_mean_of_clients_cannot_be_made_of_their_sum(net):
    class Summing(LocalEngine):
        def run(self, job):
            replies = list(super().run(job))
            total = {name: sum(reply.tensors[name] for reply in replies) for name in replies[0].tensors}
            yield Reply(SUM, total, sum(reply.images for reply in replies), members=self.clients)

    fed = Federation(Summing(partition(make_images(), by="iid", clients=3)))
    with pytest.raises(FederationError, match=r"under secure aggregation only the sum of the statistics is known: "):
        measure(classifier(net), fed, pooling=mean_of_clients)
    stats, held = measure(classifier(net), fed)
    assert stats.counts.tolist() == [20, 20, 20]
    assert held.with_images_besides([0, 1, 2]) == fed.engine.clients  # nothing is known of any
    assert held.with_images_of([0]) == fed.engine.clients


def test_training_goes_on_from_the_journal_and_leaves_the_model_as_it_was(net, tmp_path):
    before = copy.deepcopy(net.state_dict())
    training = Training(lr=0.1, batch_size=8)
    whole = train_rounds(net, Federation(make_engine(), seed=1), training, rounds=3)
    train_rounds(net, Federation(make_engine(), Journal(tmp_path), seed=1), training, rounds=2)
    resumed = train_rounds(net, Federation(make_engine(), Journal(tmp_path), seed=1), training, rounds=3)
    assert states_equal(net.state_dict(), before)
    assert states_equal(whole.module.state_dict(), resumed.module.state_dict())


def test_clients_that_join_between_rounds_take_part_from_then_on_and_after_a_kill(tmp_path):
    all_three = LocalEngine(partition(make_images(90), by="iid", clients=3, seed=0))

    class Growing:
        shape, classes, clients, grows = all_three.shape, all_three.classes, all_three.clients[:2], True

        def run(self, job):
            self.clients = all_three.clients
            return all_three.run(job)

    engine, training = Growing(), Training(lr=0.1, batch_size=8)
    train_rounds(make_net(), Federation(engine, Journal(tmp_path)), training, rounds=2)
    resumed = Federation(engine, Journal(tmp_path))
    train_rounds(make_net(), resumed, training, rounds=3)
    assert [len(step.entries[0].clients) for step in resumed.journal.steps("train")] == [2, 3, 3]
    chosen = Federation(engine, Journal(tmp_path / "chosen"), clients=resumed.engine.clients[:2])
    train_rounds(make_net(), chosen, training, rounds=1)
    chosen.journal.leave()
    others = Federation(engine, Journal(tmp_path / "chosen"), clients=resumed.engine.clients[1:])
    with pytest.raises(RunError, match=r"train, step 1, of another request \(clients is "):
        train_rounds(make_net(), others, training, rounds=1)
    engine.grows = False  # of an engine whose clients are named others are another request
    with pytest.raises(RunError, match=r"train, step 1, of another request \(clients is "):
        train_rounds(make_net(), Federation(engine, Journal(tmp_path)), training, rounds=3)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"run: cannot be made \(Not a directory\): choose another --out"):
        Journal(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("task", "change", "images", "text"),
    [
        (Reestimate(), {"square:1": -torch.ones(6, dtype=torch.float64)}, 3, "square:1 has negative values"),
        (Reestimate(), {"images": torch.tensor(-1.0, dtype=torch.float64)}, 3, "images has negative values"),
        (Reestimate(), {"mean:1": -torch.ones(6, dtype=torch.float64)}, 1, None),
        (Reestimate(), {}, 3, "it sums over 1 images and reports 3"),
        (
            Reestimate(),
            {"mean:1": 1.01 * torch.ones(6, dtype=torch.float64)},
            1,
            "mean:1 and its squares are those of no images",
        ),
        (Reestimate(), {"square:1": 1e300 * torch.ones(6, dtype=torch.float64)}, 1, "are those of no images"),
        (Reestimate(), {}, 0, "it reports 0 images"),
        (Evaluate(), {"correct": torch.tensor(-1)}, 1, "correct has negative values"),
        (Evaluate(), {"correct": torch.tensor(2)}, 1, "correct is 2 of 1 images"),
        (Evaluate(), {"counts": torch.tensor(2**62)}, 5, f"it counts {2**62} images and reports 5"),
        (
            Evaluate(probability=True),
            {"probability": torch.tensor(1.01, dtype=torch.float64)},
            1,
            "probability is 1.01 of 1 images",
        ),
        (Evaluate(), {"correct": torch.tensor(0), "counts": torch.tensor(0)}, 0, None),
        (
            Train(training=Training(0.1), lr=0.1),
            {"1.running_var": -torch.ones(6)},
            3,
            "running_var has negative values",
        ),
        (Train(training=Training(0.1), lr=0.1), {"1.running_mean": -torch.ones(6)}, 3, None),
    ],
)
def test_what_no_honest_answer_says_is_refused(net, task, change, images, text):
    layout = task.layout(classifier(net))
    tensors = {name: torch.ones(shape, dtype=kind) for name, (shape, kind) in layout.items()} | change
    found = refusal(Reply("a", tensors, images), job(task, net), layout)
    assert found is None if text is None else found.endswith(text)
    seen = refusal(Reply("a", tensors, images, samples=10**400), job(task, net), layout)
    assert text is not None or seen.endswith("images, more than any client sees in a round")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"counts": torch.tensor([2, 0, 1])}, "it counts 3 images of 3 that it holds"),
        ({"held": torch.tensor([0, 0, 1])}, "it counts 2 images of 1 that it holds"),
        ({"counts": torch.tensor([1, 0, 0])}, "sums.0 has values for classes of which it counts no image"),
        ({"held": torch.tensor([1, -1, 1])}, "held has negative values"),
        (  # which add up to a negative number
            {"counts": torch.tensor([2**62, 2**62, 1]), "held": torch.tensor([2**62, 2**62, 1])},
            f"it holds {2**62} images of a class, more than any client does",
        ),
    ],
)
def test_statistics_that_contradict_themselves_are_refused(net, change, text):
    task = Measure(classes=3)
    sums = torch.ones(3, 6, dtype=torch.float64) * torch.tensor([[1], [0], [1]])
    tensors = {"counts": torch.tensor([1, 0, 1]), "held": torch.tensor([1, 1, 1]), "sums.0": sums}
    tensors |= {"sums.3": torch.zeros(3, 8, dtype=torch.float64)} | change
    assert refusal(Reply("a", tensors, images=2), job(task, net), task.layout(classifier(net))) == text


def test_training_stops_at_exactly_the_target():
    assert Watch(target=0.5).reached([Step("train", 0, (), 0.5)])
    assert not Watch(target=0.5).reached([Step("train", 0, (), 0.49)])


def test_classes_that_are_left_out_stay_left_out():
    fed = Federation(LocalEngine({"a": make_images(12), "b": make_images(12)}), exclude=(1,))
    assert fed.keeping(exclude=(2,)).exclude == (1, 2)


def test_the_largest_counter_stays_whichever_client_comes_last():
    states = [({"n": torch.tensor(n)}, images) for n, images in ((3, 1), (8, 1), (5, 9))]
    assert int(fedavg(states)["n"]) == 8


def test_who_takes_part_is_drawn_by_the_seed():
    ten = {f"client-{k}": make_images(12, seed=k) for k in range(10)}
    one, other = (Federation(LocalEngine(ten), participation=0.3, seed=seed) for seed in (1, 2))
    drawn = [[_drawn(fed, None, "train", round, ()) for round in range(4)] for fed in (one, one, other)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_client_shuffles_anew_in_each_round_and_phase():
    def trained(**values):
        asked = job(Train(training=Training(0.1, 8), lr=0.1), make_net(), **values)
        return handle(asked, make_net(), ClientData("a", make_images(30))).tensors["0.weight"]

    first = trained(phase="train", round=0)
    assert first.equal(trained(phase="train", round=0))
    assert not first.equal(trained(phase="train", round=1))
    assert not first.equal(trained(phase="repair", round=0))


def test_clients_draw_samples_of_their_own():
    images = make_images(60)
    asked = job(Measure(classes=3, sample=20), make_net())
    one, same, other = (sampled(asked, ClientData(name, images), images, 20).images for name in "aab")
    assert one.equal(same)
    assert not one.equal(other)


def test_a_client_holds_what_it_holds_whatever_the_sample():
    reply = handle(job(Measure(classes=3, sample=20), make_net()), make_net(), ClientData("a", make_images(60)))
    assert int(reply.tensors["counts"].sum()) == 20
    assert reply.tensors["held"].tolist() == [20, 20, 20]


def test_the_time_of_a_refused_client_counts():
    meter = Meter(job(Measure(classes=3), make_net()), (1, 8, 8), 2)
    meter.count(Reply("a", seconds=1.5), refused=None)
    meter.count(Reply("b", seconds=2.0), refused="late")
    assert meter.entry().seconds == 3.5


def test_each_client_of_a_secure_sum_sends_two_numbers_for_one():
    meter = Meter(job(Measure(classes=3), make_net()), (1, 8, 8), 3)
    meter.count(Reply(SUM, {"x": torch.zeros(5)}, 30, 30, members=("a", "b", "c")), refused=None)
    entry = meter.entry()
    assert entry.bytes_up == 3 * 2 * 20
    assert entry.clients == ("a", "b", "c")


def test_a_sum_of_clients_that_were_not_asked_is_not_taken():
    asked = job(Measure(classes=3), make_net())
    reply = handle(asked, make_net(), ClientData("a", make_images(60)))
    whole = replace(reply, client=SUM, members=("a", "stranger"))
    engine = SimpleNamespace(clients=("a", "b"), shape=(1, 8, 8), classes=3, run=lambda job: iter([whole]))
    with pytest.raises(FederationError, match="only 0 of 2 clients"):
        collected(engine, asked)


def test_what_clients_hold_is_told_by_labels_and_validation_images_too():
    images = make_images(60)
    held = {"a": images, "b": images}
    other = replace(images, labels=images.labels.flip(0))
    digests = {
        LocalEngine(held).digest,
        LocalEngine({"a": images, "b": other}).digest,
        LocalEngine(held, validation={"a": images}).digest,
        LocalEngine(held, validation={"a": other}).digest,
    }
    assert len(digests) == 4


def test_sums_that_no_images_have_make_no_negative_variance():
    net = make_net()
    parts = {"images": torch.tensor(10.0)}
    for name, width in (("1", 6), ("4", 8)):
        parts[f"mean:{name}"] = torch.full((width,), 1000.0, dtype=torch.float64)
        parts[f"square:{name}"] = torch.full((width,), 99950.0, dtype=torch.float64)  # as flaw lets pass
    fit_batch_norm(net, [parts])
    assert net[1].running_var.tolist() == [0] * 6
