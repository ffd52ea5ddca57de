"""Jobs and replies between processes: what arrives is what was sent, or it is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_net
from fedunlearn.channels.plan import PruningPlan, plan_pruning, prune
from fedunlearn.channels.taps import find_taps
from fedunlearn.errors import FederationError, PlanError, RecipeError
from fedunlearn.federation.jobs import Evaluate, Job, Measure, Reestimate, Reply, Train
from fedunlearn.flower.client import cut, spread
from fedunlearn.flower.messages import decode_job, decode_reply, digest_of, encode_job, encode_reply, rebuild
from fedunlearn.training.sgd import Training

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SCORES = {"0": torch.arange(6.0), "3": torch.arange(8.0)}


def pruned_net():
    net = make_net()
    plan = plan_pruning(net, SCORES, fraction=0.5, example=EXAMPLE)
    return prune(net, plan), plan


def jobs():
    net, plan = pruned_net()
    about = {"phase": "some-phase", "round": 3, "model": net, "plan": plan, "seed": 7}
    taps = find_taps(net, ["0", "3"], EXAMPLE, hook="activation")
    return [
        Measure(**about, taps=taps, classes=3, sample=32),
        Measure(**about, taps=taps, classes=3),
        Reestimate(**about, exclude=(1,), sample=4),
        Train(**about, training=Training(0.1, 8, 0.5, augment=("flip",)), lr=0.03, exclude=(0, 2)),
        Evaluate(**about, labels=(0, 2)),
        Evaluate(**about),
    ]


@pytest.mark.parametrize("job", jobs(), ids=lambda job: type(job).__name__)
def test_a_job_arrives_as_it_was_sent_in_a_model_of_the_clients_own(job):
    tensors, text = encode_job(job)
    received = decode_job(tensors, text)
    model = rebuild(received, tensors, lambda: make_net(seed=9))
    arrived = received.job(model)
    assert type(arrived) is type(job)
    for name in {field for field in vars(job) if field != "model"}:
        assert getattr(arrived, name) == getattr(job, name)
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(arrived.model.state_dict()[name], tensor)
    torch.testing.assert_close(model.eval()(EXAMPLE), job.model.eval()(EXAMPLE), rtol=0, atol=0)


def changed(**change):
    tensors, text = encode_job(jobs()[3])
    return tensors, json.dumps(json.loads(text) | change)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": 2}, "expected a job of schema 1, but train.schema: Input should be 1"),
        ({"kind": "shell"}, "expected a job of schema 1, but the message: Input tag 'shell'"),
        ({"run": "rm -rf"}, "expected a job of schema 1, but train.run: Extra inputs are not permitted"),
        ({"lr": -1.0}, "expected a job of schema 1, but train.lr: Input should be greater than 0"),
        ({"spec": "0"}, "the train job of some-phase, round 4, does not fit its tensors"),
        ({"plan": PruningPlan().to_json()}, "plan and weights are not of one model"),
    ],
)
def test_a_job_that_was_changed_is_refused(change, text):
    with pytest.raises(FederationError) as error:
        decode_job(*changed(**change))
    assert text in str(error.value)


def test_what_is_no_job_at_all_is_refused():
    with pytest.raises(FederationError, match="expected a job of schema 1, but the message: Invalid JSON"):
        decode_job({}, "gAN9cQAu")
    with pytest.raises(RecipeError, match="is out of range"):
        decode_job(*changed(training={"lr": 0.0}))


def test_weights_cut_by_another_plan_are_refused():
    tensors, text = encode_job(jobs()[0])
    with pytest.raises(FederationError, match="does not fit its tensors"):
        decode_job(make_net().state_dict(), text)
    received = decode_job(tensors, text)
    with pytest.raises(PlanError, match="another architecture"):
        rebuild(received, tensors, lambda: make_net(colours=3))
    whole, text = encode_job(Evaluate(phase="x", model=make_net()))
    with pytest.raises(FederationError, match="the weights do not fit this client's model after pruning by the plan"):
        rebuild(decode_job(whole, text), whole, lambda: make_net(classes=4))


def test_an_encoded_job_names_nobody_and_holds_no_code():
    job = Job(phase="x", model=make_net(), clients=("client-1",))
    _, text = encode_job(Evaluate(phase="x", model=job.model, clients=("client-1",)))
    assert "client-1" not in text
    with pytest.raises(ValueError, match="kind"):
        encode_job(job)


def test_a_reply_arrives_as_it_was_sent():
    sent = Reply("client-1", {"a": torch.arange(3)}, images=5, samples=9, seconds=0.25)
    got = decode_reply(*encode_reply(sent, "d1"), client="client-1", digest="d1")
    assert vars(got) == vars(sent)


@pytest.mark.parametrize(
    ("client", "digest", "text", "error"),
    [
        ("client-2", "d1", None, "it answered in the name of 'client-1'"),
        ("client-1", "d2", None, "it answered another job: its plan, round or settings are stale"),
        ("client-1", "d1", "{}", "it sent no reply that can be read (client: Field required)"),
        ("client-1", "d1", "]", "it sent no reply that can be read (the message: Invalid JSON"),
    ],
)
def test_a_reply_of_another_or_to_another_job_is_an_error_of_that_client(client, digest, text, error):
    tensors, line = encode_reply(Reply("client-1", {"a": torch.ones(2)}, images=5), "d1")
    got = decode_reply(tensors, text or line, client=client, digest=digest)
    assert got.client == client
    assert got.tensors == {}
    assert error in got.error


def test_digests_differ_as_soon_as_one_setting_does():
    texts = {encode_job(job)[1] for job in jobs()}
    assert len({digest_of(text) for text in texts}) == len(texts) == len(jobs())


@given(st.sets(st.integers(0, 5), min_size=1), st.sets(st.integers(0, 7), min_size=1))
def test_spreading_undoes_cutting_with_zeros_between(first, second):
    kept = {"0.weight": {0: tuple(sorted(first))}, "3.weight": {0: tuple(sorted(second)), 1: tuple(sorted(first))}}
    whole = {name: tensor for name, tensor in make_net().state_dict().items() if name in kept}
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    small = cut(whole, kept)
    again = spread(small, kept, shapes)
    for name, tensor in cut(again, kept).items():
        assert torch.equal(tensor, small[name])
        assert int((again[name] != 0).sum()) == int((small[name] != 0).sum())
        assert torch.equal(again[name][again[name] != 0], whole[name][again[name] != 0])
