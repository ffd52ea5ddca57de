"""Messages and files that anybody changed: refused in one line, or read as what they say. No traceback, no code run.

By hand with many more examples, of folders of pictures too:
FEDUNLEARN_EXAMPLES=10000 pytest --timeout=0 tests/test_mutations.py tests/test_folders.py
"""

import copy
import json

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import EXAMPLES, classifier, job, make_images, make_net
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.plan import Cut, plan_pruning
from fedunlearn.checkpoint import load_weights, read_weights, save_checkpoint
from fedunlearn.errors import FederationError, FedUnlearnError, ModelError
from fedunlearn.federation.ask import refusal
from fedunlearn.federation.jobs import Reply
from fedunlearn.federation.tasks import Evaluate, Measure, Reestimate, Train
from fedunlearn.flower.client import client_app
from fedunlearn.flower.engine import _read_reply
from fedunlearn.flower.messages import (
    ARRAYS,
    OWN,
    decode_job,
    encode_job,
    encode_reply,
    rebuild,
    sent_job,
    spec_of,
    to_arrays,
)
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.sgd import Training
from loopback import Loopback, build_model, load_images

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -1, 2**63, 0.5]),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    SCALARS, lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=5), own), max_leaves=5
)
TYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int8, torch.bool]
WHOLE = classifier(make_net())
MODEL = WHOLE.cut(
    plan_pruning(find_channels(WHOLE.module, WHOLE.example), {"0": torch.arange(6.0), "3": torch.arange(8.0)}, Cut(0.5))
)
JOBS = [
    job(task, MODEL, phase="some-phase", round=3, seed=7)
    for task in (
        Measure(classes=3, sample=32),
        Reestimate(exclude=(1,), sample=8),
        Train(training=Training(0.1, 8, 0.5, augment=("flip",)), lr=0.03, exclude=(0, 2)),
        Train(training=Training(0.1, 8, objective=Erasing(separation=0.1)), lr=0.03, exclude=(2,)),
        Evaluate(labels=(0, 1, 2)),
    )
]


def places(value, path=()):
    """Return the path of each value within JSON values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, own in inner for place in places(own, (*path, key)))]


@st.composite
def mutated_json(draw, value):
    """Return JSON values of which one place or two are other values, missing, or have an entry beside them."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([place for place in places(value) if place]))
        parent = value
        for step in path:
            parent = parent[step]
        how = draw(st.sampled_from(("set", "drop", "add")))
        if how == "drop":
            del parent[last]
        elif how == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            parent[last] = draw(VALUES)
        if not places(value)[1:]:
            break
    return value


