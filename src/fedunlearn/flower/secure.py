"""SecAgg+ for ``Measure``: the server sees masked statistics and their sum, never those of one client.

Flower's SecAgg+ (Bell et al., *Secure Single-Server Aggregation with (Poly)Logarithmic Overhead*, CCS 2020) lives in
its older interface and averages model updates. Here it adds up statistics exactly, with these differences:

* Numbers travel as fixed point in limbs of ``BITS`` bits, so that its quantiser has nothing to round.
* A client lost before it shared its keys is left out; Flower 1.41 fails then when it removes the masks.
* Masks come from SHAKE-256 over the whole shared secret. Flower 1.41 folds the secret to 32 bits, of which 28 vary:
  one was found by trying all in half a minute.
* Clients refuse terms that they can see to unmask one of them (fewer than three clients, both shares of one node).

The server is trusted to follow the protocol. Keys and lists are not authenticated: one that hands out keys of its own,
or tells clients of different numbers of others, reads one of them.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flwr.client.mod import secaggplus_mod
from flwr.common import FitIns, Parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from torch import Tensor

from fedunlearn.errors import FederationError, listed
from fedunlearn.flower.messages import (
    MASKING,
    ArrayRecord,
    ConfigRecord,
    Context,
    Grid,
    Message,
    MetricRecord,
    RecordDict,
    exchange,
    failure,
    life,
    to_arrays,
    to_tensors,
)

ACTION = "measure"
MESSAGE = f"train.{ACTION}"
BITS, LIMBS, FRACTION = 30, 2, 24
_TARGET, _CLIP, _MODULUS = 2**BITS, float(2 ** (BITS - 1)), 2**48
_LARGEST = 2.0 ** (BITS * LIMBS - FRACTION - 1)
_CONFIGS, _SUMS = "secaggplus_configs", "sums"
_LEAST = 3
_SILENT = "its answer was not used"

Handler = Callable[[Message, Context], Message]
Masks = Callable[[bytes, int, Sequence[tuple[int, ...]]], list[np.ndarray[Any, Any]]]


def encode(values: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Return non-negative numbers as limbs of fixed point, off by ``2^-(FRACTION + 1)`` at most.

    Raises:
        FederationError: a number is negative, not finite or too large.
    """
    values = np.atleast_1d(np.asarray(values, np.float64))
    if not bool(np.all((values >= 0) & (values < _LARGEST))):  # NaN compares as false
        raise FederationError(f"statistics under secure aggregation must lie in 0 .. {_LARGEST:g}")
    fixed = np.rint(values * 2.0**FRACTION).astype(np.int64)
    # The workflow maps [-CLIP, CLIP] to 0 .. TARGET in steps of 1: of whole numbers it rounds none.
    return [((fixed >> (BITS * limb)) & (_TARGET - 1)).astype(np.float64) - _CLIP for limb in range(LIMBS)]


def decode(means: Sequence[np.ndarray[Any, Any]], clients: int) -> np.ndarray[Any, Any]:
    """Return the sum over ``clients`` of what ``encode`` took, from the means of its limbs."""
    sums = [np.rint((mean + _CLIP) * clients) * 2.0 ** (BITS * limb - FRACTION) for limb, mean in enumerate(means)]
    return np.asarray(sum(sums))


def secure_mod(message: Message, context: Context, call_next: Handler) -> Message:
    """Mask what a ``Measure`` function answers, after a look at the terms; register it with ``ACTION``.

    Raises:
        FederationError: the message asks for statistics in the clear, or on terms that would reveal them.
    """
    terms = message.content.config_records.get(_CONFIGS)
    if terms is None:
        raise FederationError("this client reports statistics under secure aggregation only")
    _check(terms, context.state.config_records.get(MASKING, ConfigRecord()))

    def masked(inner: Message, context: Context) -> Message:
        inner.metadata.message_type = MESSAGE
        del inner.content.config_records[_CONFIGS]
        sums = to_tensors(call_next(inner, context).content.array_records[_SUMS])
        inner.metadata.message_type = "train"
        limbs = [limb for _, tensor in sorted(sums.items()) for limb in encode(tensor.numpy())]
        # What the older interface wants; nothing but the arrays, which the mod masks and clears, tells of the client.
        content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
            "fitres.parameters": ArrayRecord(limbs),
            "fitres.num_examples": MetricRecord({"num_examples": 1}),
            "fitres.metrics": ConfigRecord(),
            "fitres.status": ConfigRecord({"code": 0, "message": ""}),
        }
        return Message(RecordDict(content), reply_to=inner)

    message.metadata.message_type = "train"  # the mod passes any other type unmasked
    finished = terms.get("stage") == "unmask"
    try:
        with _strong_masks("flwr.client.mod.secure_aggregation.secaggplus_mod"):
            reply = secaggplus_mod(message, context, masked)
    except Exception:
        finished = True  # this client is out of the sum
        raise
    finally:
        message.metadata.message_type = MESSAGE
        if finished:
            context.state.config_records.pop(MASKING, None)  # private keys and shares
    reply.metadata.message_type = MESSAGE
    return reply


