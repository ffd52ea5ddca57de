"""No answer determines an image: hostile values in every field of every job, alone and under secure aggregation."""

import copy
import json
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from conftest import classifier, collected, job, make_images, make_net
from fedunlearn.errors import FederationError, FedUnlearnError
from fedunlearn.federation.jobs import ClientData, handle
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy
from fedunlearn.federation.sums import Gradients, Moments
from fedunlearn.federation.tasks import TASKS, Evaluate, Measure, Reestimate, Train
from fedunlearn.flower.client import client_app
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.flower.messages import decode_job, encode_job
from fedunlearn.training.compute import FLOAT32
from fedunlearn.training.moments import input_moments
from fedunlearn.training.objectives.ascend import Ascend
from fedunlearn.training.objectives.distil import Distil
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.objectives.relabel import Relabel
from fedunlearn.training.objectives.scrub import Scrub
from fedunlearn.training.objectives.sparse import Sparse
from fedunlearn.training.sgd import Training
from loopback import Loopback, build_model, load_images, nodes

# 20 images: 17 of class 0, two of class 1, one of class 2.
HELD = make_images(60).take(torch.tensor([*range(0, 51, 3), 1, 4, 2]))
DATA = ClientData("a", HELD, HELD)
LEAST, ROW = DEFAULT_RULES.min_images, DEFAULT_RULES.min_count

HOSTILE = {
    Measure: {
        "hook": ("activation", "convolution", "input", "0", "features.0"),
        "classes": (1, 3, 10**6),
        "sample": (1, 2, 4, 5, 19, 20, 10**9, None),
    },
    Reestimate: {
        "exclude": ((), (0,), (0, 1), (0, 2), (0, 1, 2), (1, 2), (-1,), (10**6,)),
        "sample": (1, 2, 4, 5, 19, None),
    },
    Train: {
        "training": (
            Training(0.1, 1, 0.05),
            Training(0.1, 1, 1e-9),
            Training(0.1, 1, 0.2),
            Training(0.1, 20, 0.05, 0.0, 0.0),
            Training(0.1, 1, 1.0),
            Training(1e-3, 1, 1.0, momentum=0.0, weight_decay=10.0),
            Training(1e-3, 1, 1.0, momentum=0.99, weight_decay=0.09),
            Training(0.1, 20, 1.0, objective=Erasing(1e9, 0.0, 0.05)),
            Training(0.1, 20, 1.0, objective=Erasing(1e-9, 0.0, 0.95)),
            Training(0.1, 2, 0.3, objective=Erasing(1e9, 1e9, 0.5)),
            Training(0.1, 1, 1.0, objective=Distil()),
            Training(0.1, 1, 1e-9, objective=Distil()),
            Training(0.1, 20, 1.0, objective=Ascend(1e-9, 0.05)),
            Training(0.1, 20, 1.0, objective=Relabel("random", 0.05)),
            Training(0.1, 20, 1.0, objective=Relabel("likeliest", 0.95)),
            Training(0.1, 20, 1.0, objective=Scrub(1e9, 1e-9, 1, 1, 0.99, 0.05)),
            Training(0.1, 2, 1.0, momentum=0.0, weight_decay=0.0, objective=Scrub(0.0, 1.0, 1, 1, 0.95, 0.5)),
            Training(0.1, 1, 0.05, objective=Sparse(1e9)),
        ),
        "lr": (1e-30, 1.0),
        "exclude": ((), (0,), (0, 1), (0, 2), (0, 1, 2), (10**6,)),
    },
    Gradients: {
        "squared": (False, True),
        "exclude": ((), (0,), (0, 1), (0, 2), (0, 1, 2), (1, 2), (-1,), (10**6,)),
        "sample": (1, 2, 4, 5, 19, None),
    },
    Moments: {
        "exclude": ((), (0,), (0, 1), (0, 2), (0, 1, 2), (1, 2), (-1,), (10**6,)),
        "sample": (1, 2, 4, 5, 19, None),
    },
    Evaluate: {
        "exclude": ((), (0,), (0, 1), (0, 2), (0, 1, 2), (1, 2)),
        "labels": (None, (0, 1, 2), (2, 2, 2)),
        "probability": (False, True),
    },
}
HONEST = {
    Measure: {"classes": 3},
    Reestimate: {},
    Train: {"training": Training(0.1, 8), "lr": 0.1},
    Gradients: {},
    Moments: {},
    Evaluate: {},
}
OF_JOB = {"phase": ("", "measure-0", "x" * 1000), "round": (0, 10**9), "seed": (0, 1, 2**62)}


