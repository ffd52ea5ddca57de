"""Secure aggregation: the sum is right, and it is all that the server can read."""

import copy
import io
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import classifier, collected, job, make_images, make_net
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.plan import Cut
from fedunlearn.channels.scores import Ranking, contrast
from fedunlearn.channels.stats import capped, mean_of_clients
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.errors import FederationError
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import SUM, ClientData, handle
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.measuring import measure
from fedunlearn.federation.rounds import Repair
from fedunlearn.federation.tasks import Measure, Train
from fedunlearn.flower import secure
from fedunlearn.flower.client import add_secure_measure, client_app, unlearning_mod
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.flower.messages import encode_job, life, to_arrays
from fedunlearn.flower.secure import BITS, FRACTION, LIMBS, answer, decode, encode, secure_mod, secure_sum
from fedunlearn.training.compute import Compute
from fedunlearn.training.sgd import Training
from fedunlearn.unlearn import unlearn
from loopback import Loopback, build_model, nodes, same

CLIENTS, _ = hold_out(partition(make_images(140), by="iid", clients=7), 0.0)
STAGES = ("setup", "share_keys", "collect_masked_vectors", "unmask")


def load_images(context):
    name = list(CLIENTS)[context.node_config["partition-id"]]
    return ClientData(name, CLIENTS[name])


APP = client_app(build_model, load_images, secure=True)


MODEL = classifier(make_net())
TAPS = find_channels(MODEL.module, MODEL.example).taps


def measure_job(classes=3, **change):
    return job(Measure(classes=classes), MODEL, phase="measure-0", **change)


def train_job():
    return job(Train(training=Training(0.1), lr=0.1), MODEL, phase="t")


def engine(grid=None, **options):
    grid = grid or Loopback(nodes(APP, 7))
    return FlowerEngine(grid, **({"clients": 7, "deadline": 0.5, "patience": 0.1, "secure": True} | options))


def in_the_clear(names=tuple(CLIENTS)):
    """Return each client's statistics, as the in-process engine gives them."""
    return {reply.client: reply.tensors for reply in LocalEngine(CLIENTS).run(measure_job(clients=tuple(names)))}


def assert_is_sum(tensors, names):
    parts = in_the_clear(names).values()
    for name, tensor in tensors.items():
        expected = torch.stack([part[name].double() for part in parts]).sum(0)
        bound = 0 if name in ("counts", "held") else len(names) * 2.0 ** -(FRACTION + 1)
        assert float((tensor.double() - expected).abs().max()) <= bound


@given(st.lists(st.lists(st.floats(0, 2.0**34), min_size=3, max_size=3), min_size=1, max_size=20))
def test_limbs_add_up_to_the_sum_within_the_bound(rows):
    limbs = [encode(np.array(row)) for row in rows]
    means = [np.mean([own[limb] for own in limbs], axis=0) for limb in range(LIMBS)]
    for own in limbs:
        for limb in own:
            assert np.array_equal(limb, np.round(limb))
            assert limb.min() >= -(2 ** (BITS - 1))
            assert limb.max() < 2 ** (BITS - 1)
    bound = len(rows) * 2.0 ** -(FRACTION + 1)
    assert np.abs(decode(means, len(rows)) - np.sum(rows, axis=0)).max() <= bound + 1e-9 * np.max(rows)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), 2.0**36])
def test_numbers_that_cannot_be_added_up_are_refused(value):
    with pytest.raises(FederationError, match=r"statistics under secure aggregation must lie in 0 \.\."):
        encode(np.array([1.0, value]))


def test_the_server_gets_the_sum():
    replies, entry = collected(engine(), measure_job())
    (reply,) = replies
    assert (reply.client, reply.members) == (SUM, tuple(CLIENTS))
    assert_is_sum(reply.tensors, tuple(CLIENTS))
    assert entry.clients == tuple(CLIENTS)
    assert entry.refused == {}
    assert entry.samples == 140


