"""Jobs and replies between processes: what arrives is what was sent, or it is refused."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import classifier, job, make_net
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.plan import Cut, PruningPlan, plan_pruning
from fedunlearn.errors import FederationError, PlanError, RecipeError
from fedunlearn.federation.jobs import Reply
from fedunlearn.federation.sums import Gradients, Moments
from fedunlearn.federation.tasks import TASKS, Evaluate, Measure, Reestimate, Train
from fedunlearn.flower.client import cut, spread
from fedunlearn.flower.messages import decode_job, decode_reply, digest_of, encode_job, encode_reply, rebuild, spec_of
from fedunlearn.training.objectives.ascend import Ascend
from fedunlearn.training.objectives.distil import Distil
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.objectives.relabel import Relabel
from fedunlearn.training.objectives.scrub import Scrub
from fedunlearn.training.objectives.sparse import Sparse
from fedunlearn.training.objectives.table import OBJECTIVES
from fedunlearn.training.sgd import Training

SCORES = {"0": torch.arange(6.0), "3": torch.arange(8.0)}


def pruned():
    whole = classifier(make_net())
    channels = find_channels(whole.module, whole.example)
    return whole.cut(plan_pruning(channels, SCORES, Cut(0.5)))


def jobs():
    model = pruned()
    tasks = [
        Measure(hook="convolution", classes=3, sample=32),
        Measure(classes=3),
        Reestimate(exclude=(1,), sample=4),
        Train(training=Training(0.1, 8, 0.5, augment=("flip",)), lr=0.03, exclude=(0, 2)),
        Train(training=Training(0.1, objective=Erasing(separation=0.1, until=0.5, every=3)), lr=0.03, exclude=(2,)),
        *(
            Train(training=Training(0.1, objective=objective), lr=0.03, exclude=(2,))
            for objective in (
                Sparse(1e-3, 0.5),
                Ascend(0.9, 0.5),
                Relabel("likeliest", 0.5),
                Distil(),
                Scrub(0.5, 4.0, 5, 4, 0.3, 0.5),
            )
        ),
        Gradients(squared=True, exclude=(1,), sample=4),
        Moments(exclude=(1,), sample=4),
        Evaluate(labels=(0, 2)),
        Evaluate(),
    ]

    return [job(task, model, phase="some-phase", round=3, seed=7) for task in tasks]


def test_every_kind_of_task_is_here():
    assert {type(own.task) for own in jobs()} == set(TASKS)


def test_every_objective_is_here():
    sent = {type(own.task.training.objective) for own in jobs() if isinstance(own.task, Train)}
    assert sent - {type(None)} == set(OBJECTIVES)


@pytest.mark.parametrize("sent", jobs(), ids=lambda sent: sent.task.kind)
def test_a_job_arrives_as_it_was_sent_in_a_model_of_the_clients_own(sent):
    tensors, text = encode_job(sent)
    received = decode_job(tensors, text)
    assert received.key == ("some-phase", 3, 7)
    arrived = received.job(rebuild(received, tensors, classifier(make_net(seed=9))))
    assert type(arrived.task) is type(sent.task)
    assert vars(arrived.task) == vars(sent.task)
    for name in {field for field in vars(sent) if field not in ("model", "task")}:
        assert getattr(arrived, name) == getattr(sent, name)
    assert arrived.model.plan == sent.model.plan
    for name, tensor in sent.model.module.state_dict().items():
        assert torch.equal(arrived.model.module.state_dict()[name], tensor)
    example = sent.model.example
    torch.testing.assert_close(arrived.model.module.eval()(example), sent.model.module.eval()(example), rtol=0, atol=0)


TRAIN = jobs()[3]


def changed(task=(), **change):
    """Return a train job in whose message something is otherwise."""
    tensors, text = encode_job(TRAIN)
    message = json.loads(text) | change
    return tensors, json.dumps(message | {"task": message["task"] | dict(task)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": 1}, "expected a job of schema 3, but schema: Input should be 3"),
        ({"schema": 2}, "expected a job of schema 3, but schema: Input should be 3"),
        ({"task": {"kind": "shell"}}, "expected a job of schema 3, but task: Input tag 'shell'"),
        ({"run": "rm -rf"}, "expected a job of schema 3, but run: Extra inputs are not permitted"),
        ({"task": {"run": "rm -rf"}}, "expected a job of schema 3, but task.train.run: Unexpected keyword argument"),
        ({"task": {"lr": -1.0}}, "expected a job of schema 3, but task.train.lr: Input should be greater than 0"),
        ({"round": -1}, "expected a job of schema 3, but round: Input should be greater than or equal to 0"),
        ({"spec": "0"}, "the train job of some-phase, round 4, does not fit its tensors"),
        ({"plan": PruningPlan().to_json()}, "plan and weights are not of one model"),
    ],
)
def test_a_job_that_was_changed_is_refused(change, text):
    with pytest.raises(FederationError) as error:
        decode_job(*changed(**change))
    assert text in str(error.value)


@pytest.mark.parametrize("name", ["exclude", "lr", "training.momentum"])
def test_a_field_that_was_not_sent_gets_no_default(name):
    tensors, text = encode_job(TRAIN)
    message = json.loads(text)
    *path, last = name.split(".")
    place = message["task"]
    for step in path:
        place = place[step]
    del place[last]
    with pytest.raises(FederationError, match=rf"expected a job of schema 3, but .*{name}"):
        decode_job(tensors, json.dumps(message))


def test_a_message_of_the_schema_before_is_refused():
    tensors, text = encode_job(TRAIN)
    message = json.loads(text)
    before = message.pop("task") | message | {"schema": 1}
    with pytest.raises(FederationError, match=r"expected a job of schema 3, but schema: Input should be 3"):
        decode_job(tensors, json.dumps(before))


def test_what_is_no_job_at_all_is_refused():
    with pytest.raises(FederationError, match="expected a job of schema 3, but the message: Invalid JSON"):
        decode_job({}, "gAN9cQAu")
    with pytest.raises(RecipeError, match="is out of range"):
        decode_job(*changed({"training": {"lr": 0.0}}))


def test_a_plan_that_is_none_is_refused():
    with pytest.raises(PlanError, match="expected a pruning plan as JSON"):
        decode_job(*with_plan("not a plan"))


def with_plan(plan):
    """Return a train job whose spec fits a plan that is none."""
    tensors, _ = encode_job(TRAIN)
    return changed(plan=plan, spec=spec_of(plan, tensors))


def test_weights_cut_by_another_plan_are_refused():
    tensors, text = encode_job(jobs()[0])
    with pytest.raises(FederationError, match="does not fit its tensors"):
        decode_job(make_net().state_dict(), text)
    received = decode_job(tensors, text)
    with pytest.raises(PlanError, match="another architecture"):
        rebuild(received, tensors, classifier(make_net(colours=3), (3, 8, 8)))
    whole, text = encode_job(job(Evaluate(), make_net(), phase="x"))
    with pytest.raises(FederationError, match="the weights do not fit this client's model after pruning by the plan"):
        rebuild(decode_job(whole, text), whole, classifier(make_net(classes=4)))


def test_a_rebuilt_model_leaves_the_clients_own_alone():
    own = classifier(make_net(seed=9))
    before = {name: tensor.clone() for name, tensor in own.module.state_dict().items()}
    tensors, text = encode_job(TRAIN)
    rebuild(decode_job(tensors, text), tensors, own)
    assert own.plan == PruningPlan()
    assert all(torch.equal(before[name], tensor) for name, tensor in own.module.state_dict().items())


class Shell:
    """A task that no message can ask for."""

    kind = "shell"


def test_an_encoded_job_names_nobody_and_holds_no_code():
    _, text = encode_job(job(Evaluate(), make_net(), clients=("client-1",)))
    assert "client-1" not in text
    with pytest.raises(ValueError, match="Input tag 'shell'"):
        encode_job(job(Shell(), make_net()))


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


@pytest.mark.parametrize(("field", "value"), [("samples", 10**10), ("seconds", 1e308)])
def test_a_reply_that_claims_more_than_can_be_is_not_read(field, value):
    tensors, line = encode_reply(Reply("client-1", {"a": torch.ones(2)}, images=5), "d1")
    got = decode_reply(tensors, json.dumps(json.loads(line) | {field: value}), client="client-1", digest="d1")
    assert f"it sent no reply that can be read ({field}: Input should be less than or equal to 1" in got.error


def test_digests_differ_as_soon_as_one_setting_does():
    texts = {encode_job(own)[1] for own in jobs()}
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


def test_tensors_of_another_kind_than_the_text_says_are_refused():
    tensors, text = encode_job(TRAIN)
    with pytest.raises(FederationError, match="does not fit its tensors"):
        decode_job({name: tensor.double() for name, tensor in tensors.items()}, text)