def _check(terms: ConfigRecord, kept: ConfigRecord) -> None:
    """Refuse terms under which one client's numbers could be read or would come out wrong.

    Each client sees what it is sent itself: two lists that differ from client to client are not seen to.

    Args:
        terms: what the server asks in this stage.
        kept: what this client keeps from the stages before.
    """
    expected = {"target_range": _TARGET, "clipping_range": _CLIP, "mod_range": _MODULUS, "max_weight": 1.0}
    if terms.get("stage") == "setup":
        clients, shares, threshold = (int(str(terms[name])) for name in ("sample_num", "share_num", "threshold"))
        most = _MODULUS // _TARGET - 1
        if shares != clients or threshold < _threshold(clients) or clients > most:
            raise FederationError(
                f"secure aggregation of {clients} clients with threshold {threshold} is refused: "
                f"expected {_LEAST} to {most} clients and a threshold of {_threshold(clients)} or more"
            )
        if any(terms[name] != value for name, value in expected.items()):
            raise FederationError(
                f"secure aggregation is refused: expected the terms {expected}; use one version everywhere"
            )
    if terms.get("stage") == "collect_masked_vectors":
        sources = [*_numbers(terms["srcs"])]
        if len(set(sources)) < len(sources):
            raise FederationError("masking is refused: expected each other node once, and one comes twice")
    if terms.get("stage") == "unmask":
        active, dead = ([*_numbers(terms[name])] for name in ("active_nids", "dead_nids"))
        shared = [*_numbers(kept.get("sk1_share_dict:K", []))]
        least = _threshold(len(shared))
        if sorted(active + dead) != sorted(shared) or kept.get("nid") not in active or len(active) < least:
            raise FederationError(
                "unmasking is refused: expected each node that shared its keys once, as present or as lost, this one "
                f"as present, and {least} or more present, got {len(active)} present and {len(dead)} lost"
            )


