"""Verify the dossier of an unlearning run: ``python verify.py DIR --key operator.pub``.

This file needs Python's standard library and ``cryptography``, nothing of fedunlearn; a copy of it lies in every signed
folder (trust the copy you fetched yourself). It computes bands, verdict and costs on its own from the formulas of
fedunlearn's documentation, not by calling the tool it checks. Nothing in the folder is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import stat
import statistics
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

DOSSIER, SIGNATURE = "dossier.json", "dossier.sig"
CONFIRMED = "deletion confirmed by "  # an event, with the id of a client behind it
KIND = "approximate unlearning"
# What no verdict says, whatever it is.
LIMITS = (
    "This is approximate unlearning: evidence from audits, no formal bound. An audit nobody thought of could still "
    "find the class.",
    "The verdict is one test at 95 %: up to one retrained model in twenty fails it. Bands of few retrained models are "
    "wide, so that it can overlook much: read the verdicts on the controls beside it.",
    "This is about the named files alone. It does not show that the images of the class, the model before, or copies "
    "of either were deleted, nor which model is in use.",
    "The server learned which class was forgotten, which classes each client holds and their summed activations.",
    "Retrained models follow the recipe's training, or are those that the operator gave. Where the original's weights "
    "came from another training, they are no counterpart of it.",
    "Nothing is claimed about the privacy of single images of the classes that stay.",
)
_OF_THE_SYSTEM = "macOS, Windows or a file manager writes such a file where a folder is looked at"
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
_OF_THE_ROW = {"forget", "reestimated", "int8", "int4"}  # figures of a model that has the row of the class
_BESIDE = {"neighbours", "cka", "procrustes", "membership"}  # figures that other retrained models are needed for
# What pages say by the reason; where there is no verdict there are many.
_REASONS = {
    "named": "the model still names the class",
    "class": "it knows more of the class than models retrained without it",
    "apart": "no audit finds more of the class than in models retrained without it, but it is unlike them",
    "pass": "all {} figures lie where one more retrained model is expected",
}
_FEWEST = 3
_PASS = "indistinguishable from retraining"
_NEEDED = ("retain", "probe", "relearn", "neighbours")  # of a pass
_MUST_FAIL = {"original", "head_only"}  # without one of these, or where one passes, so may anything
_FAILED = ("suppressed, not erased", "not forgotten")
# Keys of a cost -> keys of the entries of rounds.jsonl that add up to them.
_COUNTED = {"client_samples": "samples", "client_flops": "flops", "bytes_up": "bytes_up", "bytes_down": "bytes_down"}
COSTS = ("cost", "retraining", "speedup", "speedup_whole")
_ANY = {"schema", "version", "versions", "recipe", "forget", "classes", "engine"}
_FORGOT = {"original", "unlearned", "cost", "privacy"}
_AUDITED = {"controls", "oracles", "audits", "calibration", "verdict", "reason", "decided_by"}
_MAY_HAVE_FORGOT = {"pruned", "fraction", "method", "earlier", "numbers"}
_COMPARED = set(COSTS) - {"cost"}
# Which blocks a command's result.json must have, which it may have, and what costs it counts: they decide what is
# checked.
_OF_COMMAND: dict[str, tuple[set[str], set[str], set[str]]] = {
    "run": (_ANY | _FORGOT | _AUDITED, _MAY_HAVE_FORGOT | _COMPARED, {"unlearn", "retrain", "retrain_whole"}),
    "unlearn": (_ANY | _FORGOT, _MAY_HAVE_FORGOT, {"unlearn"}),
    "audit": (_ANY | _AUDITED | {"model", "client"}, {"earlier", "numbers"}, set()),
}
# Phases of methods that do not prune -> what is asked in each of their steps, and in how many: None for as many as the
# rounds of the repair.
_OF_METHOD: dict[str, dict[str, tuple[str, int | None]]] = {
    **{
        name: {name: ("train", None)}
        for name in ("erase_only", "finetune", "l1_sparse", "neg_grad", "negate", "relabel")
    },
    "salun": {"salun-gradients": ("gradients", 1), "salun": ("train", None)},
    "delete": {"distil": ("train", 1)},
    "scrub": {"scrub": ("train", 1)},
    "ssd": {"ssd-forgotten": ("gradients", 1), "ssd-kept": ("gradients", 1)},
    "svd": {"svd-forgotten": ("moments", 1), "svd-kept": ("moments", 1)},
}
_FRACTIONS = [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]  # cuts of which the smallest is chosen
_FORGOTTEN = 0.05  # mean probability of the class after it
_MOST = sys.maxsize  # steps of a phase whose number nothing says
_RATIOS = {"speedup": "retrain", "speedup_whole": "retrain_whole"}
# Keys of a dossier: those that repeat result.json, and those that are held against files of their own.
_REPEATED = ("recipe", "versions", "audits", "verdict", "reason", "decided_by", "calibration", *COSTS)
_OF_THE_DOSSIER = ("schema", "created", "expires", "key", "files", "acknowledged", "events", "rounds")
# Where pages for people show the verdict.
_ON_PAGES = {
    "report.html": r'<div class="verdict [^"]*">\s*<strong>([^<]*)</strong>',
    "report.md": r"\A# .*: (.*)$",
    "README.md": r"^\*\*Verdict: ([^*]*)\.\*\*",
}
_SCHEMA = 2
_SAME = 0.005  # accuracies, of two passes over the images
_ROUNDING = 1e-6  # of standard errors
_WHOLE = 0.01  # how far a product of rounded numbers may be from a whole one
_EXACT = {"neighbours", "cka", "procrustes", "artefacts"}  # figures that no image error is known of
_BY_CLASS = {"forget", "reestimated", "int8", "int4", "probe"}  # means over classes of the shares of their images
_LEVEL = 0.95  # of all bands together


_Figures = Mapping[str, tuple[float, float]]  # name -> value, standard error
_Bands = Mapping[str, tuple[float, ...]]  # name -> mean, sd, low, high


class _ProblemError(Exception):
    """A check failed; the message says how."""


def problems(folder: Path, key: Path, *, now: datetime | None = None) -> list[str]:
    """Return what is wrong with the dossier in ``folder``, a line each; empty where all is well.

    Args:
        folder: of the run.
        key: the operator's public key, PEM, from somewhere else than the folder.
        now: the time of the check; the present where None.
    """
    found: list[str] = []
    try:
        value = json.loads(_signed(folder, key))
        _readable(value, DOSSIER)
        found += _dates(value, now or datetime.now(UTC))
        found += _files(folder, value)
        if not found:  # what was changed is not read any further
            found += _blocks(folder)
        if not found:  # by its blocks it is decided what else is checked
            audited = "verdict" in _json(folder / "result.json")
            for check in (_statements, _classes, _events, _costs, *((_figures, _pages) if audited else ())):
                found += check(folder, value)
    except _ProblemError as error:
        found.append(str(error))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        found.append(f"{folder}: the dossier cannot be followed: {type(error).__name__}: {error}")
    return found


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of the 32 bytes of a public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()


def _signed(folder: Path, path: Path) -> bytes:
    """Return the bytes of the dossier if ``path`` holds the key that signed them."""
    try:
        text = path.read_bytes()
        if b"PRIVATE KEY" in text:
            raise _ProblemError(f"{path} is a private key: give the public one, {path.name}.pub, and keep this secret")
        if b"PUBLIC KEY" not in text:
            raise _ProblemError(f"{path}: expected a public key in PEM: give the .pub file that keygen wrote")
        key = load_pem_public_key(text)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _ProblemError(f"{path}: expected a public key in PEM, but {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _ProblemError(f"{path}: expected an Ed25519 public key")
    if not folder.is_dir():
        raise _ProblemError(f"{folder}: there is no such folder: check the path")
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


def _readable(value: Mapping[str, Any], name: str) -> None:
    """Refuse a file whose figures stand elsewhere: what is not found there would not be checked."""
    if value["schema"] != _SCHEMA:
        raise _ProblemError(
            f"{name} is of schema {value['schema']}, and this verifier reads schema {_SCHEMA}: take the verifier of "
            "the version that made the folder"
        )


def _dates(dossier: Mapping[str, Any], now: datetime) -> Iterator[str]:
    created, expires = (datetime.fromisoformat(dossier[name]) for name in ("created", "expires"))
    if created > now + _CLOCKS:
        yield f"{DOSSIER} was created at {created.isoformat()}, which is in the future"
    if now > expires:
        yield f"{DOSSIER} expired at {expires.isoformat()}"


def _files(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    listed, found = dossier["files"], set()
    for path in folder.rglob("*"):
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if stat.S_ISREG(mode):
            found.add(name)
        elif not stat.S_ISDIR(mode):
            yield f"{_shown(name)} is a link or device, not a file"
    for name in sorted(found - set(listed) - {DOSSIER, SIGNATURE}):
        yield f"{_shown(name)} is not in the dossier: {_why_added(name)}"
    for name, entry in sorted(listed.items()):
        if name not in found:
            yield f"{_shown(name)} is missing"
        elif entry != {"sha256": _hash(folder / name), "bytes": (folder / name).stat().st_size}:
            yield f"{_shown(name)} was changed{f': {_OF_THE_SYSTEM}' if _is_of_the_system(name) else ''}"


def _why_added(name: str) -> str:
    if _is_of_the_system(name):
        return f"{_OF_THE_SYSTEM}, delete it and verify again"
    return "it was put there after signing; if it is yours, move it out of the folder and verify again"


def _is_of_the_system(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith("._") or last in (".DS_Store", "Thumbs.db", "desktop.ini", ".directory")


def _blocks(folder: Path) -> Iterator[str]:
    """Hold the blocks of result.json against the command that made the folder, by the header of rounds.jsonl."""
    result = _json(folder / "result.json")
    _readable(result, "result.json")
    header = json.loads((folder / "rounds.jsonl").read_bytes().splitlines()[0])
    if header["command"] not in _OF_COMMAND:
        yield f"rounds.jsonl is of {_shown(header['command'])}, whose folders are not signed"
        return
    required, optional, costs = _OF_COMMAND[header["command"]]
    missing, added = required - result.keys(), result.keys() - required - optional
    if missing or added:
        wrong = [
            *(f"{name} is missing" for name in sorted(missing)),
            *(f"{name} is too much" for name in sorted(added)),
        ]
        yield f"result.json has not the blocks that {header['command']} writes: {_shown(', '.join(wrong))}"
        return
    if result.get("cost", {}).keys() - costs or any(
        (ratio in result) != (retrained in result.get("cost", {}))
        or ("retraining" in result) != (retrained in result.get("cost", {}))
        for ratio, retrained in _RATIOS.items()
    ):
        yield f"result.json has costs that {header['command']} does not count, or a speed-up without its cost"
    if "verdict" in result:
        named = {"unlearned", *result["oracles"], *result["controls"]}
        there = {path.stem for path in (folder / "audits").glob("*.json")}
        if there != named:
            yield f"audits has not a file for each model of result.json: {_shown(', '.join(sorted(there ^ named)))}"
        if header["command"] == "run" and not result["controls"].keys() >= _MUST_FAIL:
            yield f"result.json lacks one of the controls that must fail: {', '.join(sorted(_MUST_FAIL))}"
    if "model" in result and (problem := _other_models(result, header)):
        yield problem


def _other_models(result: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """Return what an audit names otherwise than its header: the model, the retrained ones, the model before."""
    if result["model"]["sha256"] != header["model"]:
        return "result.json names another audited model than rounds.jsonl"
    if result["client"] != header["client"]:
        return "result.json names another client than rounds.jsonl"
    if header["oracles"] and header["oracles"].keys() != result["oracles"].keys():
        return "result.json names other retrained models than rounds.jsonl"
    if result["controls"].keys() != (_MUST_FAIL if "original" in header else set()):
        return "result.json and rounds.jsonl differ in whether the model before was audited"
    return ""


def _statements(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Hold what the dossier says against the files."""
    result, files = _json(folder / "result.json"), dossier["files"]
    header = json.loads((folder / "rounds.jsonl").read_bytes().splitlines()[0])
    told = {**result["recipe"], "compute": {**result["recipe"]["compute"]}}
    told["compute"].pop("workers", None)  # may differ between the parts of a run
    if told != header["recipe"]:
        yield "result.json and rounds.jsonl differ in the recipe"
    valid = timedelta(days=result["recipe"]["evidence"]["valid_days"])
    if datetime.fromisoformat(dossier["expires"]) != datetime.fromisoformat(dossier["created"]) + valid:
        yield f"{DOSSIER} does not expire when the recipe says"
    expected = {
        "scope": scope(result),
        "models": models(result, files),
        "clients": {key: entry for key, entry in result["engine"].items() if key != "name"},
        "request": result["recipe"]["evidence"]["request"],
        "thresholds": _json(folder / "thresholds.json") if "verdict" in result else None,
        "data": header["data"],
    }
    for name, value in expected.items():
        if dossier[name] != value:
            yield f"{DOSSIER} and the files differ in {name}"
    for name in _REPEATED:
        if dossier.get(name) != result.get(name):
            yield f"{DOSSIER} and result.json differ in {name}"
    stated = {"kind": KIND, "limits": list(LIMITS), "purged": purged(result)}
    for name, value in stated.items():
        if dossier[name] != value:
            yield f"{DOSSIER}: {name} is not what this verifier knows: it was changed, or is of another version"
    if unknown := dossier.keys() - expected.keys() - stated.keys() - {*_REPEATED, *_OF_THE_DOSSIER}:
        yield f"{DOSSIER} says what is held against nothing: {_shown(', '.join(sorted(unknown)))}"
    method, block = result["recipe"]["unlearn"]["method"], result.get("method", {"name": "prune"})
    if "unlearned" in result and block["name"] != method:
        yield "result.json tells of another method than its recipe"
    if "privacy" in result:
        rules, epsilon = result["privacy"].copy(), result["privacy"]["epsilon"]
        del rules["epsilon"]
        if rules != result["recipe"]["privacy"] or (epsilon is not None) != bool(rules["noise"]):
            yield "result.json tells of another privacy than its recipe"