def test_unlearning_prunes_the_same_channels():
    options = {"forget": 1, "cut": Cut(0.4), "repair": Repair(Training(0.1, 8)), "rank": Ranking(contrast)}
    mine = unlearn(make_net(), Federation(LocalEngine(CLIENTS)), **options)
    journal = Journal()
    other = unlearn(make_net(), Federation(engine(), journal), **options)
    assert mine.model.plan == other.model.plan
    assert same(mine.model.module, other.model.module)
    assert other.clients == tuple(CLIENTS)
    silent = engine()
    silent._grid.nodes = {}
    again = unlearn(make_net(), Federation(silent, journal), **options)  # read back, not asked again
    assert torch.equal(again.stats.counts, mine.stats.counts)
    assert same(again.model.module, mine.model.module)


class Wiretap(Loopback):
    """Keeps what the server sends and sees."""

    def __init__(self, apps):
        super().__init__(apps)
        self.sent, self.seen = [], []

    def push_messages(self, messages):
        messages = list(messages)
        self.sent += [copy.deepcopy(message) for message in messages]
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        found = super().pull_messages(message_ids)
        self.seen += [copy.deepcopy(message) for message in found]
        return found


def masked_vectors(grid):
    """Return each node's masked vectors, as the server saw them."""
    vectors = {}
    for message in grid.seen:
        own = message.content.config_records.get("secaggplus_configs", {})
        if "masked_params" in own:
            parts = [np.load(io.BytesIO(part), allow_pickle=False) for part in own["masked_params"]]
            vectors[message.metadata.src_node_id] = np.concatenate([part.ravel() for part in parts[1:]])
    return vectors


def test_the_server_sees_masked_statistics_only():
    grid = Wiretap(nodes(APP, 7))
    chosen = engine(grid)
    grid.seen.clear()
    chosen.run(measure_job())
    allowed = {
        "setup": {"pk1", "pk2"},
        "share_keys": {"dsts", "ctxts"},
        "collect_masked_vectors": {"masked_params"},
        "unmask": {"nids", "shares"},
    }
    stages = []
    for message in grid.seen:
        keys = set(message.content.config_records["secaggplus_configs"])
        stages += [stage for stage, names in allowed.items() if keys == names]
        # Beside the protocol's own fields there is nothing: no array, no count of images, no word.
        for name, record in message.content.array_records.items():
            assert len(record) == 0, name
        for name, record in message.content.metric_records.items():
            assert (name, dict(record)) == ("fitres.num_examples", {"num_examples": 1})
        for name, record in message.content.config_records.items():
            if name != "secaggplus_configs":
                assert dict(record) in ({}, {"code": 0, "message": ""}), name
    assert stages == [stage for stage in STAGES for _ in range(7)]
    plain = {
        100 + k: np.concatenate([limb.ravel() for _, t in sorted(own.items()) for limb in encode(t.numpy())]) + 2.0**29
        for k, own in enumerate(in_the_clear().values())
    }
    vectors = masked_vectors(grid)
    assert vectors.keys() == plain.keys()
    for node, vector in vectors.items():
        assert len(vector) == len(plain[node])
        assert not np.any(vector == plain[node])
        assert abs(np.corrcoef(vector, plain[node])[0, 1]) < 0.55
    masked = np.concatenate(list(vectors.values()))
    assert masked.min() >= 0 and masked.max() < 2**48
    # Uniform below the modulus: 16 bins, 15 degrees of freedom, chi-square above 50 once in 10^5 runs.
    for bits in (44, 20, 0):
        counts = np.bincount((masked >> bits) & 15, minlength=16)
        assert ((counts - len(masked) / 16) ** 2 / (len(masked) / 16)).sum() < 50
    # One client's masks do not repeat, so its statistics cannot be had by asking twice.
    first = vectors
    grid.seen.clear()
    chosen.run(measure_job())
    assert all(not np.any(vector == first[node]) for node, vector in masked_vectors(grid).items())


