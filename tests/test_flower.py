"""The Flower engine on a grid inside this process: agreement with the in-process engine, and what clients do wrong."""

import contextlib
import copy
import json
import logging
import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader

from conftest import classifier, collected, job, make_images, make_net
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.plan import Cut, plan_pruning
from fedunlearn.channels.scores import Ranking, contrast
from fedunlearn.data.batches import batches
from fedunlearn.data.images import Meaning
from fedunlearn.errors import DataError, FederationError
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import ClientData, Reply, handle
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.measuring import measure
from fedunlearn.federation.privacy import DEFAULT_RULES
from fedunlearn.federation.rounds import Repair, Watch, train_rounds
from fedunlearn.federation.tasks import Evaluate, Measure, Train
from fedunlearn.flower.client import client_app, unlearning_mod
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.flower.messages import decode_job, digest_of, encode_job, encode_reply, exchange, rebuild, to_arrays
from fedunlearn.training.compute import Compute
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.sgd import Training
from fedunlearn.unlearn import unlearn
from loopback import APP, CLIENTS, VALIDATION, Loopback, build_model, load_images, nodes, same

TRAINING = Training(0.1, 8)


def engine(grid=None, **options):
    return FlowerEngine(grid or Loopback(nodes()), **({"clients": 4, "deadline": 0.5, "patience": 0.1} | options))


def train_job(model=None, *, exclude=(), phase="train", **change):
    return job(Train(training=TRAINING, lr=0.1, exclude=exclude), model or make_net(), phase=phase, **change)


def measure_job(**change):
    model = classifier(make_net())
    return job(Measure(classes=3), model, phase="measure-0", **change)


def pruned(scores=None):
    """Return the classifier without half of the channels of these layers."""
    whole = classifier(make_net())
    scores = scores or {"0": torch.arange(6.0)}
    return whole.cut(plan_pruning(find_channels(whole.module, whole.example), scores, Cut(0.5)))


def forget(chosen, objective=Erasing(1.0, 0.1, 0.5, 1.0, 2)):  # noqa: B008  # it is frozen
    fed = Federation(chosen)
    trained = train_rounds(make_net(), fed, TRAINING, rounds=2, watch=Watch(every=1))
    repair = Repair(replace(TRAINING, batch_size=16, objective=objective), rounds=2)
    done = unlearn(trained, fed, forget=1, cut=Cut(0.4), repair=repair, rank=Ranking(contrast))
    return fed.journal.steps("train"), done


def test_the_engines_agree_to_the_bit():
    ours, mine = forget(LocalEngine(CLIENTS, validation=VALIDATION))
    theirs, other = forget(engine())
    assert [step.validation for step in ours] == [step.validation for step in theirs]
    assert mine.model.plan == other.model.plan
    assert same(mine.model.module, other.model.module)
    assert mine.model.labels == other.model.labels == (0, 2)
    assert mine.cost.client_flops == other.cost.client_flops
    assert mine.cost.bytes_up == other.cost.bytes_up


def by_hand(model, data, lr):
    optimiser = torch.optim.SGD(model.parameters(), lr)
    for image, label in DataLoader(data, batch_size=8):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(image), label).backward()
        optimiser.step()
    return len(data)


@pytest.mark.parametrize("compute", [Compute(train=by_hand), Compute(optimiser=torch.optim.Adam)])
def test_a_site_trains_by_its_own_loop_or_optimiser_as_a_client_of_one_process_does(compute):
    _, mine = forget(LocalEngine(CLIENTS, validation=VALIDATION, compute=compute), objective=None)
    app = client_app(build_model, load_images, compute=compute)
    _, other = forget(engine(Loopback(nodes(app))), objective=None)
    assert same(mine.model.module, other.model.module)
    _, usual = forget(engine(), objective=None)
    assert not same(usual.model.module, other.model.module)


def test_the_flower_extra_is_asked_for_by_name():
    code = "import sys; sys.modules['flwr'] = sys.modules['flwr.app'] = None; import fedunlearn.flower.engine"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: the Flower engine needs Flower: pip install 'fedunlearn[flower]'" in done.stderr


def answering(change):
    """Return an app whose answers to jobs ``change`` may replace."""

    def mod(message, context, call_next):
        reply = call_next(copy.deepcopy(message), context)
        return reply if "hello" in message.content["fedunlearn"] else change(message, reply)

    app = ClientApp(mods=[mod])

    @app.train()
    def answer(message, context):
        return APP(message, context)

    return app


def replaced(edit):
    def change(message, reply):
        arrays = {name: array.numpy().copy() for name, array in reply.content["arrays"].items()}
        edit(arrays)
        reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return reply

    return change


def set_first(value):
    def edit(arrays):
        name = next(name for name in sorted(arrays) if arrays[name].dtype.kind == "f" and arrays[name].ndim)
        arrays[name].flat[0] = value

    return replaced(edit)