def _threshold(clients: int) -> int:
    """Return how many of ``clients`` must go through all stages.

    More than two thirds: of a bare majority, a server that tells one client of fewer others than it tells those can
    have enough shares of both kinds.
    """
    return max(_LEAST, 2 * clients // 3 + 1)


def _numbers(value: Any) -> Iterable[int]:
    return (int(number) for number in value)


def secure_sum(
    grid: Grid, clients: Mapping[str, int], content: RecordDict, names: Sequence[str], *, deadline: float
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the sum of what ``clients`` answer to ``content``, and client to why it is not in it.

    All but ``max(3, 2 * clients // 3 + 1)`` clients may fail, all stages taken together. The error of each sum is at
    most ``clients * 2^-(FRACTION + 1)``.

    Args:
        grid: of the server.
        clients: name to node, at least three.
        content: the job.
        names: of the arrays that are expected.
        deadline: seconds for each of the four stages.

    Raises:
        FederationError: too few clients, or too few were left; with what each of the others said.
    """
    nodes = sorted(clients.values())
    threshold = _threshold(len(nodes))
    if len(nodes) < _LEAST:
        raise FederationError(
            f"secure aggregation needs at least {_LEAST} clients, got {len(nodes)}: with fewer, each knows the others"
        )
    workflow = _Workflow(
        1.0,
        threshold,
        max_weight=1.0,
        clipping_range=_CLIP,
        quantization_range=_TARGET,
        modulus_range=_MODULUS,
        timeout=deadline,
    )
    workflow.content = content
    strategy = _Sum(nodes)
    measuring = _AsMeasure(grid)

    def said() -> str:
        reasons = [f"; {name}: {measuring.failed[node]}" for name, node in clients.items() if node in measuring.failed]
        return listed(reasons, "")

    # The workflow keeps its round in a context; one of its own leaves that of the run alone.
    record = RecordDict({"config": ConfigRecord({"current_round": 1}), "parameters": ArrayRecord()})
    context = LegacyContext(Context(0, 0, {}, record, {}), strategy=strategy, client_manager=SimpleClientManager())
    try:
        with _strong_masks("flwr.server.workflow.secure_aggregation.secaggplus_workflow"):
            workflow(measuring, context)  # type: ignore[arg-type]  # it sends and receives, no more
    except Exception as error:  # the workflow trusts what clients send
        raise FederationError(
            f"secure aggregation failed: a client's answer does not fit ({type(error).__name__}: {error}); "
            f"nobody can tell whose, so leave clients out of the federation in turn{said()}"
        ) from error
    if strategy.means is None:
        raise FederationError(
            f"secure aggregation failed: fewer than {threshold} of {len(nodes)} clients went through all its "
            f"stages{said()}"
        )
    limbs = [strategy.means[i : i + LIMBS] for i in range(0, len(strategy.means), LIMBS)]
    if len(limbs) != len(names):
        raise FederationError(
            f"secure aggregation gave {len(limbs)} arrays, expected {len(names)}: build the same model at all clients"
        )
    lost = {name: measuring.failed.get(node, _SILENT) for name, node in clients.items() if node not in strategy.nodes}
    sums = {name: torch.from_numpy(decode(limb, len(strategy.nodes))) for name, limb in zip(sorted(names), limbs)}
    return sums, lost


def answer(tensors: dict[str, Tensor], message: Message) -> Message:
    """Return the message by which a client's ``Measure`` function hands its tensors to ``secure_mod``."""
    return Message(RecordDict({_SUMS: to_arrays(tensors)}), reply_to=message)


class _AsMeasure:
    """The grid, with the workflow's messages under our action, and a limit on their lives."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.failed: dict[int, str] = {}  # node to why it gave no answer, the first time that it gave none

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float) -> list[Message]:
        """Send messages and return the answers that came in time."""
        messages = list(messages)
        for message in messages:
            message.metadata.message_type = MESSAGE
            message.metadata.ttl = life(timeout, len(messages))
        came = exchange(self._grid, messages, timeout)
        told = {node: failure(answer) for node, answer in came.answers.items()} | came.failed
        for node, why in told.items():
            if why is not None:
                self.failed.setdefault(node, why)
        return list(came.answers.values())


class _Sum(FedAvg):
    """Asks the given nodes, and keeps what comes out."""

    def __init__(self, nodes: Sequence[int]) -> None:
        super().__init__()
        self._asked = nodes
        self.means: list[np.ndarray[Any, Any]] | None = None
        self.nodes: list[int] = []

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """Return whom to ask; what is asked comes from the workflow."""
        return [(SimpleNamespace(node_id=node), FitIns(Parameters([], ""), {})) for node in self._asked]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Keep the means, which the workflow gives to each that is in them."""
        if results:
            self.means = parameters_to_ndarrays(results[0][1].parameters)
            self.nodes = sorted(proxy.node_id for proxy, _ in results)
        return None, {}


class _Workflow(SecAggPlusWorkflow):
    """SecAgg+ that carries a job of ours and survives losses in its first stages."""

    content: RecordDict

    def setup_stage(self, grid: Any, context: Any, state: Any) -> bool:
        """Give each node a record of its own: the workflow writes into it."""
        going_on = bool(super().setup_stage(grid, context, state))
        state.nid_to_fitins = {node: RecordDict(dict(self.content.items())) for node in state.nid_to_fitins}
        return going_on

    def share_keys_stage(self, grid: Any, context: Any, state: Any) -> bool:
        """Go on with those that shared their keys: no other has shares of a node lost before."""
        going_on = bool(super().share_keys_stage(grid, context, state))
        state.sampled_node_ids = set(state.active_node_ids)
        state.nid_to_neighbours = {
            node: state.nid_to_neighbours[node] & state.active_node_ids for node in state.active_node_ids
        }
        return going_on


def _masks(seed: bytes, num_range: int, dimensions: Sequence[tuple[int, ...]]) -> list[np.ndarray[Any, Any]]:
    """Return uniform numbers below ``num_range``, a power of two, in the shapes asked for."""
    assert num_range & (num_range - 1) == 0
    sizes = [int(np.prod(shape)) for shape in dimensions]
    stream = hashlib.shake_256(b"fedunlearn secure sum" + seed).digest(8 * sum(sizes))
    numbers = np.frombuffer(stream, "<i8") & (num_range - 1)
    return [part.reshape(shape) for part, shape in zip(np.split(numbers, np.cumsum(sizes)[:-1]), dimensions)]


class _Strong(threading.local):
    """How many sums of ours the thread is in."""

    depth = 0


_lock = threading.Lock()
_users: dict[str, int] = {}  # module to the sums that use it now, in all threads
_strong = _Strong()


@contextmanager
def _strong_masks(module: str) -> Iterator[None]:
    """Make Flower's ``module`` take its masks from ``_masks`` while the context lasts; both sides must.

    Contexts may overlap: the last to end gives Flower its own generator back. Threads outside of them always have it.
    """
    theirs = sys.modules[module]
    with _lock:
        if not _users.get(module):
            _weak[module] = theirs.pseudo_rand_gen  # a Flower without it fails here rather than go on with weak masks
            theirs.pseudo_rand_gen = _chosen(_weak[module])  # type: ignore[attr-defined]
        _users[module] = _users.get(module, 0) + 1
    _strong.depth += 1
    try:
        yield
    finally:
        _strong.depth -= 1
        with _lock:
            _users[module] -= 1
            if not _users[module]:
                theirs.pseudo_rand_gen = _weak.pop(module)  # type: ignore[attr-defined]


_weak: dict[str, Masks] = {}  # module to the generator that Flower gave it


def _chosen(weak: Masks) -> Masks:
    """Return the strong generator inside our sums, ``weak`` elsewhere."""

    def masks(seed: bytes, num_range: int, dimensions: Sequence[tuple[int, ...]]) -> list[np.ndarray[Any, Any]]:
        return (_masks if _strong.depth else weak)(seed, num_range, dimensions)

    return masks