def failing_at(stage, *, silent):
    """Return an app that is lost at a stage."""

    def app(message, context):
        terms = message.content.config_records.get("secaggplus_configs", {})
        if terms.get("stage") == stage:
            return None if silent else Message(Error(2, "the site lost power"), reply_to=message)
        return APP(message, context)

    return app


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_clients_lost_at_any_stage_are_tolerated(stage, silent):
    lost = {101: (failing_at(stage, silent=silent), 1), 104: (failing_at(stage, silent=silent), 4)}
    replies, entry = collected(engine(Loopback(nodes(APP, 7) | lost)), measure_job())
    # Who is lost after it sent its masked numbers is in the sum all the same: the others remove its mask.
    inside = tuple(CLIENTS) if stage == "unmask" else ("client-0", "client-2", "client-3", "client-5", "client-6")
    assert replies[0].members == inside
    assert_is_sum(replies[0].tensors, inside)
    said = "it gave no answer within 0.5 s" if silent else "its app failed: the site lost power"
    lost = [name for name in CLIENTS if name not in inside]
    assert entry.refused == dict.fromkeys(lost, f"it is not in the secure sum: {said}")


def test_with_most_clients_lost_there_is_no_sum():
    lost = {100 + k: (failing_at("collect_masked_vectors", silent=True), k) for k in range(3)}
    with pytest.raises(FederationError, match="fewer than 5 of 7 clients went through all its stages"):
        collected(engine(Loopback(nodes(APP, 7) | lost)), measure_job())


def answering(change):
    """Return an app whose statistics are what ``change`` makes of them."""
    app = ClientApp()
    app.train()(APP)

    @app.train("measure", mods=[secure_mod])
    def measure_otherwise(message, context):
        return answer(change({"counts": torch.ones(3)}), message)

    return app


def test_a_client_whose_numbers_cannot_be_added_drops_out_and_says_so():
    bad = answering(lambda own: own | {"counts": torch.tensor([float("nan")])})
    replies, entry = collected(engine(Loopback(nodes(APP, 7) | {102: (bad, 2)})), measure_job())
    assert list(entry.refused) == ["client-2"]
    assert "statistics under secure aggregation must lie in 0" in entry.refused["client-2"]
    assert_is_sum(replies[0].tensors, replies[0].members)


def test_statistics_that_do_not_fit_the_others_are_an_error_not_a_wrong_sum():
    odd = answering(lambda own: own)
    # Which of the two it is depends on the order in which the vectors are added up.
    either = r"secure aggregation (failed: a client's answer does not fit|gave 1 arrays, expected 4)"
    with pytest.raises(FederationError, match=either):
        collected(engine(Loopback(nodes(APP, 7) | {102: (odd, 2)})), measure_job())
    with pytest.raises(FederationError, match="secure aggregation gave 1 arrays, expected 4"):
        collected(engine(Loopback(nodes(odd, 7))), measure_job())


def test_an_answer_that_is_none_of_the_protocols_ends_the_sum():
    def mute(message, context):
        own = "secaggplus_configs" in message.content.config_records
        return Message(RecordDict(), reply_to=message) if own else APP(message, context)

    with pytest.raises(FederationError, match="secure aggregation failed: a client's answer does not fit"):
        collected(engine(Loopback(nodes(APP, 7) | {102: (mute, 2)})), measure_job())


def test_nothing_but_measure_goes_under_secure_aggregation():
    grid = Wiretap(nodes(APP, 7))
    tensors, text = encode_job(train_job())
    content = RecordDict({"arrays": to_arrays(tensors), "fedunlearn": ConfigRecord({"job": text})})
    with pytest.raises(FederationError, match="fewer than 5 of 7 clients"):
        secure_sum(grid, {f"c{k}": 100 + k for k in range(7)}, content, ["counts"], deadline=1.0)
    failures = [message.error.reason for message in grid.seen if message.has_error()]
    assert len(failures) == 7
    assert all("expected a measure job under secure aggregation, got train" in why for why in failures)