def stale(message, reply):
    """Answer as to the round before."""
    text = message.content["fedunlearn"]["job"].replace('"round":0', '"round":1')
    answer = Reply("client-0", images=3)
    reply.content["fedunlearn"] = ConfigRecord({"reply": encode_reply(answer, digest_of(text))[1]})
    return reply


def raising(message, reply):
    raise RuntimeError("the disk is full")


def empty(message, reply):
    return Message(RecordDict(), reply_to=message)


def claiming(images):
    """Answer with consistent statistics of an absurd number of images."""

    def change(message, reply):
        reply = replaced(lambda a: a.update({name: a[name] * 0 + images for name in ("counts", "held")}))(
            message, reply
        )
        text = reply.content["fedunlearn"]["reply"]
        reply.content["fedunlearn"] = ConfigRecord({"reply": re.sub('"images":[0-9]+', f'"images":{images}', text)})
        return reply

    return change


def raw(data):
    """Answer with bytes that are no array."""

    def change(message, reply):
        arrays = dict(reply.content["arrays"].items())
        arrays["0.bias"] = Array("float32", (6,), "numpy.ndarray", data)
        reply.content["arrays"] = ArrayRecord(arrays)
        return reply

    return change


def shouting(message, reply):
    """Answer with an error that would colour a terminal and fill a disk."""
    reply.content["fedunlearn"] = ConfigRecord({"error": "it shouts\n\x1b[31m" + "A" * 10**6})
    return reply


