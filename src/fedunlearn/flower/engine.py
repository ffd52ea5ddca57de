"""The Flower engine: jobs to clients behind a server's grid, and their replies.

Every job travels as a ``train`` message: the one type that each app answers and that SecAgg+ masks. A message holds

* ``arrays``: the weights, in the pruned shapes;
* ``config``: what a train function of another app may want: ``lr``, ``server-round``, ``exclude``;
* ``fedunlearn``: the job as JSON with the pruning plan and the hash of both (``messages.py``).

A reply holds ``arrays`` and ``fedunlearn`` likewise. Nothing a message names is imported, unpickled or run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fedunlearn.data.images import Meaning
from fedunlearn.errors import DataError, FederationError, listed
from fedunlearn.federation.jobs import SUM, Job, Reply
from fedunlearn.federation.tasks import Measure
from fedunlearn.flower.messages import (
    ARRAYS,
    CONFIG,
    JOB,
    OWN,
    POLL,
    ConfigRecord,
    Exchanged,
    Grid,
    Message,
    RecordDict,
    decode_reply,
    digest_of,
    encode_job,
    exchange,
    failure,
    life,
    one_line,
    plain_config,
    to_arrays,
    to_tensors,
)

_logger = logging.getLogger(__name__)
_LONGEST_NAME = 200  # letters
_LATE = 60.0  # seconds that a client which joins later may take to introduce itself: each job waits for it


class FlowerEngine:
    """Clients behind the grid of a Flower ``ServerApp``.

    Clients that join later or come back are asked again from the next job on. Of two nodes that give one name, the one
    that gave it first counts as long as it is connected.

    Args:
        grid: what ``ServerApp.main`` receives.
        clients: names of the clients, or how many to wait for and take whatever their names are.
        deadline: seconds that a job may take; who has not answered then has failed in this job.
        patience: seconds to wait for clients at the start; half of them must be there then.
        hello: seconds that a client may take to introduce itself; the shorter of deadline and patience where None.
        meaning: shape, class names and normalisation that clients must have; those of the first where None.
        secure: ask for statistics under secure aggregation: ``run`` then returns their sum as one reply.

    Raises:
        FederationError: too few clients are there, or they hold images that do not mean the same.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clients: Sequence[str] | int,
        deadline: float = 600.0,
        patience: float = 60.0,
        hello: float | None = None,
        secure: bool = False,
        meaning: Meaning | None = None,
    ) -> None:
        self._grid = grid
        self._deadline = deadline
        self._secure = secure
        self._nodes: dict[str, int] = {}  # client to the node that gave its name
        self._refused: dict[int, str] = {}  # node to why it is not asked
        self._twins: dict[int, int] = {}  # of these, a node to the one that gave its name before
        self._later: dict[int, tuple[int, float]] = {}  # node to how often it was put off, and when it is asked again
        self._meaning = meaning
        self._hello = min(deadline, patience) if hello is None else hello
        self._expected = None if isinstance(clients, int) else tuple(sorted(clients))
        self._wanted = clients if isinstance(clients, int) else len(clients)
        self._wait(self._wanted, patience)

    @property
    def clients(self) -> tuple[str, ...]:
        """Ids of all clients, sorted: those named at the start; or of those that joined all that are connected.

        Where these are fewer than were asked for, so many of the others too: they are refused by name, and count.
        """
        if self._expected is not None:
            return self._expected
        connected = set(self._grid.get_node_ids())
        here = [name for name, node in self._nodes.items() if node in connected]
        # One that came back under another name would count as failed in every job.
        away = sorted(self._nodes.keys() - here)[: max(0, self._wanted - len(here))]
        return tuple(sorted([*here, *away]))

    @property
    def grows(self) -> bool:
        """Whether clients may join that nobody named at the start."""
        return self._expected is None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(colours, height, width)`` of the images."""
        assert self._meaning is not None  # _wait saw a client
        return self._meaning.shape

    @property
    def classes(self) -> int:
        """Number of classes that labels count."""
        assert self._meaning is not None  # _wait saw a client
        return len(self._meaning.classes)

    def run(self, job: Job) -> Iterator[Reply]:
        """Run ``job`` on its clients and return their replies in client-id order, each read when it is asked for.

        Raises:
            FederationError: the job names a client that is not one of this engine's.
        """
        # Who joins now is asked from the next job on: the server has noted before whom this one is for.
        names = self.clients if job.clients is None else tuple(sorted(job.clients))
        self._meet(min(self._hello, _LATE))
        # A client of before a kill may not have come back to a federation of no fixed names.
        unknown = [] if self.grows else [name for name in names if name not in self.clients]
        if unknown:
            raise FederationError(f"there is no client {unknown[0]!r}; the clients are {listed(self.clients)}")
        tensors, text = encode_job(job)
        content = RecordDict(
            {
                ARRAYS: to_arrays(tensors),
                CONFIG: ConfigRecord(plain_config(job.task, job.round)),
                OWN: ConfigRecord({"job": text}),
            }
        )
        connected = set(self._grid.get_node_ids())
        asked = {name: self._nodes[name] for name in names if self._nodes.get(name) in connected}
        if self._secure and isinstance(job.task, Measure):
            return iter(self._sum(job, names, asked, content))
        came = self._exchange(content, asked.values(), f"{job.phase}-{job.round}", self._deadline)
        return _replies(names, asked, came, digest_of(text))

    def _sum(self, job: Job, names: Sequence[str], asked: Mapping[str, int], content: RecordDict) -> list[Reply]:
        """Return the sum of the clients' statistics, and an error for each client that is not in it."""
        from fedunlearn.flower.secure import secure_sum  # imports Flower's older interface

        expected = job.task.layout(job.model)
        sums, lost = secure_sum(self._grid, asked, content, list(expected), deadline=self._deadline)
        for name in ("counts", "held"):
            sums[name] = sums[name].round().long()
        lost |= dict.fromkeys([name for name in names if name not in asked], "it is not connected")
        inside = tuple(name for name in names if name not in lost)
        total = int(sums["counts"].sum())
        without = [Reply(name, error=f"it is not in the secure sum: {why}") for name, why in sorted(lost.items())]
        return [Reply(SUM, sums, total, total, members=inside), *without]

    def _wait(self, wanted: int, patience: float) -> None:
        """Wait until ``wanted`` clients are there, or ``patience`` is over and half of them are."""
        end = time.monotonic() + patience
        while True:
            self._meet(self._hello)
            here = len(self._nodes)
            if here >= wanted:
                return
            if time.monotonic() > end:
                break
            time.sleep(POLL)
        silent = set(self._grid.get_node_ids()) - set(self._nodes.values()) - self._refused.keys()
        slow = f"; {len(silent)} more are connected but did not answer in {self._hello:g} s" if silent else ""
        missing = [name for name in self._expected or () if name not in self._nodes]
        names = f"; missing: {listed(missing)}" if missing else ""
        reasons = names + slow + listed((f"; node {node}: {why}" for node, why in self._refused.items()), "")
        remedy = (
            "give them longer (hello, in a recipe federation.deadline)"
            if silent
            else "start their SuperNodes, or ask for fewer (federation.clients in a recipe)"
        )
        if here < max(1, wanted / 2):
            raise FederationError(
                f"only {here} of {wanted} clients were there after {patience:g} s, expected at least half{reasons}: "
                f"{remedy}, and run the command again"
            )
        _logger.warning("%d of %d clients are there after %g s%s", here, wanted, patience, reasons)

    def _meet(self, hello: float) -> None:
        """Learn the names of the nodes that are new, and answer within ``hello`` seconds."""
        connected = set(self._grid.get_node_ids())
        # A node that left may come back mended, and one whose name another had has it to itself when that one leaves.
        freed = {node for node, first in self._twins.items() if first not in connected}
        self._twins = {node: first for node, first in self._twins.items() if node in connected - freed}
        self._refused = {node: why for node, why in self._refused.items() if node in connected - freed}
        self._later = {node: turn for node, turn in self._later.items() if node in connected - freed}
        now = time.monotonic()
        not_yet = {node for node, (_, again) in self._later.items() if now < again}
        new = connected - set(self._nodes.values()) - not_yet
        if not new:
            return
        content = RecordDict({OWN: ConfigRecord({"hello": 1})})
        came = self._exchange(content, sorted(new), "hello", hello)
        refused = {}
        for node in sorted(new - came.late):
            why = came.failed[node] if node in came.failed else self._introduce(node, came.answers[node], connected)
            if why is not None:
                refused[node] = why
                if self._refused.get(node) != why:
                    _logger.warning("node %d is not asked: %s", node, why)
        self._refused = {node: why for node, why in self._refused.items() if node not in new} | refused
        # Who is slow, or failed, may be mended and keep its number: it is asked again, ever later, as each job waits.
        for node in (came.late - came.unsent) | refused.keys():
            times = self._later.get(node, (0, 0.0))[0] + 1
            wait = min(hello, _LATE) if node in refused else hello
            self._later[node] = times, time.monotonic() + 2 ** (times - 1) * wait

    def _introduce(self, node: int, message: Message, connected: set[int]) -> str | None:
        """Take ``node`` on under the name it gives, or return why not."""
        try:
            record = _own_record(message)
            if "error" in record:
                return one_line(str(record["error"]))
            name, shape = str(record["client"]), tuple(_integers(record["shape"]))
            classes = tuple(str(label) for label in record["classes"])
            mean, std = (tuple(float(value) for value in record[key]) for key in ("mean", "std"))
            if len(shape) != 3:
                return f"it holds images of shape {shape}, expected colours, height and width"
            meaning = Meaning((shape[0], shape[1], shape[2]), classes, mean, std)
            meaning.check()
        except DataError as error:
            return one_line(f"it holds images of which it says what cannot be: {error}")
        except Exception as error:  # another process wrote this, anything may be in it
            return one_line(f"it did not introduce itself ({type(error).__name__}: {error})")
        if self._expected is not None and name not in self._expected:
            return f"it calls itself {name[:80]!r}, which is none of the clients {listed(self._expected)}"
        if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            return one_line(
                f"it calls itself {name[:80]!r}, expected up to {_LONGEST_NAME} letters that can be printed"
            )
        why = None if self._meaning is None else meaning.difference(self._meaning)
        if why is not None:
            return one_line(f"it holds {why}: all must agree")
        if self._nodes.get(name) in connected:
            self._twins[node] = self._nodes[name]
            return f"it calls itself {name[:80]!r}, and so does node {self._nodes[name]}, which is connected"
        self._meaning = meaning
        self._nodes[name] = node
        return None

    def _exchange(self, content: RecordDict, nodes: Iterable[int], group: str, deadline: float) -> Exchanged:
        """Send ``content`` to ``nodes`` and return what each answered before the deadline."""
        # One content for all: it is only read here.
        nodes = [*nodes]
        ttl = life(deadline, len(nodes))
        messages = [Message(content, node, JOB, ttl=ttl, group_id=group) for node in nodes]
        return exchange(self._grid, messages, deadline)


