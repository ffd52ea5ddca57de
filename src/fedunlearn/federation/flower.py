"""Flower: the engine on a server's grid, complete apps, and a mod that adds unlearning to an app that is there.

Every job travels as a ``train`` message: the one type that each app answers and that SecAgg+ masks. A message holds

* ``arrays``: the weights, in the pruned shapes;
* ``config``: what a train function of another app may want: ``lr``, ``server-round``, ``exclude``;
* ``fedunlearn``: the job as JSON with the pruning plan and the hash of both (``wire.py``).

A reply holds ``arrays`` and ``fedunlearn`` likewise. Nothing a message names is imported, unpickled or run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fedunlearn.errors import FederationError, FedUnlearnError
from fedunlearn.federation.client import handle
from fedunlearn.federation.grid import (
    POLL,
    ClientApp,
    ConfigRecord,
    Context,
    Grid,
    Message,
    RecordDict,
    exchange,
    to_arrays,
    to_tensors,
)
from fedunlearn.federation.jobs import SUM, ClientData, Job, Measure, Reply, Train
from fedunlearn.federation.privacy import NO_RULES, Privacy
from fedunlearn.federation.wire import (
    Received,
    decode_job,
    decode_reply,
    digest_of,
    encode_job,
    encode_reply,
    rebuild,
)
from fedunlearn.slicing import cut, spread
from fedunlearn.threads import one_torch_thread

_logger = logging.getLogger(__name__)
_TYPE = "train"
_ARRAYS, _CONFIG, _OWN = "arrays", "config", "fedunlearn"

# What Flower's error codes mean here (flwr.common.constant.ErrorCode); the SuperLink sends the first two.
_ERRORS = {
    3: "it gave no answer before its message expired",
    5: "it is no longer connected",
    1: "its app cannot be loaded: {reason}",
    2: "its app failed: {reason}",
    8: "its process ended in the middle of the job",
}

BuildModel = Callable[[Context], nn.Module]
LoadImages = Callable[[Context], ClientData]
Rules = Callable[[Context], Privacy]
TrainFunction = Callable[[Message, Context], Message]


class FlowerEngine:
    """Clients behind the grid of a Flower ``ServerApp``.

    Clients that join later or come back are asked again from the next job on. Of two nodes that give one name, the one
    that gave it first counts as long as it is connected.

    Args:
        grid: what ``ServerApp.main`` receives.
        clients: names of the clients, or how many to wait for and take whatever their names are.
        deadline: seconds that a job may take, and a message lives; who has not answered then has failed in this job.
        patience: seconds to wait for clients at the start; half of them must be there then.
        secure: ask for statistics under secure aggregation: ``run`` then returns their sum as one reply.

    Raises:
        FederationError: too few clients are there, or they hold images of different shapes or classes.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clients: Sequence[str] | int,
        deadline: float = 600.0,
        patience: float = 60.0,
        secure: bool = False,
    ) -> None:
        self._grid = grid
        self._deadline = deadline
        self._secure = secure
        self._nodes: dict[str, int] = {}  # client to the node that gave its name
        self._refused: dict[int, str] = {}  # node to why it is not asked
        self._layout: tuple[tuple[int, int, int], int] | None = None
        self._expected = None if isinstance(clients, int) else tuple(sorted(clients))
        self._wait(clients if isinstance(clients, int) else len(clients), patience)

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids of all clients, sorted: those named at the start, or all that ever joined."""
        return tuple(sorted(self._nodes)) if self._expected is None else self._expected

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(colours, height, width)`` of the images."""
        assert self._layout is not None  # _wait saw a client
        return self._layout[0]

    @property
    def classes(self) -> int:
        """Number of classes that labels count."""
        assert self._layout is not None  # _wait saw a client
        return self._layout[1]

    def run(self, job: Job) -> list[Reply]:
        """Run ``job`` on its clients and return their replies in client-id order.

        Raises:
            FederationError: the job names a client that is not one of this engine's.
        """
        self._meet()
        names = self.clients if job.clients is None else tuple(sorted(job.clients))
        unknown = [name for name in names if name not in self.clients]
        if unknown:
            raise FederationError(f"there is no client {unknown[0]!r}; the clients are {', '.join(self.clients)}")
        tensors, text = encode_job(job)
        content = RecordDict(
            {
                _ARRAYS: to_arrays(tensors),
                _CONFIG: ConfigRecord(_plain_config(job)),
                _OWN: ConfigRecord({"job": text}),
            }
        )
        connected = set(self._grid.get_node_ids())
        asked = {name: self._nodes[name] for name in names if self._nodes.get(name) in connected}
        if self._secure and isinstance(job, Measure):
            return self._sum(job, names, asked, content)
        answers = self._exchange(content, asked.values(), f"{job.phase}-{job.round}")
        digest = digest_of(text)
        replies = []
        for name in names:
            if name not in asked:
                replies.append(Reply(name, {}, error="it is not connected"))
            else:
                replies.append(_read_reply(answers.get(asked[name]), name, digest, self._deadline))
        return replies

    def _sum(self, job: Measure, names: Sequence[str], asked: Mapping[str, int], content: RecordDict) -> list[Reply]:
        """Return the sum of the clients' statistics, and an error for each client that is not in it."""
        from fedunlearn.federation.secure import secure_sum  # imports Flower's older interface

        expected = ["counts", "held", *(f"sums.{layer}" for layer in job.taps)]
        sums, nodes = secure_sum(self._grid, sorted(asked.values()), content, expected, deadline=self._deadline)
        for name in ("counts", "held"):
            sums[name] = sums[name].round().long()
        inside = tuple(name for name in names if asked.get(name) in nodes)
        total = int(sums["counts"].sum())
        lost = [Reply(name, {}, error="it is not in the secure sum") for name in names if name not in inside]
        return [Reply(SUM, sums, total, total, members=inside), *lost]

    def _wait(self, wanted: int, patience: float) -> None:
        """Wait until ``wanted`` clients are there, or ``patience`` is over and half of them are."""
        end = time.monotonic() + patience
        while True:
            self._meet()
            here = len(self._nodes)
            if here >= wanted:
                return
            if time.monotonic() > end:
                break
            time.sleep(POLL)
        reasons = "".join(f"; node {node}: {why}" for node, why in self._refused.items())
        if here < max(1, wanted / 2):
            raise FederationError(
                f"only {here} of {wanted} clients were there after {patience:g} s, expected at least half{reasons}: "
                "start their SuperNodes and run the same command again"
            )
        _logger.warning("%d of %d clients are there after %g s%s", here, wanted, patience, reasons)

    def _meet(self) -> None:
        """Learn the names of the nodes that are new."""
        connected = set(self._grid.get_node_ids())
        self._refused = {
            node: why for node, why in self._refused.items() if node in connected
        }  # who left may be mended
        new = connected - set(self._nodes.values()) - self._refused.keys()
        if not new:
            return
        content = RecordDict({_OWN: ConfigRecord({"hello": 1})})
        answers = self._exchange(content, sorted(new), "hello")
        for node in sorted(new):
            why = self._introduce(node, answers.get(node), connected)
            if why is not None:
                self._refused[node] = why
                _logger.warning("node %d is not asked: %s", node, why)

    def _introduce(self, node: int, message: Message | None, connected: set[int]) -> str | None:
        """Take ``node`` on under the name it gives, or return why not."""
        try:
            own = _own_record(message)
            if "error" in own:
                return str(own["error"])
            name, shape, classes = str(own["client"]), tuple(_integers(own["shape"])), _integers([own["classes"]])[0]
        except (KeyError, TypeError, ValueError) as error:
            return f"it did not introduce itself ({error})"
        if self._expected is not None and name not in self._expected:
            return f"it calls itself {name!r}, which is none of the clients {', '.join(self._expected)}"
        if len(shape) != 3:
            return f"it holds images of shape {shape}, expected colours, height and width"
        layout = ((shape[0], shape[1], shape[2]), classes)
        if self._layout is not None and layout != self._layout:
            return (
                f"it holds images of shape {layout[0]} in {classes} classes, "
                f"the first client {self._layout[0]} in {self._layout[1]}: all must agree"
            )
        if self._nodes.get(name) in connected:
            return f"it calls itself {name!r}, and so does node {self._nodes[name]}, which is connected"
        self._layout = layout
        self._nodes[name] = node
        return None

    def _exchange(self, content: RecordDict, nodes: Iterable[int], group: str) -> dict[int, Message]:
        """Send ``content`` to ``nodes`` and return the first answer of each that came before the deadline."""
        # One content for all: it is only read here.
        messages = [Message(content, node, _TYPE, ttl=self._deadline, group_id=group) for node in nodes]
        return exchange(self._grid, messages, self._deadline)