FAULTS = {
    "nan": (train_job, set_first(float("nan")), "has values that are not finite"),
    "infinity": (measure_job, set_first(float("inf")), "has values that are not finite"),
    "shape": (
        train_job,
        replaced(lambda a: a.update({"0.bias": a["0.bias"][:3]})),
        "float32, got of shape (3,)",
    ),
    "missing": (
        train_job,
        replaced(lambda a: a.pop("0.bias")),
        "float32, got nothing of the name",
    ),
    "stale": (train_job, stale, "it answered another job: its plan, round or settings are stale"),
    "negative": (measure_job, set_first(-1.0), "has negative values"),
    "more than it holds": (
        measure_job,
        replaced(lambda a: a["counts"].__setitem__(0, 10**9)),
        "it counts 10000000",
    ),
    "classes it has not": (
        measure_job,
        replaced(lambda a: a["counts"].__setitem__(0, 0)),
        "has values for classes of which it counts no image",
    ),
    "whole numbers": (
        train_job,
        replaced(lambda a: a.update({"0.bias": a["0.bias"].astype("int64")})),
        "got of shape (6,), int64",
    ),
    "complex numbers": (
        train_job,
        replaced(lambda a: a.update({"0.bias": a["0.bias"].astype("complex64")})),
        "got of shape (6,), complex64",
    ),
    "more than anybody holds": (measure_job, claiming(2**62), "it sent no reply that can be read (images: "),
    "no array": (train_job, raw(b""), "it sent no reply that can be read (EOFError"),
    "an archive": (train_job, raw(b"PK\x03\x04"), "it sent no reply that can be read (BadZipFile"),
    "a pickle": (train_job, raw(pickle.dumps(print)), "it sent no reply that can be read (ValueError"),
    "escapes": (train_job, shouting, "it shouts  [31m" + "A" * 200),
    "nothing": (train_job, empty, "it sent no reply that can be read"),
    "silence": (train_job, lambda message, reply: None, "it gave no answer within 0.5 s"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_answers_wrongly_is_refused_by_name_and_the_round_goes_on(fault):
    make, change, reason = FAULTS[fault]
    grid = Loopback(nodes() | {100: (answering(change), 0)})
    replies, entry = collected(engine(grid), make())
    assert entry.clients == ("client-1", "client-2", "client-3")
    assert list(entry.refused) == ["client-0"]
    assert reason in entry.refused["client-0"]
    honest = collected(engine(), make(clients=("client-1", "client-2", "client-3")))[0]
    assert len(entry.refused["client-0"]) < 400
    for reply, expected in zip(replies, honest):
        for name, tensor in reply.tensors.items():
            assert torch.equal(tensor, expected.tensors[name])


def test_a_client_that_cannot_do_the_job_says_why():
    class Dark(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

    broken = client_app(lambda context: Dark(), load_images)
    entry = collected(engine(Loopback(nodes() | {102: (broken, 2)})), train_job())[1]
    assert "the weights do not fit this client's model after pruning by the plan" in entry.refused["client-2"]
    entry = collected(engine(Loopback(nodes() | {102: (broken, 2)})), train_job(pruned()))[1]
    assert "the plan is for" in entry.refused["client-2"]


def test_clients_refuse_the_job_of_a_server_of_another_schema_and_it_says_who_and_why(monkeypatch):
    def encode(job):
        tensors, text = encode_job(job)
        return tensors, text.replace('"schema":3', '"schema":4')

    monkeypatch.setattr("fedunlearn.flower.engine.encode_job", encode)
    with pytest.raises(FederationError) as error:
        collected(engine(), train_job())
    assert "train, round 1: only 0 of 4 clients gave a usable reply" in str(error.value)
    assert "client-3: expected a job of schema 3, but schema: Input should be 3" in str(error.value)


def test_the_plan_must_be_that_of_the_weights():
    with pytest.raises(FederationError, match=r"only 0 of 4 clients gave a usable reply.*the weights do not fit"):
        collected(engine(), train_job(classifier(pruned().module)))  # forgot the plan


def test_with_all_clients_gone_the_error_comes_after_the_deadline_and_nothing_is_lost(tmp_path):
    grid = Loopback(nodes())
    fed = Federation(engine(grid), Journal(tmp_path))
    train_rounds(make_net(), fed, TRAINING, rounds=2)
    grid.nodes = {}
    with pytest.raises(FederationError, match=r"train, round 3: only 0 of 4 clients .*it is not connected"):
        train_rounds(make_net(), fed, TRAINING, rounds=4)
    anew = Federation(engine(), Journal(tmp_path))  # a server started anew
    again = train_rounds(make_net(), anew, TRAINING, rounds=4)
    straight = train_rounds(make_net(), Federation(engine()), TRAINING, rounds=4)
    assert same(again.module, straight.module)


def test_a_client_that_joins_late_or_comes_back_takes_part_from_then_on():
    grid = Loopback(nodes(count=3))
    chosen = engine(grid, clients=tuple(CLIENTS))
    assert chosen.clients == tuple(CLIENTS)
    assert collected(chosen, train_job())[1].refused == {"client-3": "it is not connected"}
    grid.nodes[999] = (APP, 3)
    assert collected(chosen, train_job())[1].refused == {}
    del grid.nodes[101]
    assert collected(chosen, train_job())[1].refused == {"client-1": "it is not connected"}
    grid.nodes[555] = (APP, 1)  # the restarted SuperNode has another number
    assert collected(chosen, train_job())[1].refused == {}


def test_a_federation_of_no_fixed_names_grows():
    grid = Loopback(nodes(count=3))
    chosen = engine(grid, clients=2)
    assert chosen.clients == ("client-0", "client-1", "client-2")
    grid.nodes[999] = (APP, 3)
    collected(chosen, train_job())
    assert chosen.clients == tuple(CLIENTS)
    assert (chosen.shape, chosen.classes) == ((1, 8, 8), 3)
    (reply,) = chosen.run(train_job(clients=("client-9",)))  # of before a kill, it may come back
    assert reply.error == "it is not connected"
    with pytest.raises(FederationError, match="there is no client 'client-9'; the clients are client-0, client-1"):
        engine(clients=tuple(CLIENTS)).run(train_job(clients=("client-9",)))


def test_who_joins_while_clients_are_asked_is_asked_from_the_next_job_on():
    grid = Loopback(nodes(count=3))
    chosen = engine(grid, clients=3)
    grid.nodes[999] = (APP, 3)
    first, second = (collected(chosen, measure_job())[1] for _ in range(2))
    assert (first.clients, first.refused) == (("client-0", "client-1", "client-2"), {})
    assert second.clients == tuple(CLIENTS)


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_of_no_fixed_names_goes_on_with_whom_it_finds_after_a_kill(tmp_path, count):
    class Killed(Loopback):
        def push_messages(self, messages):
            if "repair-1" in {message.metadata.group_id for message in messages}:
                raise KeyboardInterrupt
            return super().push_messages(messages)

    settings = {"forget": 1, "cut": Cut(0.4), "repair": Repair(Training(0.1, 8), rounds=2), "rank": Ranking(contrast)}
    before = Federation(engine(Killed(nodes(count=3)), clients=3), Journal(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        unlearn(make_net(), before, **settings)
    before.journal.leave()
    after = Federation(engine(Loopback(nodes(count=count)), clients=3), Journal(tmp_path))
    done = unlearn(make_net(), after, **settings)
    assert [len(step.entries[0].clients) for step in after.journal.steps("repair")] == [3, count]
    assert int(done.stats.counts.sum()) == sum(len(CLIENTS[name]) for name in list(CLIENTS)[:3])


def test_a_site_that_comes_back_under_another_number_is_asked_when_flower_has_missed_the_old_one():
    grid = Loopback(nodes())
    chosen = engine(grid, clients=tuple(CLIENTS))
    grid.nodes[555] = (APP, 1)  # the old node counts as connected for a while yet
    assert collected(chosen, train_job())[1].refused == {}
    del grid.nodes[101]
    assert collected(chosen, train_job())[1].refused == {}


class Unreadable(Loopback):
    """A grid in which the answer of a node cannot be read, as Flower's own raises then."""

    def pull_messages(self, message_ids):
        found = super().pull_messages(message_ids)
        if any(message.metadata.src_node_id == 102 for message in found):
            raise KeyError("arraychunk_ids")
        return found


def test_an_answer_that_flower_cannot_read_costs_that_client_alone():
    grid = Unreadable(nodes())
    chosen = engine(Loopback(nodes()), clients=tuple(CLIENTS))
    chosen._grid = grid
    _, entry = collected(chosen, train_job())
    assert entry.refused == {"client-2": "it sent no reply that can be read (KeyError: 'arraychunk_ids')"}


def test_a_link_that_breaks_is_no_fault_of_a_client():
    class Broken(Loopback):
        def pull_messages(self, message_ids):
            raise ConnectionError("gone")

    chosen = engine()
    chosen._grid = Broken(nodes())
    with pytest.raises(ConnectionError, match="gone"):
        chosen.run(train_job())


@pytest.mark.parametrize("numbers", [[], ["", None, "", ""]])
def test_a_message_that_the_superlink_does_not_take_is_no_fault_of_a_client(numbers):
    class Full(Loopback):
        def push_messages(self, messages):
            return numbers

    chosen = engine()
    chosen._grid = Full(nodes())
    assert {reply.error for reply in chosen.run(train_job())} == {
        "the SuperLink did not take its message, which may be too large: see its log, and raise its limit"
    }


@pytest.mark.parametrize(
    ("number", "change", "text"),
    [
        (1, {}, "it calls itself 'client-1', and so does node 101, which is connected"),
        (3, {"client": "stranger"}, "it calls itself 'stranger', which is none of the clients client-0"),
        (3, {"side": 16}, "it holds images of shape (1, 16, 16) in 3 classes, the others (1, 8, 8) in 3"),
        (7, {}, "its images cannot be read: IndexError"),
        (3, {"classes": ("class 1", "class 0", "class 2")}, "it holds images whose class 0 is 'class 1', that of the "),
        (3, {"mean": (0.9,)}, "it holds images normalised by mean (0.9,), the others by (0.3,): all must agree"),
        (3, {"std": (0.5,)}, "it holds images normalised by std (0.5,), the others by (0.25,): all must agree"),
    ],
)
def test_a_node_that_does_not_fit_is_not_asked(number, change, text, caplog):
    def own_images(context):
        data = load_images(context)
        images = make_images(20, side=change["side"]) if "side" in change else data.train
        said = {name: value for name, value in change.items() if name in ("classes", "mean", "std")}
        return ClientData(change.get("client", data.client), replace(images, **said))

    grid = Loopback(nodes() | {500: (client_app(build_model, own_images), number)})
    with caplog.at_level(logging.WARNING):
        chosen = engine(grid, clients=tuple(CLIENTS))
    assert f"node 500 is not asked: {text}" in caplog.text
    assert collected(chosen, train_job())[1].refused == {}


def test_a_node_that_was_slow_to_introduce_itself_is_asked_again():
    calls = []

    def slow(message, context):
        calls.append(message)
        return None if len(calls) < 3 else APP(message, context)

    chosen = engine(Loopback(nodes(count=3) | {700: (slow, 3)}), clients=tuple(CLIENTS))
    end = time.monotonic() + 20
    while refused := collected(chosen, train_job())[1].refused:
        assert list(refused) == ["client-3"]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["fails", "cannot read its images"])
def test_a_node_that_failed_once_takes_part_later_under_the_same_number(how, caplog):
    """Of a process that ended, or a disk that was not mounted yet."""
    calls = []

    def unread(context):
        if len(calls) < 3:
            raise OSError("not mounted")
        return load_images(context)

    app = client_app(build_model, unread if how != "fails" else load_images)

    def mended(message, context):
        calls.append(message)
        if how == "fails" and len(calls) < 3:
            raise MemoryError
        return app(message, context)

    chosen = engine(Loopback(nodes(count=3) | {700: (mended, 3)}), clients=tuple(CLIENTS), hello=0.1)
    end = time.monotonic() + 20
    while refused := collected(chosen, train_job())[1].refused:
        assert list(refused) == ["client-3"]
        assert time.monotonic() < end
        time.sleep(0.02)
    assert caplog.text.count("node 700 is not asked") == 1  # the same is said once


def test_a_node_that_never_introduces_itself_costs_later_jobs_ever_less():
    asked = []
    hung = {700: (lambda message, context: asked.append(time.monotonic()), 3)}
    chosen = engine(Loopback(nodes(count=3) | hung), clients=tuple(CLIENTS), deadline=5.0, hello=0.05)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        collected(chosen, train_job())
    assert 3 <= len(asked) <= 8  # one for each doubling of .05 s; each job would be a hundred


class Late(Loopback):
    """Each answer is there after ``after`` seconds, and takes ``pull`` seconds to take."""

    def __init__(self, count, *, after, pull):
        answer = (lambda message, context: Message(RecordDict(), reply_to=message), 0)
        super().__init__(dict.fromkeys(range(count), answer))
        self.after, self.pull = after, pull

    def push_messages(self, messages):
        self.began = time.monotonic()
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        if time.monotonic() - self.began < self.after:
            return []
        time.sleep(self.pull)
        return super().pull_messages(message_ids)


@pytest.mark.parametrize(("count", "after", "pull"), [(3, 0.49, 0.0), (50, 0.1, 0.02)])
def test_every_answer_that_is_there_by_the_deadline_is_taken(count, after, pull):
    grid = Late(count, after=after, pull=pull)
    messages = [Message(RecordDict(), node, "train") for node in range(count)]
    came = exchange(grid, messages, 0.5)
    assert (sorted(came.answers), came.failed) == ([*range(count)], {})


def test_what_is_not_there_by_the_deadline_has_failed():
    grid = Late(3, after=9.0, pull=0.0)
    came = exchange(grid, [Message(RecordDict(), node, "train") for node in range(3)], 0.2)
    assert came.failed == dict.fromkeys(range(3), "it gave no answer within 0.2 s")
    assert (came.late, came.unsent) == ({0, 1, 2}, set())


def test_a_node_that_no_message_reached_is_asked_again():
    class Busy(Loopback):
        refuses = False

        def push_messages(self, messages):
            kept = [message for message in messages if not (self.refuses and message.metadata.dst_node_id == 103)]
            numbers = iter(super().push_messages(kept))
            return [next(numbers) if message in kept else None for message in messages]

    grid = Busy(nodes())
    grid.refuses = True
    chosen = engine(grid, clients=tuple(CLIENTS))
    assert collected(chosen, train_job())[1].refused == {"client-3": "it is not connected"}
    grid.refuses = False
    assert collected(chosen, train_job())[1].refused == {}


def test_the_first_to_answer_does_not_decide_what_images_are_like(caplog):
    odd = client_app(build_model, lambda context: ClientData("client-0", make_images(20, side=16)))
    grid = Loopback({1: (odd, 0)} | nodes())
    chosen = engine(grid, clients=tuple(CLIENTS), meaning=Meaning.of(make_images()))
    assert "node 1 is not asked: it holds images of shape (1, 16, 16)" in caplog.text
    assert collected(chosen, train_job())[1].refused == {}


def test_of_two_answers_to_one_message_the_first_counts_and_late_ones_are_not_taken_for_others():
    class Slow(Loopback):
        """Delivers client 0's answer to a round during the next, and everybody's twice."""

        held = None

        def pull_messages(self, message_ids):
            found = super().pull_messages(message_ids)
            late = [m for m in found if m.metadata.src_node_id == 100 and "hello" not in str(m.content)]
            now, self.held = self.held, late or self.held
            return [m for m in found if m not in late] * 2 + (now or [])

    grid = Slow(nodes())
    chosen = engine(grid)
    for round in range(2):
        replies, _ = collected(chosen, train_job(round=round, phase=f"phase-{round}"))
        straight = {r.client: r for r in collected(engine(), train_job(round=round, phase=f"phase-{round}"))[0]}
        for reply in replies:
            for name, tensor in reply.tensors.items():
                assert torch.equal(tensor, straight[reply.client].tensors[name])
        assert {"client-1", "client-2", "client-3"} <= {reply.client for reply in replies}


def test_a_refused_node_may_be_mended_and_come_back():
    grid = Loopback(nodes(count=3) | {500: (client_app(build_model, lambda context: 1 / 0), 3)})
    chosen = engine(grid, clients=tuple(CLIENTS))
    assert collected(chosen, train_job())[1].refused == {"client-3": "it is not connected"}
    del grid.nodes[500]
    collected(chosen, train_job())
    grid.nodes[500] = (APP, 3)
    assert collected(chosen, train_job())[1].refused == {}


def introduced(**change):
    """Return an app that introduces itself by ``change``."""
    about = {"client": "client-3", "shape": [1, 8, 8], "classes": ["a", "b", "c"], "mean": [0.3], "std": [0.25]}
    app = ClientApp()

    @app.train()
    def _(message, context):
        return Message(RecordDict({"fedunlearn": ConfigRecord(about | change)}), reply_to=message)

    return app


def test_a_node_that_speaks_something_else_is_not_asked(caplog):
    silent, foreign, flat = ClientApp(), ClientApp(), ClientApp()

    @silent.train()
    def _(message, context):
        return None

    @foreign.train()
    def _(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"loss": 0.5})}), reply_to=message)

    @flat.train()
    def _(message, context):
        about = {"client": "client-3", "shape": [64], "classes": ["a"], "mean": [0.0], "std": [1.0]}
        return Message(RecordDict({"fedunlearn": ConfigRecord(about)}), reply_to=message)

    false, unnamed = introduced(shape=[1, -8, 8]), introduced(client="client-3\n" + "x" * 300)
    grid = Loopback(nodes(count=3) | {7: (silent, 0), 8: (foreign, 0), 9: (flat, 3), 10: (false, 3), 11: (unnamed, 3)})
    with caplog.at_level(logging.WARNING):
        engine(grid, clients=tuple(CLIENTS))
    assert "node 8 is not asked: it did not introduce itself (KeyError: 'fedunlearn')" in caplog.text
    assert "node 9 is not asked: it holds images of shape (64,), expected colours, height and width" in caplog.text
    assert "node 10 is not asked: it holds images of which it says what cannot be: images must have pix" in caplog.text
    assert "3 of 4 clients are there after 0.1 s" in caplog.text
    chosen = engine(Loopback(nodes(count=3) | {11: (unnamed, 3)}), clients=3)
    assert chosen.clients == ("client-0", "client-1", "client-2")
    assert "node 11 is not asked: it calls itself 'client-3\\nxx" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shape": [1, 10**6, 10**6]}, "at most 100,000,000 values, got the shape (1, 1000000, 1000000)"),
        ({"classes": ["a", "a", "b"]}, "what cannot be: "),
        ({"std": [0.0]}, "std above 0"),
        ({"mean": [float("nan")]}, "mean must lie in [0, 1]"),
    ],
)
def test_the_first_to_introduce_itself_cannot_say_what_no_images_are(change, text, caplog):
    found = engine(Loopback({1: (introduced(**change), 3), **nodes(count=3)}), clients=3)
    assert found.shape == (1, 8, 8)
    assert text in caplog.text