def _replies(names: Sequence[str], asked: Mapping[str, int], came: Exchanged, digest: str) -> Iterator[Reply]:
    """Yield the reply of each client; an answer of which the reply was read is not kept, a fleet has thousands."""
    for name in names:
        if name not in asked:
            yield Reply(name, error="it is not connected")
        elif asked[name] in came.failed:
            yield Reply(name, error=came.failed[asked[name]])
        else:
            yield _read_reply(came.answers.pop(asked[name]), name, digest)


def _read_reply(message: Message, client: str, digest: str) -> Reply:
    try:
        record = _own_record(message)
        if "error" in record:
            return Reply(client, error=one_line(str(record["error"])))
        tensors = to_tensors(message.content.array_records[ARRAYS])
        return decode_reply(tensors, str(record["reply"]), client=client, digest=digest)
    except Exception as error:  # another process wrote this, anything may be in it
        return Reply(client, error=one_line(f"it sent no reply that can be read ({type(error).__name__}: {error})"))


def _own_record(message: Message) -> Mapping[str, Any]:
    """Return our record of an answer, or one that says why there is none."""
    why = failure(message)
    if why is not None:
        return {"error": why}
    record: Mapping[str, Any] = message.content.config_records[OWN]
    return record


def _integers(values: Any) -> list[int]:
    return [int(value) for value in values]