def test_fewer_than_three_clients_have_nothing_to_hide_behind():
    with pytest.raises(FederationError, match="secure aggregation needs at least 3 clients, got 2"):
        collected(engine(Loopback(nodes(APP, 2)), clients=2), measure_job())


def test_a_client_under_secure_aggregation_answers_no_plain_measure():
    with pytest.raises(FederationError, match="this client reports statistics under secure aggregation only"):
        collected(engine(secure=False), measure_job())
    assert collected(engine(), train_job())[1].refused == {}


def test_an_app_with_the_mod_reports_under_secure_aggregation_too():
    app = ClientApp(mods=[unlearning_mod(build_model, load_images, secure=True)])
    app.train()(lambda message, context: None)
    add_secure_measure(app, build_model, load_images)
    replies, _ = collected(engine(Loopback(nodes(app, 7))), measure_job())
    assert_is_sum(replies[0].tensors, tuple(CLIENTS))


TERMS = {
    "stage": "setup",
    "sample_num": 5,
    "share_num": 5,
    "threshold": 4,
    "target_range": 2**30,
    "clipping_range": 2.0**29,
    "mod_range": 2**48,
    "max_weight": 1.0,
}


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        (None, "this client reports statistics under secure aggregation only"),
        (
            TERMS | {"sample_num": 2, "share_num": 2, "threshold": 2},
            "of 2 clients with threshold 2 is refused: expected 3",
        ),
        (
            TERMS | {"sample_num": 2**18, "share_num": 2**18, "threshold": 2 * 2**18 // 3 + 1},
            "secure aggregation of 262144 clients with threshold 174763 is refused: expected 3 to 262143 clients",
        ),
        (TERMS | {"threshold": 3}, "secure aggregation of 5 clients with threshold 3 is refused"),
        (TERMS | {"mod_range": 2}, "secure aggregation is refused: expected the terms {'target_range'"),
        (
            {"stage": "unmask", "active_nids": [1, 2, 3], "dead_nids": [4]},
            "unmasking is refused: expected each node that shared its keys once",
        ),
        (
            {"stage": "collect_masked_vectors", "srcs": [101, 102, 101], "ctxts": [b"", b"", b""]},
            "masking is refused: expected each other node once, and one comes twice",
        ),
    ],
)
def test_terms_that_would_reveal_one_client_are_refused(terms, text):
    Loopback({})  # sets who this process is for Flower
    records = {} if terms is None else {"secaggplus_configs": ConfigRecord(terms)}
    message = Message(RecordDict(records), 100, "train.measure")
    with pytest.raises(FederationError) as error:
        APP(message, Context(1, 100, {"partition-id": 0}, RecordDict(), {}))
    assert text in str(error.value)


def unmasking(active, dead):
    """Return what a client answers that went through the stages with six others and is sent these lists at the end."""
    grid, keys, shares = Loopback(nodes(APP, 7)), {}, {}
    nobody = {"target_range": 2**30, "clipping_range": 2.0**29, "mod_range": 2**48, "max_weight": 1.0}

    def sent(node, stage, terms, records=()):
        own = RecordDict({"secaggplus_configs": ConfigRecord(terms | {"stage": stage}), **dict(records)})
        (reply,) = grid.send_and_receive([Message(own, node, "train.measure")])
        return reply if reply.has_error() else reply.content.config_records["secaggplus_configs"]

    for node in grid.nodes:
        own = sent(node, "setup", nobody | {"sample_num": 7, "share_num": 7, "threshold": 5})
        keys[str(node)] = [own["pk1"], own["pk2"]]
    for node in grid.nodes:
        own = sent(node, "share_keys", keys)
        shares |= {(node, to): text for to, text in zip(own["dsts"], own["ctxts"])}
    tensors, text = encode_job(measure_job())
    records = {"arrays": to_arrays(tensors), "fedunlearn": ConfigRecord({"job": text})}
    others = [node for node in grid.nodes if node != 100]
    terms = {"srcs": others, "ctxts": [shares[node, 100] for node in others]}
    assert "masked_params" in sent(100, "collect_masked_vectors", terms, records)
    return sent(100, "unmask", {"active_nids": active, "dead_nids": dead})