def test_too_few_clients_at_the_start_are_an_error():
    with pytest.raises(FederationError, match=r"only 1 of 4 clients were there after 0.1 s, expected at least half"):
        engine(Loopback(nodes(count=1)))
    with pytest.raises(FederationError, match=r"expected at least half; missing: client-1, client-2, client-3: start"):
        engine(Loopback(nodes(count=1)), clients=tuple(CLIENTS))


def test_a_client_that_is_there_but_slow_is_not_told_to_start():
    mute = ClientApp()

    @mute.train()
    def _(message, context):
        return None

    grid = Loopback(nodes(mute))
    with pytest.raises(FederationError) as error:
        engine(grid, hello=0.2)
    assert "; 4 more are connected but did not answer in 0.2 s: give them longer (hello, " in str(error.value)
    assert "start their SuperNodes" not in str(error.value)


def test_an_engine_that_brings_replies_twice_or_unasked_does_no_harm(caplog):
    class Double(LocalEngine):
        def run(self, job):
            replies = list(super().run(job))
            return [*replies, Reply(replies[0].client, error="again"), Reply("stranger", images=1)]

    replies, entry = collected(Double(CLIENTS), train_job())
    assert [reply.client for reply in replies] == list(CLIENTS)
    assert entry.refused == {}
    assert "client-0 answered twice: its first answer counts" in caplog.text
    assert "stranger was not asked" in caplog.text


