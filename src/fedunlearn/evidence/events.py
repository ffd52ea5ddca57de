"""The event log: what happened when, each line chained to the one before by its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedunlearn.errors import RunError
from fedunlearn.files import append_line

EVENTS = "events.jsonl"
OPERATOR = "operator named"  # an event: whose key signs the run
_START = "0" * 64


def now() -> str:
    """Return the time as ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def events_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return the events of a log by name, each as it was written; none where there is no log."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {event["event"]: event for event in map(json.loads, lines)}


class EventLog:
    """A file of JSON lines: ``seq``, ``time``, ``event``, ``facts``, and ``previous``, the SHA-256 of the line before.

    A line cut short by a kill is dropped; one that was changed, removed or put in breaks the chain.

    Args:
        path: the file; created with its first line.
        clock: gives the time of an event.

    Raises:
        RunError: the chain is broken.
    """

    def __init__(self, path: Path, *, clock: Callable[[], str] = now) -> None:
        self._path = path
        self._clock = clock
        data = path.read_bytes() if path.exists() else b""
        complete = data[: data.rfind(b"\n") + 1]
        if complete != data:
            path.write_bytes(complete)
        self._names: set[str] = set()
        self._last = _START
        self._time = ""
        for seq, line in enumerate(complete.splitlines()):
            try:
                value = json.loads(line)
                chained = (value["seq"], value["previous"]) == (seq, self._last)
                self._names.add(value["event"])
                self._time = value["time"]
            except (ValueError, KeyError, TypeError) as error:
                raise RunError(f"{path}: line {seq + 1} is no event ({error}): choose another --out") from error
            if not chained:
                raise RunError(f"{path}: line {seq + 1} does not follow from the one before: choose another --out")
            self._last = hashlib.sha256(line).hexdigest()

    def once(self, event: str, **facts: Any) -> None:
        """Record ``event`` with its facts, unless a run that was cut off has recorded it already."""
        if event in self._names:
            return
        self._time = max(self._time, self._clock())  # a clock that was set back does not turn the order around
        value = {
            "seq": len(self._names),
            "time": self._time,
            "event": event,
            "facts": facts,
            "previous": self._last,
        }
        line = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        append_line(self._path, line)
        self._names.add(event)
        self._last = hashlib.sha256(line).hexdigest()