def client_app(
    build_model: BuildModel, load_images: LoadImages, *, rules: Rules = lambda context: NO_RULES, secure: bool = False
) -> ClientApp:
    """Return a complete Flower client.

    Args:
        build_model: makes the unpruned architecture; its weights do not matter.
        load_images: reads what this client holds; called for each message.
        rules: what this client does to its statistics before they leave it.
        secure: report statistics under secure aggregation only.
    """
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        return _answer(message, context, build_model, load_images, _rules(rules(context), secure), None)

    if secure:
        add_secure_measure(app, build_model, load_images, rules=rules)
    return app


def add_secure_measure(
    app: ClientApp, build_model: BuildModel, load_images: LoadImages, *, rules: Rules = lambda context: NO_RULES
) -> None:
    """Register on ``app`` what reports statistics under secure aggregation; arguments as for ``client_app``."""
    from fedunlearn.federation import secure  # imports Flower's older interface

    @app.train(secure.ACTION, mods=[secure.secure_mod])
    def measure(message: Message, context: Context) -> Message:
        received = decode_job(to_tensors(message.content.array_records[_ARRAYS]), str(_own_record(message)["job"]))
        if received.kind != "measure":
            raise FederationError(f"expected a measure job under secure aggregation, got {received.kind}")
        reply = _handled(message, context, received, build_model, load_images(context), rules(context))
        if reply.error is not None:
            raise FederationError(reply.error)  # drops out of the sum
        return secure.answer(dict(reply.tensors), message)


