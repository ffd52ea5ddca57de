"""Jobs and replies as Flower's messages: JSON and arrays, of which nothing is run or unpickled."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedunlearn.channels.plan import Classifier, PruningPlan
from fedunlearn.data.images import MOST_IMAGES
from fedunlearn.errors import FederationError, FedUnlearnError, printable
from fedunlearn.federation.jobs import Job, Reply, Task
from fedunlearn.federation.tasks import AnyTask, Train

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise ImportError("the Flower engine needs Flower: pip install 'fedunlearn[flower]'") from error

# What is of Flower, for the other files of this folder: one place imports it and says what is missing.
__all__ = [
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Grid",
    "Message",
    "MetricRecord",
    "RecordDict",
    "ServerApp",
]

_SCHEMA = 3
_LONGEST = 300
_LONGEST_JOB = 1e9  # seconds

# How a job travels: the one message type that each app answers and that SecAgg+ masks, and the records in it.
JOB = "train"
ARRAYS, CONFIG, OWN = "arrays", "config", "fedunlearn"
MASKING = "secaggplus_state"  # Flower's own name for what a client keeps from stage to stage of a secure sum
POLL = 0.2  # seconds; the grid's own send_and_receive looks every 3
_LONGEST_POLL = 3.0
_GRACE, _PULL = 60.0, 1.0  # seconds to take answers in, and those for each of many or large ones
_NOT_SENT = "the SuperLink did not take its message, which may be too large: see its log, and raise its limit"
_LINE = ("httpx", "httpcore")  # whose errors say that the SuperLink cannot be reached

# What Flower's error codes mean here (flwr.common.constant.ErrorCode); the SuperLink sends the first two.
_ERRORS = {
    3: "it gave no answer before its message expired",
    5: "it is no longer connected",
    1: "its app cannot be loaded: {reason}",
    2: "its app failed: {reason}",
    8: "its process ended in the middle of the job",
}
_RAISED = re.compile(r"""<class '[\w.]+'>:<(['"])(.*)\1>\Z""", re.S)  # how Flower tells of an exception of an app


class _JobMessage(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_number: Literal[3] = Field(alias="schema")
    phase: str
    round: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    plan: str
    spec: str
    frozen: tuple[str, ...]
    task: Annotated[AnyTask, Field(discriminator="kind")]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    client: str
    job: str
    images: Annotated[int, Field(ge=0, le=MOST_IMAGES)]
    samples: Annotated[int, Field(ge=0, le=MOST_IMAGES)]
    seconds: Annotated[float, Field(ge=0, le=_LONGEST_JOB, allow_inf_nan=False)]
    error: str | None


def spec_of(plan: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a plan and of the names, types and shapes of the tensors that follow from it."""
    layout = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    return hashlib.sha256(json.dumps([_SCHEMA, plan, layout]).encode()).hexdigest()


def encode_job(job: Job) -> tuple[dict[str, Tensor], str]:
    """Return a job as the tensors of its model and a line of JSON; who is asked is not part of it."""
    tensors = {name: tensor.detach().cpu() for name, tensor in job.model.module.state_dict().items()}
    plan = job.model.plan.to_json()
    # The state says nothing of what is not trained: a site's own architecture would train all of it.
    frozen = [name for name, parameter in job.model.module.named_parameters() if not parameter.requires_grad]
    about = {"phase": job.phase, "round": job.round, "seed": job.seed, "plan": plan, "spec": spec_of(plan, tensors)}
    message = _JobMessage.model_validate({"schema": _SCHEMA, "task": job.task, "frozen": frozen, **about})
    return tensors, message.model_dump_json(by_alias=True)


def sent_job(message: Message) -> tuple[dict[str, Tensor], str]:
    """Return the tensors and the line of JSON that ``encode_job`` made of a job.

    Raises:
        FederationError: the message holds none.
    """
    try:
        record = message.content.config_records[OWN]
        return to_tensors(message.content.array_records[ARRAYS]), str(record["job"])
    except Exception as error:  # another process wrote this, anything may be in it
        why = f"the message holds no job that can be read ({type(error).__name__}: {error})"
        raise FederationError(one_line(why)) from error


@dataclass(frozen=True, eq=False)
class Received:
    """A job as it arrived, checked but for its model.

    Attributes:
        task: what is asked.
        plan: how the shapes of the tensors follow from the unpruned architecture.
        frozen: names of the parameters that are not trained.
        digest: SHA-256 of the message, which the reply names.
        key: phase, round and seed of the job.
    """

    task: Task
    plan: PruningPlan
    frozen: tuple[str, ...]
    digest: str
    key: tuple[str, int, int]

    def job(self, model: Classifier) -> Job:
        """Return the job on ``model``."""
        phase, round, seed = self.key
        return Job(task=self.task, model=model, phase=phase, round=round, seed=seed)


def decode_job(tensors: Mapping[str, Tensor], text: str) -> Received:
    """Return the job that ``encode_job`` took apart.

    Raises:
        FederationError: the text is no such job, or its spec is not that of its plan and tensors.
        PlanError: the plan is none.
        RecipeError: a setting of the training is out of range.
    """
    try:
        message = _JobMessage.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the message"
        raise FederationError(f"expected a job of schema {_SCHEMA}, but {where}: {first['msg']}") from error
    # A field that is left out would get the default of this client's version: images of a class it was told to leave.
    missing = _missing(message.task, json.loads(text)["task"])
    if missing is not None:
        raise FederationError(f"expected a job of schema {_SCHEMA}, but its task has no {missing}")
    if message.spec != spec_of(message.plan, tensors):
        raise FederationError(
            f"the {message.task.kind} job of {message.phase}, round {message.round + 1}, does not fit its tensors: "
            "plan and weights are not of one model; give the job the plan by which its model was pruned"
        )
    key = (message.phase, message.round, message.seed)
    return Received(message.task, PruningPlan.from_json(message.plan), message.frozen, digest_of(text), key)


def _missing(value: Any, sent: Mapping[str, Any]) -> str | None:
    """Return the first field of the dataclass ``value``, or of one in it, that was not sent; None where all were."""
    for field in fields(value):
        if field.name not in sent:
            return field.name
        inner = getattr(value, field.name)
        missing = _missing(inner, sent[field.name]) if is_dataclass(inner) else None
        if missing is not None:
            return f"{field.name}.{missing}"
    return None


def digest_of(text: str) -> str:
    """Return the SHA-256 of an encoded job: what its replies must name."""
    return hashlib.sha256(text.encode()).hexdigest()


def rebuild(received: Received, tensors: Mapping[str, Tensor], classifier: Classifier) -> Classifier:
    """Return ``classifier``, of the client's own architecture, pruned by the plan, with the weights that came.

    What the server does not train is frozen, and nothing else is.

    Raises:
        PlanError: the plan is for another architecture.
        FederationError: the weights are, or the names of what is frozen.
    """
    model = classifier.cut(received.plan)
    try:
        model.module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise FederationError(
            "the weights do not fit this client's model after pruning by the plan: build the architecture of the "
            f"server ({str(error).splitlines()[-1].strip()})"
        ) from error
    parameters = dict(model.module.named_parameters())
    if unknown := [name for name in received.frozen if name not in parameters]:
        raise FederationError(
            f"the job freezes {one_line(unknown[0])}, which this client's model has not: build the architecture of the "
            "server"
        )
    for name, parameter in parameters.items():
        if parameter.is_floating_point():
            parameter.requires_grad_(name not in received.frozen)
    return model


def encode_reply(reply: Reply, digest: str) -> tuple[dict[str, Tensor], str]:
    """Return a reply to the job of this digest as tensors and a line of JSON."""
    answer = _Answer(
        client=reply.client,
        job=digest,
        images=reply.images,
        samples=reply.samples,
        seconds=reply.seconds,
        error=reply.error,
    )
    return dict(reply.tensors), answer.model_dump_json()


def decode_reply(tensors: Mapping[str, Tensor], text: str, *, client: str, digest: str) -> Reply:
    """Return the reply that ``encode_reply`` took apart; with an error where it is none of this client to this job."""
    try:
        answer = _Answer.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the message"
        return Reply(client, error=one_line(f"it sent no reply that can be read ({where}: {first['msg']})"))
    if answer.client != client:
        return Reply(client, error=one_line(f"it answered in the name of {answer.client!r}"))
    if answer.job != digest:
        return Reply(client, error="it answered another job: its plan, round or settings are stale")
    why = None if answer.error is None else one_line(answer.error)
    return Reply(client, tensors, answer.images, answer.samples, answer.seconds, why)


def one_line(text: str) -> str:
    """Return what another process says in one printable line that fits a log."""
    shown = printable(text).strip() or "no reason given"
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + " ..."


def failure(message: Message) -> str | None:
    """Return what went wrong, where Flower answers in the place of an app; None where the app does."""
    if not message.has_error():
        return None
    told = (message.error.reason or "").strip()
    wrapped = _RAISED.search(told)
    code, reason = message.error.code, one_line(told.rpartition("\n")[2] if wrapped is None else wrapped[2])
    return _ERRORS.get(code, "Flower reports error {code}: {reason}").format(code=code, reason=reason)


@dataclass(frozen=True, eq=False)
class Exchanged:
    """What came of messages to nodes.

    Attributes:
        answers: node to the first answer that it gave.
        failed: each other node to why it has none.
        late: those of the latter that did nothing wrong: no message reached them, or time ran out.
        unsent: those of the latter that no message reached, for which nobody waited.
    """

    answers: dict[int, Message]
    failed: dict[int, str]
    late: frozenset[int]
    unsent: frozenset[int]


def life(deadline: float, messages: int) -> float:
    """Return how many seconds a message may live: until the answers to all that were sent with it are taken.

    The SuperLink drops what is older, and the last answers are taken after the deadline. What lives on for longer comes
    to a site that was away, in the place of the job that is asked by then.
    """
    return deadline + _GRACE + messages * _PULL


def exchange(grid: Grid, messages: Sequence[Message], deadline: float) -> Exchanged:
    """Send ``messages``, one per node, and return what each node answered within ``deadline`` seconds.

    The deadline ends the waiting; what is there by then is taken, however long that takes.
    """
    nodes = [message.metadata.dst_node_id for message in messages]
    numbers = [*grid.push_messages(messages)]
    numbers += [""] * (len(nodes) - len(numbers))
    sent = {number: node for number, node in zip(numbers, nodes) if number}
    answers: dict[int, Message] = {}
    not_sent = [node for number, node in zip(numbers, nodes) if not number]
    failed = dict.fromkeys(not_sent, _NOT_SENT)
    began = time.monotonic()
    while True:
        looked = time.monotonic()
        for number, node in sent.items():
            if node not in answers and node not in failed:
                _pull(grid, number, node, answers, failed)
        waiting = [node for node in sent.values() if node not in answers and node not in failed]
        if not waiting or looked - began >= deadline:
            failed |= dict.fromkeys(waiting, f"it gave no answer within {deadline:g} s")
            return Exchanged(answers, failed, frozenset((*not_sent, *waiting)), frozenset(not_sent))
        # Each look is a write in the SuperLink's database for every node, which clients who answer wait for meanwhile.
        now = time.monotonic()
        took, passed = now - looked, now - began
        time.sleep(min(max(POLL, took, passed / 20), max(_LONGEST_POLL, took), max(0.0, deadline - passed)))


def _pull(grid: Grid, number: str, node: int, answers: dict[int, Message], failed: dict[int, str]) -> None:
    """Take the answer to one message, where it is there.

    Of several, Flower takes those off the SuperLink that come before one that it cannot read, and then loses them.
    """
    try:
        for message in grid.pull_messages([number]):
            # By what it answers: errors of the SuperLink come in its own name.
            if message.metadata.reply_to_message_id == number:
                answers.setdefault(node, message)
    except Exception as error:  # another process wrote this, anything may be in it
        if isinstance(error, (OSError, FedUnlearnError)) or type(error).__module__.partition(".")[0] in _LINE:
            raise
        failed[node] = one_line(f"it sent no reply that can be read ({type(error).__name__}: {error})")


def plain_config(task: Task, round: int) -> dict[str, Any]:
    """Return what a train function of another app may want to know of a task."""
    config: dict[str, Any] = {"server-round": round + 1}
    if isinstance(task, Train):
        config |= {"lr": task.lr, "exclude": list(task.exclude)}
    return config


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as Flower's arrays."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def to_tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return Flower's arrays, which it reads without pickle, as tensors."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