def purged(result: Mapping[str, Any]) -> list[str]:
    """Return what a dossier says is gone."""
    of_the_model = ["output rows of the forgotten classes", "channels listed in plan.json"]
    return ["states of unfinished rounds", *(of_the_model if "unlearned" in result else ())]


def _pages(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Hold the verdict that the pages for people show; their other words are held against nothing."""
    result = _json(folder / "result.json")
    for name, pattern in _ON_PAGES.items():
        written = name in dossier["files"] and (name != "README.md" or "unlearned" in result)
        if written and re.findall(pattern, (folder / name).read_text("utf-8"), re.MULTILINE) != [result["verdict"]]:
            yield f"{name} does not show the verdict of result.json"


def _classes(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Hold the classes, by number and name, against the recipe and the output rows of the models in the folder."""
    result = _json(folder / "result.json")
    forget, classes, asked = result["forget"], result["classes"], result["recipe"]["unlearn"]["forget"]
    numbers = result.get("numbers", range(len(classes)))
    known = {*(_composed(one) if isinstance(one, str) else one for one in asked)}
    met = [label for label in forget if known & {numbers[label], _composed(classes[label])}]
    if not len(met) == len(set(forget)) == len(forget) == len(asked):
        yield "result.json: the forgotten classes are not those that the recipe asks for"
    everything = list(range(len(classes)))
    rows = {name: everything for name in dossier["files"] if name.startswith("oracles/")}
    if "unlearned" in result:
        rows["original.safetensors"] = everything
        rows["model.safetensors"] = [label for label in everything if label not in forget]
    for name, labels in rows.items():
        about = _about(folder / name)
        if (about["labels"], about["classes"]) != ([numbers[label] for label in labels], [classes[k] for k in labels]):
            yield f"{_shown(name)} has output rows of other classes than result.json tells"


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def scope(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a dossier says of the classes: by name, and the rows of the model by the numbers of the data."""
    classes, forget = result["classes"], result["forget"]
    numbers = result.get("numbers", range(len(classes)))
    before = {"earlier": result["earlier"]} if "earlier" in result else {}
    return before | {
        "forgotten": [classes[label] for label in forget],
        "labels_of_rows": [numbers[label] for label in range(len(classes)) if label not in forget],
    }


def models(result: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a dossier says of the models, by the content of result.json and the hash of each file."""
    if "model" in result:  # audited where it lay
        return {"audited": {key: result["model"][key] for key in ("file", "sha256")}}
    return {"before": files["original.safetensors"], "after": files["model.safetensors"]}


def _events(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Check the chain, and what its events say."""
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
        if event["event"] in seen:
            yield f"events.jsonl: line {seq + 1} repeats an event"
        seen[event["event"]] = (seq, event["facts"])
    if dossier.get("acknowledged", []) != acknowledged(json.loads(line) for line in lines):  # older ones have none
        yield f"{DOSSIER} and events.jsonl differ in who confirmed a deletion"
    if dossier["events"] != {"count": len(lines), "head": previous}:
        yield "events.jsonl ends elsewhere than the dossier says"
    if last > datetime.fromisoformat(dossier["created"]):
        yield "events.jsonl: the last event is later than the dossier"
    yield from _told(folder, dossier, seen)


def _told(folder: Path, dossier: Mapping[str, Any], seen: Mapping[str, tuple[int, Any]]) -> Iterator[str]:
    """Check the order of what happened, and the files that the events speak of."""
    result = _json(folder / "result.json")
    forgot, audited = "unlearned" in result, "verdict" in result
    order = [
        *(("run started", "original ready", "unlearned") if forgot else ()),
        *(("retrained models ready",) if forgot and audited else ()),
        *(("thresholds fixed", "audited") if audited else ()),
        "result written",
    ]
    places = [seen[name][0] for name in order if name in seen]
    if len(places) < len(order) or places != sorted(places):
        yield f"events.jsonl: expected, in this order, {', '.join(order)}"
        return
    facts = {name: event for name, (_, event) in seen.items()}
    if "operator named" in facts and facts["operator named"]["key"] != dossier["key"]:
        yield "events.jsonl names another key than the one that signed, which the report shows"
    spoken = {"result.json": facts["result written"]["sha256"]}
    if audited:
        spoken["thresholds.json"] = facts["thresholds fixed"]["sha256"]
    if forgot:
        spoken["original.safetensors"] = facts["original ready"]["sha256"]
        spoken["model.safetensors"], spoken["plan.json"] = facts["unlearned"]["sha256"], facts["unlearned"]["plan"]
    oracles = facts["retrained models ready"]["sha256"] if forgot and audited else {}
    spoken |= {f"oracles/{name}.safetensors": sha256 for name, sha256 in oracles.items()}
    for name, digest in spoken.items():
        if dossier["files"].get(name, {}).get("sha256") != digest:
            yield f"events.jsonl tells of another {_shown(name)}"
    if (forgot and facts["run started"]["data"] != dossier["data"]) or (
        audited and facts["audited"]["verdict"] != dossier["verdict"]
    ):
        yield "events.jsonl tells of other data or another verdict"
    if forgot and audited and set(oracles) != set(result["oracles"]):
        yield "events.jsonl tells of other retrained models than result.json"


def acknowledged(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the clients that, by the event log, confirmed to have deleted their images of the forgotten classes."""
    return sorted(event["event"].removeprefix(CONFIRMED) for event in events if event["event"].startswith(CONFIRMED))


def _figures(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Compute bands, verdicts and held-out verdicts from the figures of each model."""
    result = _json(folder / "result.json")
    oracles = {name: _own_figures(folder, name) for name in result["oracles"]}
    candidate = _own_figures(folder, "unlearned")
    whole = {name: _own_figures(folder, name) for name in result["controls"]}
    thresholds = _json(folder / "thresholds.json")
    if "figures" not in thresholds:
        yield (
            "thresholds.json follows an older rule, by which each band has a level of its own, so no verdict is "
            "computed: take the verifier of the version that made the folder"
        )
        return
    fixed = thresholds["bands"]
    unknown = set().union(fixed, result["audits"], candidate, *oracles.values(), *whole.values()) - _KINDS.keys()
    if unknown:
        yield (
            f"this verifier does not know the figure {_shown(', '.join(sorted(unknown)))}, so it computes no verdict: "
            "take the verifier of the version that made the folder"
        )
        return
    bands = _bands(list(oracles.values()) if len(oracles) >= _FEWEST else [])
    written = {name: tuple(band[key] for key in ("mean", "sd", "low", "high")) for name, band in fixed.items()}
    if bands.keys() != written.keys() or any(not _near(bands[name], written[name]) for name in bands):
        yield "thresholds.json does not follow from the figures of the retrained models"
    if missing := _missing(written, candidate, elsewhere=_rowless(result)):
        yield f"audits/unlearned.json lacks {', '.join(sorted(missing))}, which the retrained models have"
    yield from _unmeasured(folder, result, oracles, candidate)
    chance = 1 / len(result["classes"])
    yield from _verdicts(result, candidate, whole, written, chance)
    yield from _details(folder, result, {"unlearned": candidate, **whole, **oracles})
    yield from _places(result, candidate, written)
    if result["calibration"] != _held_out(oracles, _shown_by(whole, candidate), chance):
        yield "the held-out verdicts do not follow from the figures"


def _unmeasured(
    folder: Path, result: Mapping[str, Any], oracles: Mapping[str, _Figures], candidate: _Figures
) -> Iterator[str]:
    """Hold models and figures against those that a command measures: what is left out cannot fail."""
    recipe = result["recipe"]
    given = json.loads((folder / "rounds.jsonl").read_bytes().splitlines()[0]).get("oracles")  # by hand
    first = recipe["federation"]["seed"] + 1
    if not given and list(oracles) != [f"retrained-{first + k}" for k in range(recipe["audit"]["oracles"])]:
        yield "result.json has not the retrained models that its recipe asks for"
    for name, figures in {**oracles, "unlearned": candidate}.items():
        needed = _KINDS.keys() - {"artefacts"}
        if len(oracles) == (name in oracles):  # beside no other
            needed -= _BESIDE
        elif _untold(_json(folder / "audits" / f"{name}.json")["details"], result["forget"]):
            needed -= {"membership"}
        # A file from elsewhere may have no rows for the classes.
        if "model" in result and (given or name == "unlearned") and not figures.keys() & _OF_THE_ROW:
            needed -= _OF_THE_ROW
        if missing := needed - figures.keys():
            yield f"audits/{_shown(name)}.json lacks {', '.join(sorted(missing))}, which every run measures"
    if "accuracy" in result.get("model", {}) and _rowless(result) == ("forget" in candidate):
        yield "result.json and audits/unlearned.json differ in whether the model has its rows"
    if "unlearned" in result and "artefacts" not in candidate and not _was_cut(folder / "original.safetensors"):
        yield "audits/unlearned.json lacks artefacts, which every run measures whose original was not cut before"


def _untold(details: Mapping[str, Any], forget: Sequence[int]) -> bool:
    """Return whether members cannot be told from others: none is left that is not both a training and a test image.

    Of the classes to forget no test image is left, or no training image: then none of the others is drawn either.
    """
    told = details.get("membership", {})
    if "forget" in told or not told.get("duplicates_left_out"):
        return False
    tested = sum(sum(details["confusion"][label]) for label in forget)
    return bool(told["duplicates_left_out"] >= tested or "retain" not in told)


def _was_cut(path: Path) -> bool:
    """Return whether a model lost channels before, by the header of its file."""
    return bool(_about(path)["plan"]["kept"])


def _about(path: Path) -> dict[str, Any]:
    """Return what a model's file says of it: the class of each output row, by number and name, and its plan."""
    about: dict[str, Any] = json.loads(_header_of(path)["__metadata__"]["fedunlearn"])
    return about


def _header_of(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: its tensors by name, and what stands beside them."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header


def _details(folder: Path, result: Mapping[str, Any], models: Mapping[str, _Figures]) -> Iterator[str]:
    """Hold figures and accuracies of each model against the counts and curves beside them."""
    classes, images = len(result["classes"]), set()
    audits = {name: _json(folder / "audits" / f"{name}.json") for name in models}
    for name, figures in models.items():
        file, details = f"audits/{_shown(name)}.json", audits[name]["details"]
        counts = details["confusion"]
        if [len(row) for row in counts] != [classes] * classes:
            yield f"{file}: the confusion is not one of {classes} classes"
            continue
        images.add(tuple(map(sum, counts)))
        for what, follows in _following(figures, details, result["forget"]):
            if not follows:
                yield f"{file}: {what}"
        for figure, (value, error) in figures.items():
            least, most = _errors(figure, value, details, result["forget"])
            if not least - _ROUNDING <= error <= most + _ROUNDING:
                yield f"{file}: the standard error of {figure} does not follow from its images"
        for problem in (_named(result, name, figures, counts), _accuracy(result, name, figures, counts)):
            if problem:
                yield problem
    if len(images) > 1:
        yield "the audits of the models were not made on the same test images"
    yield from _beside(audits, list(result["oracles"]))
    if "original" in result:
        one, other = (block["accuracy"].copy() for block in (result["original"], result["controls"]["original"]))
        u, again = (accuracy.pop("forget_row_kept") for accuracy in (one, other))  # of passes over other batches
        same = max([_SAME, *(2 / max(1, _rarest(block, result["forget"])) for block in images)])
        if one != other or ((u is None) != (again is None)) or (u is not None and abs(u - again) > same):
            yield "result.json tells two accuracies of the original"


def _following(figures: _Figures, details: Mapping[str, Any], forget: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """Return what would be wrong with the figures of a model, and whether they follow from the details beside them."""
    counts = details["confusion"]
    kept = [label for label in range(len(counts)) if label not in forget]
    right, shown = sum(counts[label][label] for label in kept), sum(sum(counts[label]) for label in kept)
    yield "R does not follow from the confusion", _near((figures["retain"][0] * shown,), (right,))
    curve = statistics.fmean(details["relearn"]["forget"][1:])
    yield "relearning does not follow from its curve", _near((figures["relearn"][0],), (curve,))
    if "membership" in figures:
        counted = _counted(figures["membership"][0], details, forget)
        yield "membership does not follow from its details", counted
    if "neighbours" in figures:
        pairs = list(zip(details["neighbours"]["output"], details["neighbours"]["retrained"], strict=True))
        apart = [sum(abs(p - q) for p, q in zip(*pair, strict=True)) / 2 for pair in pairs]
        follows = _near((figures["neighbours"][0],), (statistics.fmean(apart),))
        yield "neighbours does not follow from its details", follows
    for figure in ("cka", "procrustes"):
        if figure in figures:
            told = details["representation"]["features"][figure]
            yield f"{figure} does not follow from its details", _near((figures[figure][0],), (told,))
    for shots in ("1", "5", "10"):
        if (figure := f"prototype_{shots}") in figures:
            draws = details["prototype_draws"][shots]
            yield f"{figure} does not follow from its draws", _can_be_mean(figures[figure][0], *draws)


def _can_be_mean(mean: float, low: float, middle: float, high: float) -> bool:
    """Return whether 50 shares with these quantiles (5, 50 and 95 %) can have this mean.

    The quantiles lie between the 3rd and 4th of them, the 25th and 26th, and the 47th and 48th.
    """
    least, most = (3 * 0.0 + 22 * low + 22 * middle + 3 * high) / 50, (3 * low + 22 * middle + 22 * high + 3 * 1.0) / 50
    return 0.0 <= low <= middle <= high <= 1.0 and least - _ROUNDING <= mean <= most + _ROUNDING


def _named(result: Mapping[str, Any], name: str, figures: _Figures, counts: Sequence[Sequence[int]]) -> str:
    """Return what is wrong with the images that a model names as forgotten ones: none without the rows, else U."""
    forget = result["forget"]
    whole = name == "original" or ("model" in result and name == "unlearned" and "forget" in figures)
    if not whole:
        named = any(row[label] for row in counts for label in forget)
        return f"audits/{_shown(name)}.json: classes are named whose output rows are gone" if named else ""
    shown = [sum(row) for row in counts]
    u = statistics.fmean(counts[label][label] / shown[label] for label in forget if shown[label])
    same = max(_SAME, 2 / max(1, _rarest(shown, forget)))
    return "" if abs(u - figures["forget"][0]) <= same else f"audits/{name}.json: U does not follow from the confusion"


def _beside(audits: Mapping[str, Mapping[str, Any]], oracles: Sequence[str]) -> Iterator[str]:
    """Hold against each other which images and which retrained models each model was audited with."""
    if len({audit["images"] for audit in audits.values()}) > 1:
        yield "the audits of the models tell of other images, or of other settings"
    if len({json.dumps(_members(audit["details"])) for audit in audits.values()} - {"null"}) > 1:
        yield "the audits of the models tell of other images for membership"
    states = {name: audit["state"] for name, audit in audits.items()}
    for name, audit in audits.items():
        others = [oracle for oracle in oracles if oracle != name]
        if audit["references"] != [states[oracle] for oracle in others]:
            yield f"audits/{_shown(name)}.json was made beside other retrained models"
        if name in oracles and list(states.values()).count(states[name]) > 1:
            yield f"audits/{_shown(name)}.json is of the same model as another"
        outputs = [audits[oracle]["details"].get("neighbours", {}).get("output") for oracle in others]
        if (
            "neighbours" in audit["details"]
            and all(outputs)
            and not _is_mean(audit["details"]["neighbours"]["retrained"], outputs)
        ):
            yield f"audits/{_shown(name)}.json: neighbours tells of other outputs than those of the retrained models"


def _members(details: Mapping[str, Any]) -> Any:
    """Return how many images membership was told by; None where no other retrained model was there."""
    told = details.get("membership")
    return told and [
        told["duplicates_left_out"],
        *(told.get(name, {}).get(of) for name in ("forget", "retain") for of in ("members", "others")),
    ]


def _is_mean(told: Sequence[Sequence[float]], outputs: Sequence[Sequence[Sequence[float]]]) -> bool:
    """Return whether the rows of ``told`` are the means of those of ``outputs``."""
    rows = zip(told, *outputs, strict=True)
    return all(_near(mean, list(map(statistics.fmean, zip(*values, strict=True)))) for mean, *values in rows)


def _errors(figure: str, value: float, details: Mapping[str, Any], forget: Sequence[int]) -> tuple[float, float]:
    """Return the least and the most that the standard error of a figure can be: bands are the wider the larger it is.

    That of several shares, ``sqrt(sum_k e_k^2) / K``, is known where all of them are ``value``.
    """
    counts = details["confusion"]
    shown = [number for number in (sum(counts[label]) for label in forget) if number]
    if figure in _EXACT:
        return 0.0, 0.0
    if figure == "membership":
        told = details["membership"]["forget"]
        return (_error_of_auc(value, told["members"], told["others"]),) * 2
    if figure == "retain":
        kept = [label for label in range(len(counts)) if label not in forget]
        right, total = sum(counts[label][label] for label in kept), sum(sum(counts[label]) for label in kept)
        return (_error_of_share(right, total),) * 2
    if figure in _BY_CLASS and len(shown) > 1:
        ends = [_error_of_share(0, number) for number in shown], [0.5 / (number + 4) ** 0.5 for number in shown]
        least, most = (math.hypot(*errors) / len(shown) for errors in ends)
        return least, most
    return (math.hypot(*(_error_of_share(round(value * number), number) for number in shown)) / len(shown),) * 2


def _counted(auc: float, details: Mapping[str, Any], forget: Sequence[int]) -> bool:
    """Return whether an AUC is that of its details: a share of pairs, ties half, of as many others as are left."""
    told, counts = details["membership"], details["confusion"]
    members, others = told["forget"]["members"], told["forget"]["others"]
    left = sum(map(sum, counts)) - told["duplicates_left_out"]
    beside = left - others if "retain" not in told else told["retain"]["others"]  # no others, or no members of them
    tested, halves = sum(sum(counts[label]) for label in forget), 2 * auc * members * others
    return bool(
        auc == told["forget"]["auc"]
        and abs(halves - round(halves)) < _WHOLE
        and tested - told["duplicates_left_out"] <= others <= tested
        and others + beside == left
    )


def _error_of_share(right: int, total: int) -> float:
    """Return ``sqrt(p (1-p) / n)``, ``n = total + 4``, ``p = (right + 2) / n``, after Agresti and Coull."""
    p = (right + 2) / (total + 4)
    return float((p * (1 - p) / (total + 4)) ** 0.5)


def _error_of_auc(auc: float, members: int, others: int) -> float:
    """Return the standard error of an AUC after Hanley and McNeil (1982)."""
    of_members = (members - 1) * (auc / (2 - auc) - auc**2)
    of_others = (others - 1) * (2 * auc**2 / (1 + auc) - auc**2)
    return float((max(auc * (1 - auc) + of_members + of_others, 0.0) / (members * others)) ** 0.5)


def _shown_by(controls: Mapping[str, _Figures], candidate: _Figures) -> dict[str, _Figures]:
    """Return controls by the figures that the candidate has: a control could fail by what the candidate lacks."""
    return {name: {key: figures[key] for key in figures if key in candidate} for name, figures in controls.items()}


def _verdicts(
    result: Mapping[str, Any], candidate: _Figures, whole: Mapping[str, _Figures], bands: _Bands, chance: float
) -> Iterator[str]:
    """Judge the controls and the candidate."""
    controls, count = _shown_by(whole, candidate), len(result["oracles"])
    for name, figures in controls.items():
        found, by, sides = _judged(figures, bands, count, chance)
        said = result["controls"][name]
        if found != said["verdict"]:
            yield f"the verdict on {name} does not follow from the figures: they give {found!r}"
        elif by != said["decided_by"] or _reason(found, by, sides) not in (None, said["reason"]):
            yield f"the reason of the verdict on {name} does not follow from the figures"
    verdict, decided, sides = _judged(candidate, bands, count, chance)
    known = "original" not in whole or whole["original"]["forget"][0] > chance
    if not known and verdict != "not forgotten":
        verdict, decided = "no verdict", []
    if verdict == result["verdict"] == _PASS and "model" in result and not controls:
        yield (
            "this audit passes without a model that must fail, by an older rule: take the verifier of the version that "
            "made the folder, and do not rely on the pass"
        )
    elif verdict == _PASS and not _controlled(controls, bands, count, chance):
        verdict, decided = "no verdict", []
    if (verdict, decided) != (result["verdict"], result["decided_by"]):
        yield f"the verdict {result['verdict']!r} does not follow from the figures: they give {verdict!r}"
    elif _reason(verdict, decided, sides) not in (None, result["reason"]):
        yield "the reason of the verdict does not follow from the figures"


def _reason(verdict: str, decided: Sequence[str], sides: Mapping[str, str | None]) -> str | None:
    """Return the reason of a verdict; None where there is no verdict, for one of many reasons."""
    if verdict == "no verdict":
        return None
    if verdict == "not forgotten":
        return _REASONS["named"]
    if verdict == _PASS:
        return _REASONS["pass"].format(len(decided))
    more = any(_KINDS[name] == "class" and sides[name] == "above" for name in decided)
    return _REASONS["class" if more else "apart"]


def _places(result: Mapping[str, Any], candidate: _Figures, bands: _Bands) -> Iterator[str]:
    """Hold each figure of the candidate, and where it lies, against its file and its band."""
    for name in sorted(candidate.keys() | result["audits"].keys()):
        judged, figure = result["audits"].get(name, {}), candidate.get(name, (math.nan, math.nan))
        band = bands.get(name)
        side = None if band is None else _side(figure[0], *band[2:])
        told = tuple(judged.get(key) for key in ("figure", "error", "band", "verdict"))
        if told != (*figure, None if band is None else list(band[2:]), side):
            yield f"result.json: the audit {name} does not follow from audits/unlearned.json"
        elif band is not None and not _near((judged["distance"],), ((figure[0] - band[0]) / band[1],)):
            yield f"result.json: the distance of {name} does not follow from its band"


def _accuracy(result: Mapping[str, Any], name: str, figures: _Figures, counts: Sequence[Sequence[int]]) -> str:
    """Return what is wrong with U and R in the block of a model: they are told there and among its figures."""
    block = result["controls"].get(name) or result["oracles"].get(name) or result.get("unlearned") or result["model"]
    shown = [sum(row) for row in counts]
    stay = sum(number for label, number in enumerate(shown) if label not in result["forget"])
    images = {"forget": _rarest(shown, result["forget"]), "retain": stay}
    for place, (label, row) in enumerate(zip(result["classes"], counts)):
        told, number = block.get("accuracy", {}).get("per_class", {}).get(label), sum(row)
        if told is not None and (not number or abs(told - row[place] / number) > max(_SAME, 2 / number)):
            return f"result.json: the accuracy of {_shown(name)} on {_shown(label)} is not that of its confusion"
    for key, figure in (("retain", "retain"), ("forget_row_kept", "forget")):
        told, audited = block.get("accuracy", {}).get(key), figures.get(figure)
        same = max(_SAME, 2 / max(1, images[figure]))  # two images may fall the other way
        if told is not None and audited is not None and abs(told - audited[0]) > same:
            return f"result.json: the accuracy of {_shown(name)} is not that of audits/{_shown(name)}.json"
    return ""


def _rarest(shown: Sequence[int], forget: Sequence[int]) -> int:
    """Return one over what an image of the rarest forgotten class weighs in U, a mean over the classes."""
    return len(forget) * min((shown[label] for label in forget if shown[label]), default=0)


def _rowless(result: Mapping[str, Any]) -> bool:
    """Return whether the model was audited where it lay, and had no output row for the class."""
    return "model" in result and result["model"].get("accuracy", {}).get("forget_row_kept") is None


def _missing(bands: _Bands, figures: _Figures, *, elsewhere: bool) -> set[str]:
    """Return the figures with a band that a model lacks; one from elsewhere may lack those of the class's row."""
    missing = bands.keys() - figures.keys() - {"artefacts"}
    return set() if elsewhere and missing == _OF_THE_ROW & bands.keys() else missing


def _held_out(oracles: Mapping[str, _Figures], controls: Mapping[str, _Figures], chance: float) -> dict[str, Any]:
    """Return the verdict on each retrained model, and on the controls, by the bands of the others."""
    models: dict[str, Any] = {}
    figures = outside = 0
    for name, held in oracles.items() if len(oracles) >= _FEWEST else ():
        bands = _bands([measured for other, measured in oracles.items() if other != name])
        verdict, _, sides = _judged(held, bands, _FEWEST, chance)
        beyond = [figure for figure, side in sides.items() if side in ("above", "below")]
        figures += sum(side is not None for side in sides.values())
        outside += len(beyond)
        models[name] = {
            "verdict": verdict,
            "outside": beyond,
            "controls": {
                control: _judged(measured, bands, _FEWEST, chance)[0] for control, measured in controls.items()
            },
        }
    return {"models": models, "figures": figures, "false_positives": outside}


def _costs(folder: Path, dossier: Mapping[str, Any]) -> Iterator[str]:
    """Add up the rounds again, and divide."""
    header, *steps = [json.loads(line) for line in (folder / "rounds.jsonl").read_bytes().splitlines()]
    if dossier["rounds"] != rounds(steps):
        yield f"{DOSSIER} and rounds.jsonl differ in the rounds"
    result = _json(folder / "result.json")
    yield from _phases(_planned(folder, result, header, steps), steps, result["recipe"])
    if "fraction" in result and not _bisected(result["fraction"]["attempts"]):
        yield "result.json: the cuts that were tried are not those by which the smallest is chosen"
    if "unlearned" not in result:
        return
    phases = ("measure", "attempt-", "reestimate", "repair", "method.")
    ours = [step for step in steps if step["phase"].startswith(phases)]
    unlearn = dossier["cost"]["unlearn"]
    for key, unit in _COUNTED.items():
        if sum(entry[unit] for step in ours for entry in step["entries"]) != unlearn[key]:
            yield f"the cost of unlearning, {key}, does not follow from rounds.jsonl"
    entries = [entry for step in ours for entry in step["entries"]]
    counted = {
        "rounds": sum(entry["job"] == "train" for entry in entries),
        "clients": len({name for entry in entries for name in entry["clients"]}),
    }
    for key, number in counted.items():
        if number != unlearn[key]:
            yield f"the cost of unlearning, {key}, does not follow from rounds.jsonl"
    if "retrain" in dossier["cost"]:
        yield from _retraining(_json(folder / "retraining.json"), steps, dossier, result)


_Phases = dict[str, tuple[str, Sequence[int]]]  # name -> what is asked in each step, how many steps there may be


def _planned(
    folder: Path, result: Mapping[str, Any], header: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]
) -> _Phases:
    """Return the phases of a command, by its recipe and the models of result.json."""
    recipe, phases = result["recipe"], _Phases()
    if not header.get("oracles"):  # none that were given; those from the cache were not trained here
        whole = [0, recipe["train"]["rounds"]]
        phases |= {f"{name}.retrain": ("train", whole) for name in result.get("oracles", {})}
    if "unlearned" not in result:
        return phases
    if not recipe["model"]["weights"]:
        phases["train"] = ("train", [recipe["train"]["rounds"]])
    table, turns = recipe["unlearn"], 1 if recipe["unlearn"]["jointly"] else len(result["forget"])
    refitted = _refitted(folder, recipe, steps)
    pruned = {f"measure-{turn}": ("measure", [1]) for turn in range(turns)} | _repair(table, refitted)
    if "fraction" in result:
        phases["measure-0"] = pruned["measure-0"]
        for attempt in result["fraction"]["attempts"]:
            tried = _repair(table, refitted) | {"check": ("evaluate", [1])}
            phases |= {f"attempt-{100 * attempt['fraction']:g}.{phase}": own for phase, own in tried.items()}
    elif table["method"] == "prune":
        phases |= pruned
    else:
        ours = {
            phase: (job, [table["rounds"] if number is None else number])
            for phase, (job, number) in _OF_METHOD.get(table["method"], {}).items()
        }
        phases |= {f"method.{phase}": own for phase, own in (ours or pruned).items()}
    beside: dict[str, _Phases] = {
        "random": {f"random.{phase}": own for phase, own in pruned.items()},
        "finetune": {"finetune": ("train", range(1, _MOST))},
        "erase_only": {"erase_only": ("train", [table["rounds"]])},
    }
    for name in beside.keys() & result.get("controls", {}).keys():
        phases |= beside[name]
    return phases


def _repair(table: Mapping[str, Any], refitted: Sequence[int]) -> _Phases:
    """Return the phases of the repair: as many rounds as the recipe says, unless a target may end them before."""
    phases = _Phases() if table["repair"] == "none" else {"reestimate": ("reestimate", refitted)}
    if table["repair"] == "finetune":
        first = table["rounds"] if table["target"] is None else 1
        phases["repair"] = ("train", range(first, table["rounds"] + 1))
    return phases


def _refitted(folder: Path, recipe: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Sequence[int]:
    """Return how many steps re-estimation may have: none of a model without batch normalisation."""
    if not any(name.endswith(".running_mean") for name in _header_of(folder / "original.safetensors")):
        return [0]
    # A network of the user's own may keep such statistics in layers of another kind, which are not re-estimated.
    known = ":" not in recipe["model"]["name"] or any(step["phase"].endswith("reestimate") for step in steps)
    return [1] if known else [0, 1]


def _phases(planned: _Phases, steps: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> Iterator[str]:
    """Hold the steps of a run against its phases: one left out, or under another name, would cost nothing."""
    done: dict[str, list[Mapping[str, Any]]] = {phase: [] for phase in planned}
    for step in steps:
        done.setdefault(step["phase"], []).append(step)
    for phase, those in done.items():
        job, numbers = planned.get(phase, ("", ()))
        if phase not in planned:
            yield f"rounds.jsonl holds {_shown(phase)}, which is no phase of this command and its recipe"
        elif [step["round"] for step in those] != list(range(len(those))):
            yield f"rounds.jsonl: the steps of {phase} are not numbered one after another"
        elif len(those) not in numbers or not _ended(phase, those, recipe["unlearn"]):
            yield f"rounds.jsonl has {len(those)} steps of {phase}, which are not those that the recipe asks for"
        elif any(
            [entry["job"] for entry in step["entries"]] != [job] + ["evaluate"] * (step["validation"] is not None)
            for step in those
        ):
            yield f"rounds.jsonl: a step of {phase} is not one of {job}"


def _bisected(attempts: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether each cut is the middle of those below the last one, where that passed, or above it."""
    for narrowest in range(len(_FRACTIONS)):  # of narrow layers small ones remove nothing
        left, tried = _FRACTIONS[narrowest:], []
        for attempt in attempts:
            middle = len(left) // 2
            tried += left[middle : middle + 1]
            left = left[:middle] if attempt["probability"] <= _FORGOTTEN else left[middle + 1 :]
        if not left and tried == [attempt["fraction"] for attempt in attempts]:
            return True
    return False


def _ended(phase: str, steps: Sequence[Mapping[str, Any]], table: Mapping[str, Any]) -> bool:
    """Return whether a repair went on until its target was reached, or until there were no more rounds."""
    if table["target"] is None or phase.rpartition(".")[2] != "repair":
        return True
    reached = [(step["validation"] or 0.0) >= table["target"] for step in steps]
    return not any(reached[:-1]) and (reached[-1] or len(steps) == table["rounds"])


def _ratio(unlearn: Mapping[str, Any], retrain: Mapping[str, Any]) -> dict[str, float]:
    """Return the cost of retraining over that of unlearning, of what is counted; seconds are of another day."""

    def counted(cost: Mapping[str, Any]) -> dict[str, float]:
        units = {name: cost[name] for name in ("client_flops", "client_samples", "rounds")}
        return units | {"bytes": cost["bytes_up"] + cost["bytes_down"]}

    below, above = counted(unlearn), counted(retrain)
    return {unit: above[unit] / number for unit, number in below.items() if number}


def _retraining(
    kept: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], dossier: Mapping[str, Any], result: Mapping[str, Any]
) -> Iterator[str]:
    """Hold the costs of retraining against the rounds of the retrained models, those from the cache too."""
    found, names = dossier["retraining"], list(result["oracles"])
    if not names or not found.keys() == kept.keys() == set(names):
        yield "the retrained models of the costs, of retraining.json and of result.json are not the same"
        return
    for name in names:
        yield from _trained(name, kept[name], steps, cached=result["oracles"][name]["cached"])
        if not result["recipe"]["audit"]["models"] and not _regular(kept[name], result["recipe"]):
            yield f"the rounds of {_shown(name)} in retraining.json are not those that the recipe asks for"
    unlearn, wanted = dossier["cost"]["unlearn"], result["unlearned"]["validation"]["retain"]
    for name, cost in found.items():
        rounds = _until(kept[name], wanted)
        spent = _spent(kept[name][:rounds])
        if cost["curve"] != _curve(kept[name]):
            yield f"the curve of retraining of {_shown(name)} does not follow from retraining.json"
        if cost["reached"] != (rounds is not None):
            yield f"whether {_shown(name)} was ever as good does not follow from retraining.json"
        if any(cost[unit] != spent[unit] for unit in ("client_samples", "client_flops")):
            yield f"the cost of retraining of {_shown(name)} does not follow from retraining.json"
        if not _near((cost["speedup"],), (spent["client_flops"] / unlearn["client_flops"],)):
            yield f"the speed-up beside {_shown(name)} does not follow from the costs"
    first = kept[names[0]]
    until = _until(first, wanted)
    if dossier["cost"]["retrain"]["reached"] != (until is not None):
        yield "whether the first retrained model was ever as good does not follow from retraining.json"
    for ratio, key in _RATIOS.items():
        retrain, counted = dossier["cost"][key], first[:until] if key == "retrain" else first
        if any(retrain[unit] != number for unit, number in _spent(counted).items()):
            yield f"the cost of retraining, {key}, does not follow from retraining.json"
        told, expected = dossier[ratio], _ratio(unlearn, retrain)
        if told.keys() - {"client_seconds"} != expected.keys() or not all(
            _near((told[unit],), (quotient,)) for unit, quotient in expected.items()
        ):
            yield "the speed-up does not follow from the costs"


def _trained(
    name: str, kept: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], *, cached: bool
) -> Iterator[str]:
    """Hold the rounds of a retrained model against those of the run, which has none where it came from the cache."""
    trained = [step for step in steps if step["phase"] == f"{name}.retrain"]
    if bool(trained) == cached:
        yield f"whether {_shown(name)} was trained here or came from the cache does not follow from rounds.jsonl"
    elif trained and _counts(trained) != _counts(kept):
        yield f"the rounds of {_shown(name)} in retraining.json are not those of rounds.jsonl"


def _regular(kept: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> bool:
    """Return whether a model was retrained in all rounds of the recipe, and measured as often as that says."""
    rounds, every = recipe["train"]["rounds"], recipe["train"]["validate_every"]
    due = [round % every == 0 or round == rounds for round in range(1, rounds + 1)]
    return [step["validation"] is not None for step in kept] == due


def _until(steps: Sequence[Mapping[str, Any]], wanted: float) -> int | None:
    """Return after how many rounds R on validation images first was ``wanted``; None where it never was."""
    looked = [(count, step["validation"]) for count, step in enumerate(steps, 1) if step["validation"] is not None]
    return next((count for count, r in looked if r >= wanted), None)


def _spent(steps: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the rounds, and what training in them cost; evaluations are not counted."""
    trained = [entry for step in steps for entry in step["entries"] if entry["job"] == "train"]
    return {"rounds": len(trained)} | {key: sum(entry[unit] for entry in trained) for key, unit in _COUNTED.items()}


def _counts(steps: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what is counted of each round, and what was measured."""
    units = ("job", *_COUNTED.values())
    return [(step["validation"], [[entry[unit] for unit in units] for entry in step["entries"]]) for step in steps]


def _curve(steps: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return operations so far and accuracy on validation images, where it was measured."""
    spent, curve = 0, []
    for step in steps:
        spent += sum(entry["flops"] for entry in step["entries"] if entry["job"] == "train")
        if step["validation"] is not None:
            curve.append([spent, step["validation"]])
    return curve


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


def _bands(oracles: Sequence[_Figures]) -> dict[str, tuple[float, ...]]:
    """Return ``mean +- t sd sqrt(1 + 1/n)`` with ``sd = max(s, error z / t, 0.001)`` for each figure all of them have.

    ``t`` of Student's t and ``z`` of the normal distribution leave 5 % outside of all these bands together.
    """
    n = len(oracles)
    measured = {
        name: [figures[name] for figures in oracles if name in figures] for name in _KINDS if name not in _FIXED
    }
    usable = {
        name: pairs
        for name, pairs in measured.items()
        if 2 <= len(pairs) == n and all(math.isfinite(number) for pair in pairs for number in pair)
    }
    bands: dict[str, tuple[float, ...]] = dict(_FIXED)
    for name, pairs in usable.items():
        mean = statistics.fmean(value for value, _ in pairs)
        outside = (1 - _LEVEL) / len(usable)
        t, z = _t(n - 1, outside), statistics.NormalDist().inv_cdf(1 - outside / 2)
        error = max(error for _, error in pairs)
        sd = max(statistics.stdev(value for value, _ in pairs), error * z / t, 0.001)
        half = t * (1 + 1 / n) ** 0.5 * sd
        bands[name] = (mean, sd, mean - half, mean + half)
    return bands


def _t(df: int, outside: float) -> float:
    """Return the ``t`` with ``P(|T| > t) = outside`` of Student's t, by bisection of ``atan(t / sqrt(df))``."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _inside(df, angle) < 1 - outside else (low, angle)
    return math.tan(low) * math.sqrt(df)


def _inside(df: int, angle: float) -> float:
    """Return ``P(|T| < sqrt(df) tan(angle))``: a finite sum, Abramowitz and Stegun 26.7.3 and 26.7.4."""
    odd = df % 2
    term, total = math.cos(angle) ** odd, 0.0
    for k in range(2 + odd, df + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


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
    if sides.get("forget") == "above" and figures["forget"][0] > chance:
        return "not forgotten", ["forget"], sides
    if apart:
        return "suppressed, not erased", apart, sides
    if any(sides.get(name) is None for name in (*_NEEDED, *sides)):
        return "no verdict", [], sides
    return _PASS, [name for name, side in sides.items() if side is not None], sides


def _controlled(controls: Mapping[str, _Figures], bands: _Bands, oracles: int, chance: float) -> bool:
    """Return whether a pass counts: models that must fail are there, and do by the figures that the candidate has."""
    beside = [figures for name, figures in controls.items() if name in _MUST_FAIL]
    return bool(beside) and all(_judged(figures, bands, oracles, chance)[0] in _FAILED for figures in beside)


def _side(value: float, low: float, high: float) -> str:
    # A figure that is not a number lies outside.
    return "inside" if low <= value <= high else "below" if value < low else "above"


def _own_figures(folder: Path, name: str) -> dict[str, tuple[float, float]]:
    figures = _json(folder / "audits" / f"{name}.json")["figures"]
    return {figure: (float(entry["value"]), float(entry["error"])) for figure, entry in figures.items()}


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) <= 1e-4 * max(1.0, abs(x), abs(y)) for x, y in zip(a, b, strict=True))


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _shown(name: str) -> str:
    """Return a name without characters that could write a line of their own."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )


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
        checked = (("figures", value["verdict"]), ("costs", value["cost"]))
        parts = ["signature", f"{len(value['files'])} files", f"{value['events']['count']} events"]
        parts += [name for name, there in checked if there]
        print(f"verified: {', '.join(parts[:-1])} and {parts[-1]}")
        if value.get("acknowledged"):
            said = f"{len(value['acknowledged'])} of {_shown(str(value['clients'].get('clients', '?')))} clients"
            print(f"deletion confirmed, as the operator says, by {said}: {_shown(', '.join(value['acknowledged']))}")
        verdict = f"verdict: {value['verdict']}" if value["verdict"] else "not audited: no verdict"
        operator = _shown(value["recipe"]["evidence"].get("operator") or "not named")
        print(f"{verdict} (request {_shown(value['request'] or 'not named')}, {value['created']})")
        print(f"operator {operator}, signed by the key {value['key']}: is that the fingerprint the operator told you?")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