@st.composite
def mutated_tensors(draw, tensors):
    """Return tensors of which one or none is missing, of another shape or type, not finite, or has another name."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if not tensors or draw(st.booleans()):
        return tensors
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(("drop", "rename", "type", "shape", "value", "negative")))
    tensor = tensors.pop(name)
    if how == "rename":
        tensors[draw(st.text(min_size=1, max_size=8))] = tensor
    elif how == "type":
        tensors[name] = tensor.to(draw(st.sampled_from(TYPES)))
    elif how == "shape":
        tensors[name] = torch.zeros(draw(st.lists(st.integers(0, 4), max_size=4)), dtype=tensor.dtype)
    elif how == "value":
        value = draw(st.sampled_from((float("nan"), float("inf"), 1e300)))
        tensors[name] = torch.full(tensor.shape, value, dtype=torch.float64).to(tensor.dtype)
    elif how == "negative":
        tensors[name] = -tensor - 1
    return tensors


def one_line(text):
    assert text.strip()
    assert text.isprintable()


@settings(max_examples=EXAMPLES)
@given(st.sampled_from(JOBS), st.data())
def test_a_changed_job_is_refused_in_one_line_or_is_a_job_on_a_model_that_runs(sent, data):
    tensors, text = encode_job(sent)
    message = json.loads(text)
    if data.draw(st.booleans()):
        message["plan"] = json.dumps(data.draw(mutated_json(json.loads(message["plan"]))))
    else:
        message = data.draw(mutated_json(message))
    tensors = data.draw(mutated_tensors(tensors))
    if data.draw(st.booleans()) and isinstance(message.get("plan"), str):
        message["spec"] = spec_of(message["plan"], tensors)  # as somebody who knows how would
    try:
        received = decode_job(tensors, json.dumps(message))
        model = rebuild(received, tensors, classifier(make_net(seed=9)))
    except FedUnlearnError as error:
        one_line(str(error))
        return
    assert isinstance(received.task, (Measure, Reestimate, Train, Evaluate))
    assert model.module.eval()(model.example).shape == (2, model.rows)


@settings(max_examples=EXAMPLES)
@given(st.binary(max_size=200) | st.text(max_size=200) | VALUES.map(json.dumps))
def test_what_is_no_job_is_refused_in_one_line(text):
    with pytest.raises(FedUnlearnError) as told:
        decode_job({}, text if isinstance(text, str) else text.decode("latin-1"))
    one_line(str(told.value))


@settings(max_examples=EXAMPLES)
@given(st.sampled_from(JOBS), st.data())
def test_a_changed_reply_is_refused_in_one_line_or_has_the_layout_that_was_asked(sent, data):
    expected = sent.task.layout(sent.model)
    tensors = data.draw(
        mutated_tensors({name: torch.ones(shape, dtype=own) for name, (shape, own) in expected.items()})
    )
    arrays, line = encode_reply(Reply("client-1", tensors, 9, 9, 0.5), "d1")
    if data.draw(st.booleans()):
        line = json.dumps(data.draw(mutated_json(json.loads(line))))
    content = RecordDict({ARRAYS: to_arrays(arrays), OWN: ConfigRecord({"reply": line})})
    if data.draw(st.booleans()):
        content[ARRAYS] = ArrayRecord({**content[ARRAYS], data.draw(st.text(max_size=5)): data.draw(ARRAYS_OF_NOTHING)})
    if data.draw(st.integers(0, 9)) == 0:
        del content[data.draw(st.sampled_from((ARRAYS, OWN)))]
    Loopback({})  # Flower's messages need a run to be of
    reply = _read_reply(Message(content, 1, "train"), "client-1", "d1")
    assert reply.client == "client-1"
    why = refusal(reply, sent, expected)
    if why is None:
        assert {name: (tuple(own.shape), own.dtype) for name, own in reply.tensors.items()} == dict(expected)
        assert all(bool(torch.isfinite(own).all()) for own in reply.tensors.values())
    else:
        one_line(why)


# Flower's arrays say themselves what they hold: none of it need be true.
ARRAYS_OF_NOTHING = st.builds(
    Array,
    dtype=st.sampled_from(("float32", "object", "|O", "nothing", "V8", "U3")),
    shape=st.lists(st.integers(-1, 10**9), max_size=3).map(tuple),
    stype=st.sampled_from(("numpy.ndarray", "pickle", "")),
    data=st.binary(max_size=60),
)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_client_answers_a_message_of_any_kind_in_one_line(data):
    tensors, text = encode_job(JOBS[0])
    content = RecordDict({ARRAYS: to_arrays(tensors), OWN: ConfigRecord({"job": text})})
    if data.draw(st.booleans()):
        content[ARRAYS] = ArrayRecord({**content[ARRAYS], data.draw(st.text(max_size=5)): data.draw(ARRAYS_OF_NOTHING)})
    else:
        content[OWN] = ConfigRecord(
            data.draw(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.booleans()))
        )
    if data.draw(st.booleans()):
        del content[ARRAYS]
    grid = Loopback({100: (client_app(build_model, load_images), 0)})
    (answer,) = grid.send_and_receive([Message(content, 100, "train")])
    assert not answer.has_error(), answer.error.reason
    own = answer.content.config_records[OWN]
    if "reply" in own:
        why = json.loads(own["reply"])["error"]
        one_line(why)


def test_a_message_without_a_job_is_told_so():
    Loopback({})
    with pytest.raises(FederationError, match=r"the message holds no job that can be read \(KeyError: 'arrays'\)"):
        sent_job(Message(RecordDict({OWN: ConfigRecord({})}), 1, "train"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return the path of a written checkpoint and its bytes."""
    path = tmp_path_factory.mktemp("changed") / "model.safetensors"
    save_checkpoint(path, MODEL, images=make_images(), architecture={"name": "net", "shortcut": "A"})
    return path, path.read_bytes()


def loaded_or_refused(path):
    try:
        model = load_weights(classifier(make_net(seed=9)), read_weights(path))
    except ModelError as error:
        told = str(error)
    else:
        assert model.module.eval()(model.example).shape == (2, model.rows)
        assert all(bool(torch.isfinite(own).all()) for own in model.module.state_dict().values())
        return
    one_line(told)
    assert str(path) in told


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_checkpoint_of_changed_bytes_is_refused_in_one_line_or_fits(checkpoint, data):
    path, whole = checkpoint
    changed = bytearray(whole)
    header = int.from_bytes(whole[:8], "little") + 8
    for place, value in data.draw(
        st.lists(
            st.tuples(st.integers(0, header - 1) | st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=6
        )
    ):
        changed[place] = value
    path.write_bytes(changed[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])
    loaded_or_refused(path)


@settings(max_examples=EXAMPLES)
@given(st.data())
def test_a_checkpoint_that_says_other_things_is_refused_in_one_line_or_fits(checkpoint, data):
    path, whole = checkpoint
    end = int.from_bytes(whole[:8], "little") + 8
    header = json.loads(whole[8:end])
    about = json.loads(header["__metadata__"]["fedunlearn"])
    header["__metadata__"]["fedunlearn"] = json.dumps(data.draw(mutated_json(about)))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    loaded_or_refused(path)


@settings(max_examples=EXAMPLES)
@given(st.sampled_from((".npz", ".pt")), st.data())
def test_weights_of_others_of_changed_bytes_are_refused_in_one_line_or_fit(tmp_path_factory, suffix, data):
    path = tmp_path_factory.getbasetemp() / f"others{suffix}"
    state = WHOLE.module.state_dict()
    if suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        torch.save(state, path)
    changed = bytearray(path.read_bytes())
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(changed) - 1), st.integers(0, 255)), min_size=1, max_size=6)
    ):
        changed[place] = value
    path.write_bytes(changed[: data.draw(st.just(len(changed)) | st.integers(0, len(changed)))])
    loaded_or_refused(path)