def unlearning_mod(
    build_model: BuildModel,
    load_images: LoadImages,
    *,
    rules: Rules = lambda context: NO_RULES,
    secure: bool = False,
) -> Callable[[Message, Context, TrainFunction], Message]:
    """Return a mod that adds unlearning to a ``ClientApp`` with a train function of its own, which does the repair.

    Messages without a job of ours pass. A train job reaches the app's function with the model in its **full** shapes,
    zeros where channels were pruned, and its answer is cut to the pruned shapes. Zeros stay zeros: with weights into
    and out of a channel at 0, and an activation that is 0 at 0 (ReLU and its kin), gradients of both are 0.

    The function has to leave out the classes that ``message.content["config"]["exclude"]`` lists: otherwise the repair
    teaches them again. It answers with one ``ArrayRecord`` and a metric ``num-examples``, as Flower's strategies ask.

    Args:
        build_model: makes the unpruned architecture; its weights do not matter.
        load_images: reads what this client holds; called for each message.
        rules: what this client does to its statistics before they leave it.
        secure: report statistics under secure aggregation only; ``add_secure_measure`` makes the app do that.
    """

    def mod(message: Message, context: Context, call_next: TrainFunction) -> Message:
        ours = message.has_content() and _OWN in message.content.config_records
        if not ours or message.metadata.message_type != _TYPE:  # the secure measure has a function of its own
            return call_next(message, context)
        return _answer(message, context, build_model, load_images, _rules(rules(context), secure), call_next)

    return mod


