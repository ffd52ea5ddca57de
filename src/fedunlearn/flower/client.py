"""Flower clients: complete apps, and a mod that adds unlearning to an app that is there.

``cut`` and ``spread`` go from full shapes to pruned ones and back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedunlearn.channels.checks import first_line
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.plan import Classifier
from fedunlearn.channels.slicing import Kept
from fedunlearn.data.images import MOST_IMAGES, Meaning
from fedunlearn.errors import FederationError, FedUnlearnError
from fedunlearn.federation.jobs import ClientData, Reply, enough, handle
from fedunlearn.federation.privacy import DEFAULT_RULES, Privacy, check_noise
from fedunlearn.federation.tasks import Measure, Train
from fedunlearn.flower.messages import (
    ARRAYS,
    CONFIG,
    JOB,
    MASKING,
    OWN,
    ClientApp,
    ConfigRecord,
    Context,
    Message,
    Received,
    RecordDict,
    decode_job,
    digest_of,
    encode_reply,
    one_line,
    plain_config,
    rebuild,
    sent_job,
    to_arrays,
    to_tensors,
)
from fedunlearn.training.compute import FLOAT32, Compute, one_torch_thread

_logger = logging.getLogger(__name__)
_APART = 1e-3  # of the largest logit: more than rounding
BuildModel = Callable[[Context], nn.Module]
LoadImages = Callable[[Context], ClientData]
Rules = Callable[[Context], Privacy]
TrainFunction = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class _Site:
    """What a client is made of, see ``client_app``."""

    build_model: BuildModel
    load_images: LoadImages
    rules: Rules
    secure: bool = False
    compute: Compute = FLOAT32

    def read(self, context: Context) -> tuple[Privacy, ClientData]:
        """Return this client's rules and images.

        Raises:
            FederationError: they cannot be read; why, this client's log tells alone: an error text may name a file.
        """
        try:
            rules, data = self.rules(context), self.load_images(context)
        except Exception as error:
            raise FederationError(f"its images cannot be read: {_kind(error)}") from None
        other = data.validation and Meaning.of(data.validation).difference(Meaning.of(data.train))
        if other:
            raise FederationError(f"its validation holds {other}, which are its training images")
        return rules, data

    def built(self, context: Context) -> nn.Module:
        """Return the unpruned architecture; errors as of ``read``."""
        try:
            return self.build_model(context)
        except Exception as error:
            raise FederationError(f"its model cannot be built: {_kind(error)}") from None


def client_app(
    build_model: BuildModel,
    load_images: LoadImages,
    *,
    rules: Rules = lambda context: DEFAULT_RULES,
    secure: bool = False,
    compute: Compute = FLOAT32,
) -> ClientApp:
    """Return a complete Flower client.

    Args:
        build_model: makes the unpruned architecture; its weights do not matter.
        load_images: reads what this client holds; called for each message.
        rules: what this client does to its statistics before they leave it.
        secure: report statistics under secure aggregation only.
        compute: how this client computes, its optimiser or train function among it.
    """
    app = ClientApp()
    site = _Site(build_model, load_images, rules, secure, compute)

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        return _answer(message, context, site)

    if secure:
        add_secure_measure(app, build_model, load_images, rules=rules, compute=compute)
    return app


def add_secure_measure(
    app: ClientApp,
    build_model: BuildModel,
    load_images: LoadImages,
    *,
    rules: Rules = lambda context: DEFAULT_RULES,
    compute: Compute = FLOAT32,
) -> None:
    """Register on ``app`` what reports statistics under secure aggregation; arguments as for ``client_app``."""
    from fedunlearn.flower import secure  # imports Flower's older interface

    site = _Site(build_model, load_images, rules, compute=compute)

    @app.train(secure.ACTION, mods=[secure.secure_mod])
    def measure(message: Message, context: Context) -> Message:
        tensors, text = sent_job(message)
        received = decode_job(tensors, text)
        if not isinstance(received.task, Measure):
            raise FederationError(f"expected a measure job under secure aggregation, got {received.task.kind}")
        rules, data = site.read(context)
        try:
            reply = _handled(context, received, tensors, site, rules, data)
        except Exception as error:  # Flower would send its text
            raise FederationError(_told(error)) from None
        if reply.error is not None:
            raise FederationError(reply.error)  # drops out of the sum
        return secure.answer(dict(reply.tensors), message)


def unlearning_mod(
    build_model: BuildModel,
    load_images: LoadImages,
    *,
    rules: Rules = lambda context: DEFAULT_RULES,
    secure: bool = False,
) -> Callable[[Message, Context, TrainFunction], Message]:
    """Return a mod that adds unlearning to a ``ClientApp`` with a train function of its own, which does the repair.

    Messages without a job of ours pass. A train job reaches the app's function with the model in its **full** shapes,
    zeros where channels were pruned, and its answer is cut to the pruned shapes. Zeros stay zeros: with weights into
    and out of a channel at 0, and an activation that is 0 at 0 (ReLU and its kin), gradients of both are 0. A norm over
    pruned channels and others (LayerNorm, GroupNorm across its groups) would count the zeros: such a job is refused.

    The function has to leave out the classes that ``message.content["config"]["exclude"]`` lists: otherwise the repair
    teaches them again. It answers with one ``ArrayRecord`` and a metric ``num-examples``, as Flower's strategies ask.

    Args:
        build_model: makes the unpruned architecture; its weights do not matter.
        load_images: reads what this client holds; called for each message.
        rules: what this client does to its statistics before they leave it.
        secure: report statistics under secure aggregation only; ``add_secure_measure`` makes the app do that.
    """
    site = _Site(build_model, load_images, rules, secure)

    def mod(message: Message, context: Context, call_next: TrainFunction) -> Message:
        ours = message.has_content() and OWN in message.content.config_records
        if not ours or message.metadata.message_type != JOB:  # the secure measure has a function of its own
            return call_next(message, context)
        return _answer(message, context, site, call_next)

    return mod


def cut(tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Return ``tensors`` with the named positions only."""
    small = dict(tensors)
    for name, axes in kept.items():
        for axis, positions in axes.items():
            small[name] = small[name].index_select(axis, torch.tensor(positions))
    return small