def own_train(leave_out=True, key="num-examples"):
    """Return the train function of an app that knows nothing of pruning: plain SGD on the whole architecture."""

    def train(message, context):
        data = load_images(context).train
        config = message.content["config"]
        images = data.without(tuple(config["exclude"])) if leave_out else data
        net = make_net(seed=3)
        net.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
        sgd(net, images, float(config["lr"]))
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({key: len(images), "loss": 0.5})}
        return Message(RecordDict(content), reply_to=message)

    return train


def sgd(net, images, lr):
    net.train()
    velocities = {}
    for _ in range(2):
        for batch, labels in batches(images, 8):
            net.zero_grad()
            torch.nn.functional.cross_entropy(net(batch), labels).backward()
            for name, parameter in net.named_parameters():
                velocities[name] = 0.9 * velocities.get(name, 0.0) + parameter.grad + 5e-4 * parameter.detach()
                parameter.data -= lr * velocities[name]


def app_with_mod(**options):
    app = ClientApp(mods=[unlearning_mod(build_model, load_images)])
    app.train()(own_train(**options))
    return app


def test_a_train_function_for_the_whole_model_trains_the_pruned_one():
    model = pruned({"0": torch.arange(6.0), "3": torch.arange(8.0)})
    replies = collected(engine(Loopback(nodes(app_with_mod()))), train_job(model, exclude=(1,)))[0]
    for reply in replies:
        trained = model.copy().module
        sgd(trained, CLIENTS[reply.client].without((1,)), 0.1)
        assert reply.images == len(CLIENTS[reply.client].without((1,)))
        for name, tensor in trained.state_dict().items():
            torch.testing.assert_close(reply.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_an_app_with_the_mod_forgets_with_its_own_training():
    steps, done = forget(engine(Loopback(nodes(app_with_mod()))), objective=None)
    assert len(steps) == 2
    correct, counts = done_counts(done)
    assert done.model.labels == (0, 2)
    assert float(correct.sum() / counts.sum()) > 0.9


def test_what_the_server_does_not_train_is_not_trained_at_a_site_either():
    frozen = make_net()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name.startswith("8."))
    replies = collected(engine(), train_job(frozen))[0]
    here = collected(LocalEngine(CLIENTS), train_job(frozen))[0]
    before = frozen.state_dict()
    for reply, mine in zip(replies, here, strict=True):
        assert {name for name, value in reply.tensors.items() if not value.equal(mine.tensors[name])} == set()
        moved = {name for name, _ in frozen.named_parameters() if not reply.tensors[name].equal(before[name])}
        assert moved == {"8.weight", "8.bias"}
    entry = collected(engine(Loopback(nodes() | {100: (app_with_mod(), 0)})), train_job(frozen))[1]
    assert "the train function changed 0.weight, which the server has frozen" in entry.refused["client-0"]


