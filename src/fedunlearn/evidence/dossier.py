"""The dossier: what was asked, done, measured and found, with the hash of every file, signed by the operator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedunlearn.errors import EvidenceError
from fedunlearn.evidence.events import EVENTS, OPERATOR, EventLog, events_of, now
from fedunlearn.evidence.folder import RunFolder, readable
from fedunlearn.evidence.verify import (
    CONFIRMED,
    COSTS,
    DOSSIER,
    KIND,
    LIMITS,
    SIGNATURE,
    acknowledged,
    fingerprint,
    models,
    purged,
    rounds,
    scope,
)
from fedunlearn.federation.lock import LOCK, FolderLock
from fedunlearn.files import write_bytes, written

_SCHEMA = 2
_VERIFIER = "verify.py"


def write_dossier(folder: Path, key: Ed25519PrivateKey, *, time: str | None = None) -> None:
    """Write dossier.json, its signature and a copy of the verifier into the folder of a finished run, audited or not.

    The report of a run that had a key names it, so no other signs it.

    Args:
        folder: the folder; nothing in it changes afterwards without the dossier telling.
        key: the operator's.
        time: when it is signed, ISO 8601; the present where None.

    Raises:
        RunError: the folder does not hold a finished run.
        EvidenceError: the run names another key.
    """
    run = RunFolder.read(folder)
    _check_named(folder, key)
    verifier = files("fedunlearn").joinpath("evidence", "verify.py").read_bytes()
    write_bytes(folder / _VERIFIER, verifier)
    with readable(folder):
        value = _content(run, time or now()) | {"key": fingerprint(key.public_key())}
    data = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    # Both are on the disk before an earlier pair goes; a kill then leaves no signature, not one that fits no dossier.
    with written(folder / SIGNATURE) as signature, written(folder / DOSSIER) as dossier:
        signature.write_bytes(key.sign(data))
        dossier.write_bytes(data)
        (folder / SIGNATURE).unlink(missing_ok=True)


def sign(folder: Path, key: Ed25519PrivateKey) -> None:
    """Sign the folder of a finished run; again, for longer, where it is as its dossier says and signed by this key.

    Raises:
        EvidenceError: another key signed it; or see ``check_unchanged`` and ``write_dossier``.
    """
    _check_named(folder, key)
    if (folder / DOSSIER).exists():
        check_unchanged(folder)
        _check_signed_by(folder, key)
    write_dossier(folder, key)


def _check_named(folder: Path, key: Ed25519PrivateKey) -> None:
    """Refuse another key than the one that the report names, where it names one."""
    with readable(folder):
        named = _operator(folder)
    if named not in ("", fingerprint(key.public_key())):
        raise EvidenceError(
            f"{folder}: its report names the key {named[:16]}... as the one that signs it, got the key "
            f"{fingerprint(key.public_key())[:16]}...: give that key, or do the same into another --out with this one"
        )


def _check_signed_by(folder: Path, key: Ed25519PrivateKey) -> None:
    """Refuse a signed folder whose signature is not by ``key``, which would take its place.

    Where a kill came before the signature, the dossier says whose it was to be.
    """
    try:
        data = (folder / DOSSIER).read_bytes()
        if (folder / SIGNATURE).exists():
            key.public_key().verify((folder / SIGNATURE).read_bytes(), data)
        elif json.loads(data)["key"] != fingerprint(key.public_key()):
            raise InvalidSignature
    except (InvalidSignature, OSError, ValueError, KeyError, TypeError) as error:
        raise EvidenceError(
            f"{folder} is signed by another key, or was changed since: give the key that signed it, and see what "
            "fedunlearn verify says"
        ) from error


def check_unchanged(folder: Path, *, confirming: Sequence[str] = ()) -> None:
    """Refuse a folder that holds something else than its dossier lists: a new signature would be over that.

    Args:
        folder: a signed folder.
        confirming: clients whose confirmations may stand at the end of the events, where a kill kept them from being
            signed.

    Raises:
        EvidenceError: a file was changed, added or taken away; or the dossier cannot be read.
    """
    try:
        signed = json.loads((folder / DOSSIER).read_text("utf-8"))["files"]
        size = signed[EVENTS]["bytes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvidenceError(f"{folder / DOSSIER} cannot be read: see what fedunlearn verify says") from error
    found = _hashed(folder)
    events = (folder / EVENTS).read_bytes() if EVENTS in found else b""
    if _names(events[size:]) <= {f"{CONFIRMED}{name}" for name in confirming}:
        found[EVENTS] = _entry(events[:size])
    other = sorted(name for name in {*found, *signed} - {_VERIFIER} if found.get(name) != signed.get(name))
    if other:
        raise EvidenceError(
            f"{folder}: since it was signed {', '.join(other)} changed, came or went, and signing again would hide it: "
            "see what fedunlearn verify says, and put back what was there"
        )


def acknowledge(folder: Path, clients: Sequence[str], key: Ed25519PrivateKey) -> None:
    """Record that clients confirmed to have deleted their images of the forgotten classes, and sign the folder again.

    It is the operator's statement: what a client deletes on its own disk, nobody else sees.

    Args:
        folder: of a finished run.
        clients: their ids.
        key: the operator's.

    Raises:
        RunError: the folder does not hold a finished run, or another process writes there.
        EvidenceError: the run only trained a model, a client took no part in it, another key signed the folder, or
            something in it is not what was signed.
    """
    run = RunFolder.read(folder)
    lock = FolderLock(folder)
    try:
        lock.take()
        _acknowledge(run, clients, key)
    finally:
        lock.leave()


def _acknowledge(run: RunFolder, clients: Sequence[str], key: Ed25519PrivateKey) -> None:
    folder = run.path
    if "unlearned" not in run.result and "verdict" not in run.result:
        raise EvidenceError(
            f"{folder}: nothing was forgotten or audited here, so no deletion can be confirmed: give the folder of "
            "fedunlearn run, unlearn or audit"
        )
    with readable(folder):
        lines = (folder / "rounds.jsonl").read_bytes().splitlines()[1:]
        known = {name for line in lines for entry in json.loads(line)["entries"] for name in entry["clients"]}
    if not known:
        raise EvidenceError(
            f"{folder}: no client took part here, where a model from elsewhere was audited: confirm deletions in the "
            "folder of the run that forgot"
        )
    for name in clients:
        if name not in known:
            raise EvidenceError(
                f"{folder}: no client {name!r} took part in the run, so none can confirm anything; those that did are "
                f"{', '.join(sorted(known))}"
            )
    if (folder / DOSSIER).exists():
        _check_signed_by(folder, key)
        check_unchanged(folder, confirming=clients)
    log = EventLog(folder / EVENTS)
    for name in clients:
        log.once(f"{CONFIRMED}{name}")
    write_dossier(folder, key)


def _content(run: RunFolder, time: str) -> dict[str, Any]:
    result, folder = run.result, run.path
    evidence = result["recipe"]["evidence"]
    events = (folder / EVENTS).read_bytes().splitlines()
    header, *steps = [json.loads(line) for line in (folder / "rounds.jsonl").read_bytes().splitlines()]
    hashed = _hashed(folder)
    return {
        "schema": _SCHEMA,
        "created": time,
        "expires": (datetime.fromisoformat(time) + timedelta(days=evidence["valid_days"])).isoformat(),
        "request": evidence["request"],
        "scope": scope(result),
        "kind": KIND,
        "versions": result["versions"],
        "recipe": result["recipe"],
        "data": header["data"],
        "models": models(result, hashed),
        "clients": {key: value for key, value in result["engine"].items() if key != "name"},
        "rounds": rounds(steps),
        "thresholds": json.loads((folder / "thresholds.json").read_text("utf-8")) if "verdict" in result else None,
        "limits": list(LIMITS),
        "purged": purged(result),
        "files": hashed,
        "acknowledged": acknowledged(json.loads(line) for line in events),
        "events": {"count": len(events), "head": hashlib.sha256(events[-1]).hexdigest()},
    } | {name: result.get(name) for name in _RESULTS}


_RESULTS = ("audits", "verdict", "reason", "decided_by", "calibration", *COSTS)


def _operator(folder: Path) -> str:
    """Return the fingerprint of the key that the events name; empty where the run had none."""
    events = events_of(folder / EVENTS)
    return str(events[OPERATOR]["facts"]["key"]) if OPERATOR in events else ""


def _hashed(folder: Path) -> dict[str, Any]:
    """Return hash and size of every file but the dossier itself and the lock, which goes when the run ends."""
    hashed = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (DOSSIER, SIGNATURE, LOCK):
            hashed[name] = _entry(path.read_bytes())
    return hashed


def _names(lines: bytes) -> set[str]:
    """Return the events in ``lines``; of a line that is none, something that no event is called."""
    try:
        return {str(json.loads(line)["event"]) for line in lines.splitlines()}
    except (ValueError, KeyError, TypeError):
        return {""}


def _entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