def spread(tensors: Mapping[str, Tensor], kept: Kept, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return ``tensors`` in the ``shapes`` from before, zeros at the positions that are not kept: undoes ``cut``."""
    whole = dict(tensors)
    for name, axes in kept.items():
        places = [torch.tensor(axes.get(axis, range(size))) for axis, size in enumerate(shapes[name])]
        full = torch.zeros(shapes[name], dtype=tensors[name].dtype)
        full[torch.meshgrid(*places, indexing="ij")] = tensors[name]
        whole[name] = full
    return whole


def _answer(message: Message, context: Context, site: _Site, train: TrainFunction | None = None) -> Message:
    """Return the client's reply; whatever fails is said in it, as the server cannot look into this process."""
    record = message.content.config_records[OWN]
    context.state.config_records.pop(MASKING, None)  # a secure sum that another message follows is over
    try:
        rules, data = site.read(context)
        if "hello" in record:
            check_noise(rules)  # now, not after the training
    except FedUnlearnError as error:
        return Message(RecordDict({OWN: ConfigRecord({"error": str(error)})}), reply_to=message)
    if "hello" in record:
        about: dict[str, Any] = {
            "client": data.client,
            "shape": list(data.train.shape),
            "classes": list(data.train.classes),
            "mean": [float(value) for value in data.train.mean],  # a record takes values of one type alone
            "std": [float(value) for value in data.train.std],
        }
        return Message(RecordDict({OWN: ConfigRecord(about)}), reply_to=message)
    text = ""
    try:
        tensors, text = sent_job(message)
        received = decode_job(tensors, text)
        if train is not None and isinstance(received.task, Train):
            if received.task.training.objective is not None:
                raise FederationError(
                    "this client trains by a function of its own, which knows the cross-entropy alone: it cannot do "
                    f"the objective {received.task.training.objective.kind!r} of the job"
                )
            enough(data.train.without(received.task.exclude), rules)
            reply = _trained(message, context, received, site.built(context), data, train)
            if reply.error is None and reply.images < rules.min_images:
                raise FederationError(
                    f"its train function trained on {reply.images} images, fewer than {rules.min_images}, the fewest "
                    "that this client's rules (min_images) let an answer stand for"
                )
        elif site.secure and isinstance(received.task, Measure):
            raise FederationError("this client reports statistics under secure aggregation only")
        else:
            reply = _handled(context, received, tensors, site, rules, data)
    except FedUnlearnError as error:
        reply = Reply(data.client, error=str(error))
    except Exception as error:  # Flower would send its text
        reply = Reply(data.client, error=_told(error))
    arrays, line = encode_reply(reply, digest_of(text))
    return Message(
        RecordDict({ARRAYS: to_arrays(arrays), OWN: ConfigRecord({"reply": line})}),
        reply_to=message,
    )


def _handled(
    context: Context, received: Received, tensors: Mapping[str, Tensor], site: _Site, rules: Privacy, data: ClientData
) -> Reply:
    """Return the reply of this client's own model with the weights that came."""
    model = rebuild(received, tensors, Classifier(site.built(context), data.train.shape))
    with one_torch_thread():
        compute = site.compute.able(model.module, model.example)
        reply = handle(received.job(model), compute.placed(model.module), data, rules, compute, told=_told)
    # The time until it failed could tell at which image.
    return reply if reply.error is None else replace(reply, seconds=0.0)


def _told(error: Exception) -> str:
    """Return what the server is told of an exception: the text of one that nobody foresaw may hold a label."""
    return f"{type(error).__name__}: {error}" if isinstance(error, FedUnlearnError) else _kind(error)


def _kind(error: Exception) -> str:
    """Return what the server is told of an exception of a site's own code: no row of a table, no name of a file."""
    _logger.warning("this client cannot do its part", exc_info=error)
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"  # the system's words, without the file's name
    return f"{type(error).__name__}, told in the log of this client alone"


def _check_spread(
    received: Received, tensors: Mapping[str, Tensor], whole: Mapping[str, Tensor], full: Classifier
) -> None:
    """Refuse a plan by which the model computes otherwise in its full shapes, as a norm that reads the zeros does."""
    if not received.plan.kept:
        return
    small = rebuild(received, tensors, full)
    wide = full.copy()
    try:
        wide.module.load_state_dict(dict(whole))
        with torch.no_grad():
            found, expected = (model.module.cpu().eval()(model.example) for model in (wide, small))
    except RuntimeError as error:
        raise FederationError(f"the weights do not fit this client's model: {first_line(error)}") from error
    rows = received.plan.kept.get(f"{head_layer(full.module, full.example)}.weight", {}).get(0)
    found = found if rows is None else found[:, list(rows)]
    if bool((found - expected).abs().max() > _APART * expected.abs().max()):
        raise FederationError(
            "this client trains by a function of its own, in full shapes with zeros for pruned channels, and its model "
            "has a norm that reads them: use client_app, or norms within channels (BatchNorm)"
        )


def _trained(
    message: Message, context: Context, received: Received, full: nn.Module, data: ClientData, train: TrainFunction
) -> Reply:
    """Return what the app's own train function makes of the weights."""
    received.plan.check(full)
    started = time.perf_counter()
    arrays = message.content.array_records[ARRAYS]
    tensors = to_tensors(arrays)
    whole = spread(tensors, received.plan.kept, received.plan.shapes)
    _check_spread(received, tensors, whole, Classifier(full, data.train.shape))
    message.content[ARRAYS] = to_arrays(whole)
    # Of the job that was checked: what else the message has may name other classes, and so fewer images.
    message.content[CONFIG] = ConfigRecord(plain_config(received.task, received.key[1]))
    answer = train(message, context)
    if answer.has_error():
        _logger.warning("the train function failed: %s", answer.error.reason)
        return Reply(data.client, error="its train function failed, told in the log of this client alone")
    records = list(answer.content.array_records.values())
    counts = [
        metrics["num-examples"] for metrics in answer.content.metric_records.values() if "num-examples" in metrics
    ]
    if len(records) != 1 or len(counts) != 1:
        raise FederationError(
            "the train function must answer with one ArrayRecord and one metric num-examples, got "
            f"{len(records)} and {len(counts)}"
        )
    images = counts[0]
    if not isinstance(images, int) or isinstance(images, bool) or not 1 <= images <= MOST_IMAGES:
        raise FederationError(
            f"the train function's metric num-examples must be a whole number of images from 1 to {MOST_IMAGES}, got "
            f"{one_line(repr(images))}: return the number of images that it trained on"
        )
    trained = cut(to_tensors(records[0]), received.plan.kept)
    if changed := [name for name in received.frozen if name in trained and not trained[name].equal(tensors[name])]:
        raise FederationError(
            f"the train function changed {one_line(changed[0])}, which the server has frozen: freeze it there too"
        )
    return Reply(data.client, trained, images, images, time.perf_counter() - started)