def hostile():
    """Return every honest job with one hostile field, and pairs of hostile ones that leave one image together."""
    for kind, ranges in HOSTILE.items():
        for name, values in ranges.items():
            yield from ((kind, {name: value}, {}) for value in values)
        yield from ((kind, {}, {name: value}) for name, values in OF_JOB.items() for value in values)
    yield from ((Reestimate, {"exclude": (1, 2), "sample": sample}, {}) for sample in (1, 3, 17))
    yield Train, {"training": Training(0.1, 1, 0.06), "exclude": (1, 2)}, {}


CASES = list(hostile())


def test_every_field_of_every_job_is_tried():
    """A field that somebody adds fails here until it has hostile values; the message has no field besides these."""
    assert set(HOSTILE) == set(TASKS)
    for kind, ranges in HOSTILE.items():
        assert set(ranges) == {field.name for field in fields(kind)} - {"kind"}
    text = encode_job(job(Measure(classes=3), make_net()))[1]
    assert set(json.loads(text)) == {"schema", "task", "plan", "spec", "frozen", *OF_JOB}


@pytest.mark.parametrize(("kind", "change", "about"), CASES)
def test_an_answer_is_a_sum_over_images_that_another_set_of_images_gives_as_well(kind, change, about):
    """Every answer that holds numbers stands for ``m >= 2`` images, never for one.

    Count: a row of ``Measure`` is ``s = f(x_1) + ... + f(x_m)`` with ``f`` fixed by the job. Its ``W`` numbers are one
    point for ``m`` images of ``P`` pixels: of a linear ``f`` (the input of a layer, batch statistics of the first), of
    rank ``r <= P``, the images that give ``s`` are a set of dimension ``m P - r >= (m - 1) P >= P``. So ``x_1`` may be
    any image: ``x_2`` takes away what it adds. With ``m = 1`` that dimension is ``P - r``, which is 0 for pixels.
    ``Reestimate``, ``Train`` and ``Gradients`` are sums over at least ``min_images`` in the same way, ``Evaluate`` one
    whole number of ``min_images`` or more right or wrong answers. ``Moments`` has at most ``(m - 1) P`` numbers.
    """
    asked = job(kind(**(HONEST[kind] | change)), make_net(), **({"phase": "measure-0"} | about))
    reply = handle(asked, copy.deepcopy(asked.model.module), DATA)
    if reply.error is not None:
        assert reply.tensors == {}
        assert "tensor" not in reply.error
    elif kind is Measure:
        counts = reply.tensors["counts"]
        assert not bool(((counts > 0) & (counts < ROW)).any())
        assert not bool(reply.tensors["held"][2])  # one image of the class: not even that is said
        for name in ("sums.0", "sums.3"):
            assert not reply.tensors[name][counts == 0].any()
    else:
        assert "labels" not in change or reply.images == 0 or len(set(change["labels"] or range(3))) == 3
        assert reply.images == 0 or reply.images >= LEAST
        assert min(reply.images, LEAST) <= reply.samples


@pytest.mark.parametrize("sent", [case for case in CASES if case[0] is Measure])
def test_under_secure_aggregation_a_client_gives_to_the_sum_what_it_would_give_alone(sent):
    """Each term of the sum is such an answer, so the sum over clients stands for as many images or more.

    Here each of three clients holds one image of class 2: the sum holds no row of it.
    """
    _, change, about = sent
    app = client_app(
        build_model, lambda context: ClientData(f"client-{context.node_config['partition-id']}", HELD), secure=True
    )
    engine = FlowerEngine(Loopback(nodes(app, 3)), clients=3, deadline=2.0, patience=0.1, secure=True)
    asked = job(Measure(**(HONEST[Measure] | change)), make_net(), **({"phase": "measure-0"} | about))
    try:
        ((reply,), _) = collected(engine, asked)
    except FedUnlearnError:  # no sum, so no number of a client
        return
    counts = reply.tensors["counts"]
    assert not bool(((counts > 0) & (counts < ROW)).any())
    assert int(counts[2]) == 0
    assert not reply.tensors["sums.0"][2].any()


def test_a_message_cannot_name_a_module_of_the_client():
    tensors, text = encode_job(job(Measure(classes=3), make_net()))
    message = json.loads(text)
    message["task"]["taps"] = {"3": {"module": "0", "side": "input", "start": 0, "stop": 1}}
    with pytest.raises(FederationError, match=r"task.measure.taps: Unexpected keyword argument"):
        decode_job(tensors, json.dumps(message))