@pytest.mark.parametrize(
    ("active", "dead"),
    [
        ([101, 102, 103, 104, 105], [100, 106]),  # itself lost
        ([100, 101, 102, 103, 104], [104, 105, 106]),  # both shares of one
        ([100, 101, 102, 103, 104], []),  # two that are neither
        ([100, 101, 102, 103, 103], [105, 106]),  # one in the place of another
        ([100, 101, 102, 103], [104, 105, 106]),  # too few
    ],
)
def test_a_client_gives_its_shares_for_the_lists_of_an_honest_server_alone(active, dead):
    assert "expected each node that shared its keys once" in unmasking(active, dead).error.reason
    assert len(unmasking([100, 101, 102, 103, 104], [105, 106])["shares"]) == 7


def test_lists_that_differ_from_client_to_client_are_not_enough_to_unmask_one():
    """One client told of ``t - 1`` others has the masks of these alone, and ``t`` shares of each key undo them.

    All give ``n (n - t)`` shares of keys at most, as each has ``t`` present.
    """
    for clients in range(3, 1000):
        least = secure._threshold(clients)
        assert clients * (clients - least) < least * (least - 1)


@pytest.mark.parametrize("pooling", [mean_of_clients, capped(2.0)], ids=["mean_of_clients", "influence"])
def test_what_needs_each_clients_statistics_is_refused(pooling):
    with pytest.raises(FederationError, match="only the sum of the statistics is known"):
        measure(MODEL, Federation(engine()), pooling=pooling)


def test_sums_that_overlap_have_strong_masks_to_the_last_and_others_keep_flowers():
    module = "flwr.client.mod.secure_aggregation.secaggplus_mod"
    theirs = sys.modules[module]
    weak, ask = theirs.pseudo_rand_gen, (b"a" * 44, 2**48, [(9,)])
    strong = secure._masks(*ask)[0]
    one, two = secure._strong_masks(module), secure._strong_masks(module)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert np.array_equal(theirs.pseudo_rand_gen(*ask)[0], strong)
    with ThreadPoolExecutor(1) as pool:  # an app of another kind beside ours
        other = pool.submit(lambda: theirs.pseudo_rand_gen(*ask)[0]).result()
    assert np.array_equal(other, weak(*ask)[0])
    two.__exit__(None, None, None)
    assert theirs.pseudo_rand_gen is weak


def test_masks_come_from_the_whole_secret_and_flower_is_left_as_it_was(monkeypatch):
    theirs = sys.modules["flwr.client.mod.secure_aggregation.secaggplus_mod"]
    weak, seeds = theirs.pseudo_rand_gen, []

    def recorded(seed, num_range, dimensions):
        seeds.append(seed)
        return masks(seed, num_range, dimensions)

    masks = secure._masks
    monkeypatch.setattr(secure, "_masks", recorded)
    collected(engine(), measure_job())
    assert theirs.pseudo_rand_gen is weak
    assert len(set(seeds)) >= 7 + 21  # a private one per client, one per pair
    assert min(len(seed) for seed in seeds) >= 32
    ours, other = (masks(seed, 2**48, [(1000,)])[0] for seed in (b"a" * 43, b"a" * 42 + b"b"))
    assert not np.any(ours == other)  # the last letter matters, too
    assert np.array_equal(ours, masks(b"a" * 43, 2**48, [(1000,)])[0])


def test_a_client_keeps_no_key_of_a_sum_that_is_over():
    grid = Loopback(nodes(APP, 7) | {101: (failing_at("unmask", silent=False), 1)})
    collected(engine(grid), measure_job())
    for node in (100, 102, 103, 104, 105, 106):
        assert "secaggplus_state" not in grid.contexts[node].state.config_records