def test_a_job_that_freezes_what_is_not_there_is_refused():
    tensors, text = encode_job(train_job())
    received = decode_job(tensors, json.dumps(json.loads(text) | {"frozen": ["nothing"]}))
    with pytest.raises(FederationError, match="the job freezes nothing, which this client's model has not"):
        rebuild(received, tensors, classifier(make_net()))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_train_function_in_full_shapes_is_refused_where_a_norm_reads_the_zeros(groups):
    """Half of six channels goes: one group of six loses half of what it is the mean of, three of two go or stay."""

    def build(context=None):
        net = make_net()
        net[1] = torch.nn.GroupNorm(groups, 6)
        return net

    app = ClientApp(mods=[unlearning_mod(build, load_images)])

    @app.train()
    def _(message, context):
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 20})}
        return Message(RecordDict(content), reply_to=message)

    whole = classifier(build())
    channels = find_channels(whole.module, whole.example)
    model = whole.cut(plan_pruning(channels, {"0": torch.tensor([0.0, 0, 1, 1, 2, 2])}, Cut(0.34)))
    assert model.plan.kept
    others = {number: (client_app(build, load_images), number - 100) for number in range(101, 104)}
    entry = collected(engine(Loopback({100: (app, 0)} | others)), train_job(model))[1]
    if groups == 1:
        assert "and its model has a norm that reads them: use client_app" in entry.refused["client-0"]
    else:
        assert entry.refused == {}