def _answer(
    message: Message,
    context: Context,
    build_model: BuildModel,
    load_images: LoadImages,
    rules: Privacy | None,
    train: TrainFunction | None,
) -> Message:
    """Return the client's reply; whatever fails is said in it, as the server cannot look into this process."""
    own = message.content.config_records[_OWN]
    try:
        data = load_images(context)
    except Exception as error:
        why = f"its images cannot be read: {type(error).__name__}: {error}"
        return Message(RecordDict({_OWN: ConfigRecord({"error": why})}), reply_to=message)
    if "hello" in own:
        about: dict[str, Any] = {
            "client": data.client,
            "shape": list(data.train.shape),
            "classes": len(data.train.classes),
        }
        return Message(RecordDict({_OWN: ConfigRecord(about)}), reply_to=message)
    text = str(own["job"])
    try:
        tensors = to_tensors(message.content.array_records[_ARRAYS])
        received = decode_job(tensors, text)
        if train is not None and received.kind == "train":
            reply = _trained(message, context, received, build_model(context), data, train)
        elif rules is None and received.kind == "measure":
            raise FederationError("this client reports statistics under secure aggregation only")
        else:
            reply = _handled(message, context, received, build_model, data, rules or NO_RULES)
    except FedUnlearnError as error:
        reply = Reply(data.client, {}, error=str(error))
    arrays, line = encode_reply(reply, digest_of(text))
    return Message(
        RecordDict({_ARRAYS: to_arrays(arrays), _OWN: ConfigRecord({"reply": line})}),
        reply_to=message,
    )


def _rules(rules: Privacy, secure: bool) -> Privacy | None:
    """Return the rules by which statistics leave in the clear, or None if they never do."""
    return None if secure else rules


def _handled(
    message: Message,
    context: Context,
    received: Received,
    build_model: BuildModel,
    data: ClientData,
    rules: Privacy,
) -> Reply:
    """Return the reply of this client's own model with the weights that came."""
    tensors = to_tensors(message.content.array_records[_ARRAYS])
    model = rebuild(received, tensors, lambda: build_model(context))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with one_torch_thread():
        return handle(received.job(model), model, data, rules)


def _trained(
    message: Message, context: Context, received: Received, full: nn.Module, data: ClientData, train: TrainFunction
) -> Reply:
    """Return what the app's own train function makes of the weights."""
    received.plan.check(full)
    started = time.perf_counter()
    arrays = message.content.array_records[_ARRAYS]
    whole = spread(to_tensors(arrays), received.plan.kept, received.plan.shapes)
    message.content[_ARRAYS] = to_arrays(whole)
    answer = train(message, context)
    if answer.has_error():
        return Reply(data.client, {}, error=f"its train function failed: {answer.error.reason}")
    records = list(answer.content.array_records.values())
    counts = [own["num-examples"] for own in answer.content.metric_records.values() if "num-examples" in own]
    if len(records) != 1 or len(counts) != 1 or not isinstance(counts[0], int):
        raise FederationError(
            "the train function must answer with one ArrayRecord and one metric num-examples (an integer), got "
            f"{len(records)} and {len(counts)}"
        )
    trained = cut(to_tensors(records[0]), received.plan.kept)
    return Reply(data.client, trained, counts[0], counts[0], time.perf_counter() - started)


def _plain_config(job: Job) -> dict[str, Any]:
    """Return what a train function of another app may want to know."""
    config: dict[str, Any] = {"server-round": job.round + 1}
    if isinstance(job, Train):
        config |= {"lr": job.lr, "exclude": list(job.exclude)}
    return config


def _read_reply(message: Message | None, client: str, digest: str, deadline: float) -> Reply:
    if message is None:
        return Reply(client, {}, error=f"it gave no answer within {deadline:g} s")
    try:
        own = _own_record(message)
        if "error" in own:
            return Reply(client, {}, error=str(own["error"]))
        tensors = to_tensors(message.content.array_records[_ARRAYS])
        return decode_reply(tensors, str(own["reply"]), client=client, digest=digest)
    except (KeyError, TypeError, ValueError) as error:
        return Reply(client, {}, error=f"it sent no reply that can be read ({error})")


def _own_record(message: Message | None) -> Mapping[str, Any]:
    """Return our record of an answer, or one that says why there is none."""
    if message is None:
        return {"error": "it gave no answer"}
    if message.has_error():
        code, reason = message.error.code, _last_line(message.error.reason)
        return {"error": _ERRORS.get(code, "Flower reports error {code}: {reason}").format(code=code, reason=reason)}
    record: Mapping[str, Any] = message.content.config_records[_OWN]
    return record


def _last_line(text: str | None) -> str:
    lines = [line.strip() for line in (text or "no reason given").splitlines() if line.strip()]
    return lines[-1]


def _integers(values: Any) -> list[int]:
    return [int(value) for value in values]