def test_the_rules_are_the_clients_and_say_what_they_refuse():
    one = ClientData("a", HELD.take(slice(0, 1)))
    for task in (Measure(classes=3), Reestimate(), Train(training=Training(0.1, 8), lr=0.1)):
        asked = job(task, make_net())
        assert handle(asked, copy.deepcopy(asked.model.module), one).error == (
            "FederationError: the answer would stand for fewer than 5 images, and this client's rules (min_images) let "
            "none do so: ask for a larger sample or leave this client out"
        )
        own = Privacy(min_count=0, min_images=1)
        assert handle(asked, copy.deepcopy(asked.model.module), one, own).error is None
    asked = job(Train(training=Training(0.1, 1, 0.05), lr=0.1), make_net())
    assert handle(asked, copy.deepcopy(asked.model.module), DATA).error == (
        "FederationError: 0.05 epochs of 20 images are fewer than 5, the fewest that this client's rules (min_images) "
        "let an answer stand for: raise local_epochs"
    )


@pytest.mark.parametrize(("momentum", "decay", "told"), [(0.0, 1.0, "1"), (0.9, 0.02, "0.2")])
def test_weights_that_each_step_forgets_would_tell_the_last_images(momentum, decay, told):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    training = Training(1e-3, 1, 1.0, momentum=momentum, weight_decay=decay)
    asked = job(Train(training=training, lr=1.0), net)
    given = handle(asked, copy.deepcopy(net), DATA)
    assert given.error == (
        f"FederationError: lr times weight_decay over 1 - momentum is {told}, expected at most 0.1: with more, what a "
        "client answers is the gradient of its last few images alone; lower weight_decay"
    )
    assert given.tensors == {}
    usual = job(Train(training=Training(0.4, 1, 1.0), lr=0.4), net)
    assert handle(usual, copy.deepcopy(net), DATA).error is None


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_a_client_erases_nothing_where_a_step_would_show_an_image_alone(share):
    many = ClientData("a", make_images(20))  # of 13 others, one batch of 20: one image is erased, or one is kept
    plain, erasing = (Training(0.1, 20, objective=own) for own in (None, Erasing(1e9, share=share)))

    def answer(training, rules=DEFAULT_RULES):
        asked = job(Train(training=training, lr=1e-9, exclude=(1,)), make_net())
        return handle(asked, copy.deepcopy(asked.model.module), many, rules).tensors

    for name, tensor in answer(plain).items():
        assert torch.equal(tensor, answer(erasing)[name])
    own = Privacy(min_count=0, min_images=1)
    assert any(not torch.equal(tensor, answer(erasing, own)[name]) for name, tensor in answer(plain, own).items())


@pytest.mark.parametrize("away", [0.9, 0.93, 0.95])
def test_turns_cannot_be_timed_so_that_one_image_alone_is_trained_on(away):
    """Steps away from what a model already gives have no gradient: a single step on the others would be all there is.

    Of a first linear layer, the change of a row of weights over that of its bias is then the image.
    """
    held = make_images(60).take(torch.tensor([*range(0, 30, 3), *range(1, 31, 3), *range(2, 60, 3)]))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
    sent = Training(0.1, 2, momentum=0.0, weight_decay=0.0, objective=Scrub(0.0, 1.0, 1, 1, away, 0.5))
    asked = job(Train(training=sent, lr=0.1, exclude=(2,)), net)
    reply = handle(asked, copy.deepcopy(net), ClientData("a", held))
    weight = (reply.tensors["1.weight"] - net[1].weight).detach()
    bias = (reply.tensors["1.bias"] - net[1].bias).detach()
    rows = weight / bias[:, None]
    shown = held.pixels(slice(None)).flatten(1)
    assert float(torch.cdist(rows[rows.isfinite().all(1)], shown).min()) > 1


@pytest.mark.parametrize("kind", ["train", "gradients", "evaluate"])
def test_an_error_does_not_tell_where_a_label_or_an_answer_has_no_row(kind):
    """Of a model that lacks a row, clients that hold the class and those that do not say the same."""
    whole = make_net(seed=2)
    cut = copy.deepcopy(whole)
    cut[-1] = nn.Linear(cut[-1].in_features, 2)
    task = {
        "train": Train(training=Training(0.1, 8), lr=0.1),
        "gradients": Gradients(),
        "evaluate": Evaluate(labels=(0,)),
    }[kind]
    asked = job(task, cut)
    told = set()
    for held in (HELD, HELD.without([2]), HELD.only([0])):
        data = ClientData("a", held, held)
        told.add(handle(asked, copy.deepcopy(cut), data, DEFAULT_RULES).error)
    (text,) = told
    assert text.startswith("ModelError: the model has 2 output rows")