def test_keys_of_a_sum_that_stopped_are_gone_with_the_next_job():
    lost = {100 + k: (failing_at("collect_masked_vectors", silent=True), k) for k in range(3)}
    grid = Loopback(nodes(APP, 7) | lost)
    chosen = engine(grid)
    with pytest.raises(FederationError, match="fewer than 5 of 7"):
        chosen.run(measure_job())
    assert "secaggplus_state" in grid.contexts[105].state.config_records
    chosen.run(train_job())
    assert all("secaggplus_state" not in context.state.config_records for context in grid.contexts.values())


def test_a_client_measures_as_it_computes_under_secure_aggregation_too():
    compute = Compute(precision="bfloat16")
    app = client_app(build_model, load_images, secure=True, compute=compute)
    ((reply, *_), _) = collected(engine(Loopback(nodes(app, 7))), measure_job())
    plain = [own.tensors for own in LocalEngine(CLIENTS, compute=compute).run(measure_job())]
    expected = torch.stack([own["sums.0"] for own in plain]).sum(0)
    assert float((reply.tensors["sums.0"] - expected).abs().max()) <= 7 * 2.0 ** -(FRACTION + 1)
    assert not torch.allclose(expected, torch.stack([own["sums.0"] for own in in_the_clear().values()]).sum(0))


def test_a_client_that_measures_nothing_it_knows_is_left_out():
    reply = handle(measure_job(classes=2), make_net(), ClientData("x", CLIENTS["client-0"]))
    assert "the job is for 2 classes, this client has 3" in reply.error
    grid = Wiretap(nodes(APP, 7))
    with pytest.raises(
        FederationError, match=r"fewer than 5 of 7 .*; client-4: its app failed: FederationError: the job is"
    ):
        engine(grid).run(measure_job(classes=2))
    failures = [message.error.reason for message in grid.seen if message.has_error()]
    assert len(failures) == 7
    assert all("the job is for 2 classes, this client has 3" in why for why in failures)


@pytest.mark.parametrize(
    "terms", [{"max_weight": 2.0}, {"clipping_range": 8.0}, {"target_range": 2**20}, {"share_num": 4}]
)
def test_terms_of_another_weight_range_or_number_of_shares_are_refused(terms):
    Loopback({})
    message = Message(RecordDict({"secaggplus_configs": ConfigRecord(TERMS | terms)}), 100, "train.measure")
    with pytest.raises(FederationError, match=r"secure aggregation (of 5 clients with threshold 4 )?is refused"):
        APP(message, Context(1, 100, {"partition-id": 0}, RecordDict(), {}))


def test_a_client_that_refuses_keeps_no_keys():
    bad = answering(lambda own: own | {"counts": torch.tensor([float("nan")])})
    grid = Loopback(nodes(APP, 7) | {102: (bad, 2)})
    collected(engine(grid), measure_job())
    assert "secaggplus_state" not in grid.contexts[102].state.config_records


def test_messages_of_a_secure_sum_live_as_long_as_its_deadline_says():
    grid = Wiretap(nodes(APP, 7))
    chosen = engine(grid)
    grid.sent.clear()
    chosen.run(measure_job())
    assert [message.metadata.ttl for message in grid.sent] == [life(0.5, 7)] * 28


def test_sums_go_to_their_layers_in_whatever_order_these_are_named():
    def build(context=None):
        torch.manual_seed(0)
        layers = {"z": nn.Conv2d(1, 4, 3), "r": nn.ReLU(), "a": nn.Conv2d(4, 4, 3), "s": nn.ReLU()}
        layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "head": nn.Linear(4, 3)}
        return nn.Sequential(OrderedDict(layers))

    app = client_app(build, load_images, secure=True)
    asked = job(Measure(classes=3), build(), phase="measure-0")
    ((reply,), _) = collected(engine(Loopback(nodes(app, 7))), asked)
    plain = [own.tensors for own in LocalEngine(CLIENTS).run(asked)]
    for name in ("sums.z", "sums.a"):
        expected = torch.stack([own[name].double() for own in plain]).sum(0)
        assert float((reply.tensors[name] - expected).abs().max()) <= 7 * 2.0 ** -(FRACTION + 1)