SECRET = "Jane Doe, 1970, row 17"


@pytest.mark.parametrize("error", [ValueError, DataError])
@pytest.mark.parametrize("part", ["images", "rules", "model"])
@pytest.mark.parametrize("sent", [train_job, measure_job])
def test_an_exception_of_a_sites_own_code_is_told_by_its_kind_alone(part, sent, error, caplog):
    """Its text may hold a row of a table of patients, or name a file."""
    good = engine()  # introduced before it breaks

    def broken(context):
        raise error(f"could not convert {SECRET}")

    parts = {"images": load_images, "model": build_model, "rules": lambda context: DEFAULT_RULES} | {part: broken}
    app = client_app(parts["model"], parts["images"], rules=parts["rules"])
    chosen = Loopback(nodes() | {100: (app, 0)})
    with contextlib.suppress(FederationError):
        engine(chosen, clients=3)
    good._grid.nodes[100] = (app, 0)
    entry = collected(good, sent())[1]
    assert f"{error.__name__}, told in the log of this client alone" in entry.refused["client-0"]
    told = " ".join(record.getMessage() for record in caplog.records)
    assert SECRET not in told
    assert SECRET not in str(entry.refused)


def test_sites_that_come_back_under_new_names_do_not_count_as_failed():
    grid = Loopback(nodes(count=3))
    chosen = engine(grid, clients=3)
    renamed = client_app(build_model, lambda context: ClientData(f"host-{len(seen)}", CLIENTS["client-3"]))
    seen = []
    for number in range(4):
        seen.append(number)
        grid.nodes[200 + number] = (renamed, 3)
        grid.nodes.pop(199 + number, None)
        assert collected(chosen, train_job())[1].refused == {}
    collected(chosen, train_job())
    assert chosen.clients == ("client-0", "client-1", "client-2", "host-4")


@pytest.mark.parametrize("sent", [train_job, measure_job])
def test_with_most_of_the_sites_away_that_were_asked_for_a_job_fails_and_names_them(sent):
    grid = Loopback(nodes())
    chosen = engine(grid, clients=4)
    for number in (101, 102, 103):
        grid.nodes.pop(number)
    with pytest.raises(FederationError, match=r"only 1 of 4 clients .*client-2, client-3: it is not connected"):
        collected(chosen, sent())


def test_sites_that_are_away_while_channels_are_measured_may_hold_images_of_the_classes_that_stay():
    grid = Loopback(nodes())
    fed = Federation(engine(grid, clients=4))
    for number in (102, 103):
        grid.nodes.pop(number)
    _, held = measure(classifier(make_net()), fed)
    assert held.with_images_besides((2,)) == tuple(CLIENTS)


def test_an_app_with_the_mod_refuses_an_objective_that_its_training_does_not_know():
    with pytest.raises(FederationError, match=r"it cannot do the objective 'erase' of the job"):
        forget(engine(Loopback(nodes(app_with_mod()))))