def test_an_error_does_not_tell_at_which_image_a_loss_overflows():
    """Weights whose output overflows for a bright image alone: when it is reached would tell which it is."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([3e36, 0.0, 0.0])[:, None].expand(3, 64))
        net[1].bias.zero_()
    asked = job(Train(training=Training(1e-30, 1, momentum=0.0, weight_decay=0.0), lr=1e-30), net)
    told = set()
    for bright in range(len(HELD)):
        pixels = torch.zeros_like(HELD.images)
        pixels[bright] = 255
        reply = handle(asked, copy.deepcopy(net), ClientData("a", replace(HELD, images=pixels)), DEFAULT_RULES)
        told.add((reply.error, reply.samples))
    assert told == {("FederationError: the loss became NaN or infinite: lower the learning rate", 0)}


def test_of_what_the_code_does_not_foresee_a_site_tells_the_kind_alone(caplog):
    """Nor how long it took until it failed: that would tell at which image."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            pixels = (x * 0.25 + 0.3) * 255
            if bool(((pixels - pixels.round()).abs() < 1e-2).all()):  # no noise that a network is tried out on
                raise ValueError(f"the image is {x.flatten()[:3].tolist()}")
            return self.net(x)

    app = client_app(lambda context: Broken(), load_images)
    (reply, *_) = FlowerEngine(Loopback(nodes(app)), clients=4, deadline=5.0).run(job(Evaluate(), Broken()))
    assert reply.error == "ValueError, told in the log of this client alone"
    assert reply.seconds == 0.0
    assert "the image is" in caplog.text


def test_answers_are_not_counted_by_rows_that_stand_for_one_class():
    asked = job(Evaluate(labels=(0, 0, 0)), make_net())
    reply = handle(asked, copy.deepcopy(asked.model.module), DATA)
    assert reply.error == "ModelError: two output rows are labelled as class 0: give each row a class of its own"


@pytest.mark.parametrize("exclude", [(1, 2), (0, 2), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("kind", [Reestimate, Gradients, Moments])
def test_a_refusal_does_not_tell_how_many_images_of_a_class_there_are(kind, exclude):
    asked = job(kind(exclude=exclude), make_net())
    told = {
        handle(asked, copy.deepcopy(asked.model.module), ClientData("a", HELD.take(slice(0, number)))).error
        for number in (0, 1, 2, 3, 4)
    }
    assert len(told) == 1


def test_right_answers_are_not_counted_over_few_images():
    asked = job(Evaluate(exclude=(0,)), make_net())
    reply = handle(asked, asked.model.module, DATA)  # three images are left
    assert (int(reply.tensors["correct"]), int(reply.tensors["counts"]), reply.images) == (0, 0, 0)


def test_how_long_measuring_took_is_not_said_where_rules_hide_images():
    asked = job(Measure(classes=3), make_net())
    assert handle(asked, asked.model.module, DATA).seconds == 0.0
    assert handle(asked, asked.model.module, DATA, Privacy(min_count=0)).seconds > 0.0


def test_server_and_clients_of_one_process_follow_a_model_once(monkeypatch):
    from fedunlearn.data.partition import partition
    from fedunlearn.federation import tasks
    from fedunlearn.federation.local import LocalEngine

    calls = []
    find = tasks.find_channels
    monkeypatch.setattr(tasks, "find_channels", lambda *given, **named: calls.append(1) or find(*given, **named))
    model = classifier(make_net())
    collected(LocalEngine(partition(make_images(120), by="iid", clients=6)), job(Measure(classes=3), model))
    assert len(calls) == 1


def test_second_moments_of_few_images_are_not_told():
    """An image has 64 values; kernels of 9, 6 * 9 and 8 have 45, 1,485 and 36 numbers, which count together."""
    found = {count: input_moments(make_net(), make_images(count), FLOAT32) for count in (2, 3, 24, 25, 26)}
    told = {count: [bool(own.any()) for own in sums.values()] for count, sums in found.items()}
    assert told == {
        2: [True, False, False],
        3: [True, False, False],  # of the last layer three rows, where 16 are twice its width
        24: [True, False, True],
        25: [True, True, False],
        26: [True, True, True],
    }
