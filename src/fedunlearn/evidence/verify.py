"""Verify the dossier of an unlearning run: ``python verify.py DIR --key operator.pub``.

This file needs Python's standard library and ``cryptography``, nothing of fedunlearn; a copy of it lies in every signed
folder (trust the copy you fetched yourself). It computes bands, verdict and costs on its own from the formulas of
fedunlearn's documentation, not by calling the tool it checks. Nothing in the folder is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

DOSSIER, SIGNATURE = "dossier.json", "dossier.sig"
_CLOCKS = timedelta(minutes=5)  # how far clocks of two machines may be apart
# What a figure above its band says, and the one band that does not come from retrained models.
_KINDS = {
    "forget": "class",
    "retain": "near",
    "reestimated": "class",
    "probe": "class",
    "prototype_1": "class",
    "prototype_5": "class",
    "prototype_10": "class",
    "relearn": "class",
    "int8": "class",
    "int4": "class",
    "membership": "class",
    "neighbours": "apart",
    "cka": "near",
    "procrustes": "apart",
    "artefacts": "class",
}
_FIXED = {"artefacts": (0.0, 1.0, 0.0, 0.0)}
_FEWEST = 3
# Keys of a cost -> keys of the entries of rounds.jsonl that add up to them.
_COUNTED = {"client_samples": "samples", "client_flops": "flops", "bytes_up": "bytes_up", "bytes_down": "bytes_down"}
# 97.5 % quantiles of Student's t with 1 .. 9 degrees of freedom; beyond, a series is exact enough.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


class _ProblemError(Exception):
    """A check failed; the message says how."""


def problems(folder: Path, key: Path, *, now: datetime | None = None) -> list[str]:
    """Return what is wrong with the dossier in ``folder``, a line each; empty where all is well.

    Args:
        folder: of the run.
        key: the operator's public key, PEM, from somewhere else than the folder.
        now: the time of the check; the present where None.
    """
    try:
        dossier = _signed(folder, key)
        value = json.loads(dossier)
        checks = (
            _dates(value, now or datetime.now(UTC)),
            _files(folder, value),
            _events(folder, value),
            _figures(folder, value),
            _costs(folder, value),
        )
        return [problem for check in checks for problem in check]
    except _ProblemError as error:
        return [str(error)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        return [f"{folder}: the dossier cannot be followed: {type(error).__name__}: {error}"]


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of the 32 bytes of a public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def _signed(folder: Path, path: Path) -> bytes:
    """Return the bytes of the dossier if ``path`` holds the key that signed them."""
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _ProblemError(f"{path}: expected a public key in PEM, but {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _ProblemError(f"{path}: expected an Ed25519 public key")
    for name in (DOSSIER, SIGNATURE):
        if not (folder / name).is_file():
            raise _ProblemError(f"{folder}: there is no {name}: the folder was not signed")
    dossier, signature = (folder / DOSSIER).read_bytes(), (folder / SIGNATURE).read_bytes()
    try:
        key.verify(signature, dossier)
    except InvalidSignature:
        raise _ProblemError(
            f"{DOSSIER}: the signature does not fit: the dossier or {SIGNATURE} was changed, or this is not the "
            f"signer's key ({fingerprint(key)})"
        ) from None
    named = json.loads(dossier)["key"]
    if named != fingerprint(key):
        raise _ProblemError(f"{DOSSIER} names the key {named}, the one given is {fingerprint(key)}")
    return dossier


def _dates(dossier: Mapping[str, Any], now: datetime) -> Iterator[str]:
    created, expires = (datetime.fromisoformat(dossier[name]) for name in ("created", "expires"))
    if created > now + _CLOCKS:
        yield f"{DOSSIER} was created at {created.isoformat()}, which is in the future"
    if now > expires:
        yield f"{DOSSIER} expired at {expires.isoformat()}"


def _files(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    listed = dossier["files"]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    for name in sorted(found - set(listed) - {DOSSIER, SIGNATURE}):
        yield f"{name} is not in the dossier"
    for name, own in sorted(listed.items()):
        if name not in found:
            yield f"{name} is missing"
        elif _hash(folder / name) != own["sha256"]:
            yield f"{name} was changed"


def _events(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Check the chain, the order of what happened, and the files it speaks of."""
    lines = (folder / "events.jsonl").read_bytes().splitlines()
    previous, last, seen = "0" * 64, datetime.min.replace(tzinfo=UTC), {}
    for seq, line in enumerate(lines):
        event = json.loads(line)
        time = datetime.fromisoformat(event["time"])
        if event["seq"] != seq or event["previous"] != previous:
            yield f"events.jsonl: line {seq + 1} does not follow from the one before"
        if time < last:
            yield f"events.jsonl: line {seq + 1} is earlier than the one before"
        previous, last = hashlib.sha256(line).hexdigest(), time
        seen[event["event"]] = (seq, event["facts"])
    if (len(lines), previous) != (dossier["events"]["count"], dossier["events"]["head"]):
        yield "events.jsonl ends elsewhere than the dossier says"
    if last > datetime.fromisoformat(dossier["created"]):
        yield "events.jsonl: the last event is later than the dossier"
    order = ["unlearned", "retrained models ready", "thresholds fixed", "audited", "result written"]
    places = [seen[name][0] for name in order if name in seen]
    if len(places) < len(order) or places != sorted(places):
        yield f"events.jsonl: expected, in this order, {', '.join(order)}"
        return
    spoken = {
        "model.safetensors": seen["unlearned"][1]["sha256"],
        "plan.json": seen["unlearned"][1]["plan"],
        "thresholds.json": seen["thresholds fixed"][1]["sha256"],
        "result.json": seen["result written"][1]["sha256"],
    } | {f"oracles/{name}.safetensors": own for name, own in seen["retrained models ready"][1]["sha256"].items()}
    for name, digest in spoken.items():
        if dossier["files"].get(name, {}).get("sha256") != digest:
            yield f"events.jsonl tells of another {name}"