@pytest.mark.parametrize("exclude", [(0, 1), ()])
def test_a_train_function_is_told_what_was_checked_and_not_what_else_a_message_says(exclude):
    """A server that names other classes beside the job would have it train on one image, and send what it learnt."""
    held = make_images(60).take(torch.tensor([*range(0, 51, 3), 1, 4, 2]))  # 17, 2 and 1 of each class
    seen = []
    app = ClientApp(mods=[unlearning_mod(build_model, lambda context: ClientData("a", held))])

    @app.train()
    def _(message, context):
        seen.append(len(held.without(tuple(message.content["config"]["exclude"]))))
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": seen[-1]})}
        return Message(RecordDict(content), reply_to=message)

    Loopback({})  # sets who this process is for Flower
    tensors, text = encode_job(train_job(exclude=exclude))
    config = ConfigRecord({"lr": 9.0, "server-round": 1, "exclude": [0, 1]})
    own = {"arrays": to_arrays(tensors), "config": config, "fedunlearn": ConfigRecord({"job": text})}
    reply = app(Message(RecordDict(own), 5, "train"), Context(1, 5, {}, RecordDict(), {}))
    answer = json.loads(reply.content.config_records["fedunlearn"]["reply"])
    if exclude:
        assert "would stand for fewer than 5 images" in answer["error"]
        assert seen == []
    else:
        assert (answer["error"], answer["images"], seen) == (None, 20, [20])


def test_an_answer_of_a_train_function_that_left_too_much_out_stays_here():
    app = ClientApp(mods=[unlearning_mod(build_model, load_images)])

    @app.train()
    def _(message, context):
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 2})}
        return Message(RecordDict(content), reply_to=message)

    replies, entry = collected(engine(Loopback(nodes() | {100: (app, 0)})), train_job())
    assert "its train function trained on 2 images, fewer than 5, the fewest" in entry.refused["client-0"]
    assert "client-0" not in {reply.client for reply in replies}


def done_counts(done):
    images = make_images(60, seed=4).without((1,))
    reply = handle(
        job(Evaluate(labels=done.model.labels), done.model), done.model.module, ClientData("x", images, images)
    )
    return reply.tensors["correct"], reply.tensors["counts"]


def test_messages_of_others_pass_the_mod_untouched():
    seen = []

    def call_next(message, context):
        seen.append(message)
        return "their reply"

    mod = unlearning_mod(build_model, load_images)
    Loopback({})  # sets who this process is for Flower
    message = Message(RecordDict({"arrays": ArrayRecord()}), 5, "train")
    assert mod(message, None, call_next) == "their reply"
    assert seen == [message]


def test_a_train_function_must_answer_as_flowers_strategies_ask():
    entry = collected(engine(Loopback(nodes() | {100: (app_with_mod(key="count"), 0)})), train_job())[1]
    assert entry.refused["client-0"].startswith("the train function must answer with one ArrayRecord and one metric")


@pytest.mark.parametrize("images", [-5, 0, 10**12, 64.0, float("nan"), [64]])
def test_a_train_functions_number_of_images_is_one_that_a_client_can_hold(images):
    app = ClientApp(mods=[unlearning_mod(build_model, load_images)])

    @app.train()
    def _(message, context):
        content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": images})}
        return Message(RecordDict(content), reply_to=message)

    entry = collected(engine(Loopback(nodes() | {100: (app, 0)})), train_job())[1]
    assert entry.refused["client-0"] == (
        "the train function's metric num-examples must be a whole number of images from 1 to 1000000000, "
        f"got {images!r}: return the number of images that it trained on"
    )


def test_a_train_function_that_answers_with_an_error_is_told(caplog):
    from flwr.app import Error

    app = ClientApp(mods=[unlearning_mod(build_model, load_images)])

    @app.train()
    def _(message, context):
        return Message(Error(7, "no GPU left"), reply_to=message)

    entry = collected(engine(Loopback(nodes() | {100: (app, 0)})), train_job())[1]
    assert entry.refused["client-0"] == "its train function failed, told in the log of this client alone"
    assert "the train function failed: no GPU left" in caplog.text


def test_an_exception_of_a_train_function_is_told_by_its_kind_alone(caplog):
    app = ClientApp(mods=[unlearning_mod(build_model, load_images)])

    @app.train()
    def _(message, context):
        raise ValueError("loss is nan after 7 images")

    entry = collected(engine(Loopback(nodes() | {100: (app, 0)})), train_job())[1]
    assert entry.refused["client-0"] == "ValueError, told in the log of this client alone"
    assert "loss is nan after 7 images" in caplog.text


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        (" \n", "no reason given"),
        ("", "no reason given"),
        ("<class 'fedunlearn.errors.DataError'>:<'a\nb'>", "a b"),
        ("<class 'OSError'>:<\"it's full\">", "it's full"),
    ],
)
def test_what_an_app_raised_is_told_in_one_line_whatever_it_is(reason, told):
    from flwr.app import Error

    def change(message, reply):
        return Message(Error(2, reason), reply_to=message)

    entry = collected(engine(Loopback(nodes() | {100: (answering(change), 0)})), train_job())[1]
    assert entry.refused["client-0"] == f"its app failed: {told}"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (2, "its app failed: OSError: no space left on device"),
        (5, "it is no longer connected"),
        (77, "Flower reports error 77: OSError: no space left on device"),
    ],
)
def test_flowers_own_errors_are_told(code, text):
    from flwr.app import Error

    def change(message, reply):
        return Message(Error(code, "Traceback ...\nOSError: no space left on device\n"), reply_to=message)

    entry = collected(engine(Loopback(nodes() | {100: (answering(change), 0)})), train_job())[1]
    assert entry.refused["client-0"] == text