def _figures(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Compute bands, verdict and held-out verdicts from the figures of each model."""
    result = _json(folder / "result.json")
    for name in ("audits", "verdict", "reason", "decided_by", "calibration", "cost", "speedup"):
        if dossier.get(name) != result.get(name):
            yield f"{DOSSIER} and result.json differ in {name}"
    names = list(result["oracles"])
    oracles = {name: _own_figures(folder, name) for name in names}
    fixed = _json(folder / "thresholds.json")
    if dossier["thresholds"] != fixed:
        yield f"{DOSSIER} and thresholds.json differ"
    bands = _bands(list(oracles.values()))
    written = {name: tuple(own[key] for key in ("mean", "sd", "low", "high")) for name, own in fixed["bands"].items()}
    if bands.keys() != written.keys() or any(not _near(bands[name], written[name]) for name in bands):
        yield "thresholds.json does not follow from the figures of the retrained models"
    chance = 1 / len(result["classes"])
    found = _judged(_own_figures(folder, "unlearned"), written, len(names), chance)
    if (found[0], found[1]) != (result["verdict"], result["decided_by"]):
        yield f"the verdict {result['verdict']!r} does not follow from the figures: they give {found[0]!r}"
    for name, audit in result["audits"].items():
        if audit["figure"] != _own_figures(folder, "unlearned")[name][0] or audit["verdict"] != found[2][name]:
            yield f"result.json: the audit {name} does not follow from audits/unlearned.json"
    for name, held in result["calibration"]["models"].items():
        others = _bands([own for other, own in oracles.items() if other != name])
        verdict = _judged(oracles[name], others, max(len(names) - 1, _FEWEST), chance)[0]
        if verdict != held["verdict"]:
            yield f"the held-out verdict on {name} does not follow from the figures: they give {verdict!r}"


def _costs(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Add up the rounds again, and divide."""
    steps = [json.loads(line) for line in (folder / "rounds.jsonl").read_bytes().splitlines()[1:]]
    if dossier["rounds"] != rounds(steps):
        yield f"{DOSSIER} and rounds.jsonl differ in the rounds"
    ours = [step for step in steps if step["phase"].startswith(("measure", "reestimate", "repair"))]
    unlearn = dossier["cost"]["unlearn"]
    for key, unit in _COUNTED.items():
        if sum(entry[unit] for step in ours for entry in step["entries"]) != unlearn[key]:
            yield f"the cost of unlearning, {key}, does not follow from rounds.jsonl"
    retrain = dossier["cost"].get("retrain")
    if retrain is not None and not _near(
        (dossier["speedup"]["client_flops"],), (retrain["client_flops"] / unlearn["client_flops"],)
    ):
        yield "the speed-up does not follow from the costs"


def rounds(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return participation and bytes of each step of rounds.jsonl, as they stand in the dossier."""
    return [
        {
            "phase": step["phase"],
            "round": step["round"],
            "clients": len({name for entry in step["entries"] for name in entry["clients"]}),
            "refused": sum(len(entry["refused"]) for entry in step["entries"]),
            "bytes_up": sum(entry["bytes_up"] for entry in step["entries"]),
            "bytes_down": sum(entry["bytes_down"] for entry in step["entries"]),
        }
        for step in steps
    ]


_Figures = Mapping[str, tuple[float, float]]  # name -> value, standard error
_Bands = Mapping[str, tuple[float, ...]]  # name -> mean, sd, low, high


def _bands(oracles: Sequence[_Figures]) -> dict[str, tuple[float, ...]]:
    """Return ``mean +- t sd sqrt(1 + 1/n)`` with ``sd = max(s, error, 0.001)`` for each figure all of them have."""
    bands: dict[str, tuple[float, ...]] = dict(_FIXED)
    n = len(oracles)
    for name in _KINDS:
        own = [figures[name] for figures in oracles if name in figures]
        if n < 2 or len(own) < n:
            continue
        mean = statistics.fmean(value for value, _ in own)
        sd = max(statistics.stdev(value for value, _ in own), *(error for _, error in own), 0.001)
        half = _t(n - 1) * (1 + 1 / n) ** 0.5 * sd
        bands[name] = (mean, sd, mean - half, mean + half)
    return bands


def _t(df: int) -> float:
    if df <= len(_T):
        return _T[df - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / float(df) ** (k + 1) for k, term in enumerate(terms))


def _judged(
    figures: _Figures, bands: _Bands, oracles: int, chance: float
) -> tuple[str, list[str], dict[str, str | None]]:
    """Return verdict, the figures that decided it, and the side of its band on which each figure lies."""
    sides: dict[str, str | None] = {}
    for name in _KINDS:
        if name in figures:
            sides[name] = _side(figures[name][0], *bands[name][2:]) if name in bands else None
    if oracles < _FEWEST:
        return "no verdict", [], sides
    harmless = {("near", "above"), ("apart", "below")}
    apart = [
        name for name, side in sides.items() if side in ("above", "below") and (_KINDS[name], side) not in harmless
    ]
    if sides["forget"] == "above" and figures["forget"][0] > chance:
        return "not forgotten", ["forget"], sides
    if apart:
        return "suppressed, not erased", apart, sides
    return "indistinguishable from retraining", list(sides), sides


def _side(value: float, low: float, high: float) -> str:
    return "above" if value > high else "below" if value < low else "inside"


def _own_figures(folder: Path, name: str) -> dict[str, tuple[float, float]]:
    figures = _json(folder / "audits" / f"{name}.json")["figures"]
    return {figure: (float(own["value"]), float(own["error"])) for figure, own in figures.items()}


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) <= 1e-4 * max(1.0, abs(x), abs(y)) for x, y in zip(a, b, strict=True))


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is wrong and return 1, or say that all is well and return 0."""
    parser = argparse.ArgumentParser(description="Verify the dossier of an unlearning run.")
    parser.add_argument("folder", type=Path, help="the folder with dossier.json")
    parser.add_argument("--key", type=Path, required=True, help="the operator's public key (PEM)")
    chosen = parser.parse_args(arguments)
    found = problems(chosen.folder, chosen.key)
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    if not found:
        value = _json(chosen.folder / DOSSIER)
        print(f"verified: signature, {len(value['files'])} files, {value['events']['count']} events, figures and costs")
        print(f"verdict: {value['verdict']} (request {value['request'] or 'not named'}, {value['created']})")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
