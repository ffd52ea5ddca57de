"""The audit: bands from retrained models, written down before the candidate is measured, then the verdict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedunlearn.audits.measure import Figure, Measured, View, measure_audits, view
from fedunlearn.audits.subject import AuditImages, Subject
from fedunlearn.audits.verdict import (
    FEWEST,
    INDISTINGUISHABLE,
    Band,
    calibrate,
    judge,
    leave_one_out,
    powerless,
    thresholds_json,
)
from fedunlearn.errors import EvidenceError, RunError
from fedunlearn.files import write_text

THRESHOLDS = "thresholds.json"
FOLDER = "audits"
CANDIDATE = "unlearned"
_MUST_FAIL = ("original", "head_only")  # where one of these passes, the audits have no power


@dataclass(frozen=True, eq=False)
class Findings:
    """What an audit found.

    Attributes:
        bands: per figure, where one more retrained model is expected.
        models: what was measured of each model, ``unlearned`` the candidate.
        judgements: the verdict on the candidate and on each control, see ``judge``.
        held_out: the verdicts on each retrained model by the bands of the others, see ``leave_one_out``.
    """

    bands: Mapping[str, Band]
    models: Mapping[str, Measured]
    judgements: Mapping[str, Mapping[str, Any]]
    held_out: Mapping[str, Any]

    @property
    def verdict(self) -> str:
        """The verdict on the candidate."""
        return str(self.judgements[CANDIDATE]["verdict"])


def audit(
    candidate: Subject,
    *,
    oracles: Mapping[str, Subject],
    controls: Mapping[str, Subject],
    images: AuditImages,
    lr: float,
    artefacts: Mapping[str, Sequence[str]] | None = None,
    folder: Path | None = None,
    fixed: Callable[[str], None] = lambda digest: None,
    observe: Callable[[str, int, int], None] = lambda phase, done, planned: None,
) -> Findings:
    """Judge a model by bands that its retrained counterparts set before it is measured.

    Args:
        candidate: the model.
        oracles: retrained models by name; fewer than three give figures and no verdict.
        controls: models that should fail, by name.
        images: what to audit with.
        lr: learning rate of relearning.
        artefacts: what was found in the files of models, by name of the model, where files were looked at.
        folder: where thresholds.json and, per model, audits/NAME.json go; an audit that was cut off goes on from them.
        fixed: called with the SHA-256 of thresholds.json before the candidate is measured.
        observe: called with ``"audit"``, models done and models planned.

    Raises:
        RunError: thresholds.json is there and says something else, or a file of figures is of another model.
        EvidenceError: two models have the same name.
    """
    names = [*oracles, *controls, CANDIDATE]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise EvidenceError(f"two models are named {twice!r}, by which their figures are told apart: rename one")
    views = {name: view(subject, images) for name, subject in oracles.items()}
    models: dict[str, Measured] = {}

    def measured(name: str, subject: Subject) -> Measured:
        observe("audit", len(models), len(names))
        references = [own for other, own in views.items() if other != name]
        state = _state_hash(subject)
        found = _kept(folder, name, state) or _measure(subject, images, lr, views.get(name), references)
        if artefacts is not None and name in artefacts:
            found.figures["artefacts"] = Figure(float(len(artefacts[name])))
            found.details["artefacts"] = list(artefacts[name])
        _keep(folder, name, state, found)
        models[name] = found
        return found

    own = {name: measured(name, subject).figures for name, subject in oracles.items()}
    bands = calibrate(list(own.values()) if len(own) >= FEWEST else [])
    fixed(_fix(folder, json.dumps(thresholds_json(bands, oracles=len(oracles)), indent=2) + "\n"))
    others = {name: measured(name, subject).figures for name, subject in controls.items()}
    chance = 1 / len(images.test.classes)
    judged = others | {CANDIDATE: measured(CANDIDATE, candidate).figures}
    observe("audit", len(names), len(names))
    judgements = {name: judge(figures, bands, oracles=len(oracles), chance=chance) for name, figures in judged.items()}
    for name in _MUST_FAIL:
        passes = name in judgements and judgements[name]["verdict"] == INDISTINGUISHABLE
        if passes and judgements[CANDIDATE]["verdict"] == INDISTINGUISHABLE:
            judgements[CANDIDATE] = powerless(judgements[CANDIDATE], name)
    return Findings(bands, models, judgements, leave_one_out(own, others, chance=chance))


def _measure(subject: Subject, images: AuditImages, lr: float, own: View | None, references: list[View]) -> Measured:
    return measure_audits(subject, images, lr=lr, own=own or view(subject, images), references=references)


def _fix(folder: Path | None, text: str) -> str:
    """Write the thresholds, or check that they are those written before, and return their hash."""
    if folder is not None:
        path = folder / THRESHOLDS
        if path.exists() and path.read_text("utf-8") != text:
            raise RunError(
                f"{path} was fixed before and says something else than the retrained models do now: "
                "thresholds are not changed once fixed; audit into another --out"
            )
        write_text(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def _state_hash(subject: Subject) -> str:
    digest = hashlib.sha256(json.dumps(subject.labels).encode())
    for model in (subject.model, subject.row_kept):
        for name, tensor in ({} if model is None else model.state_dict()).items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kept(folder: Path | None, name: str, state: str) -> Measured | None:
    path = None if folder is None else folder / FOLDER / f"{name}.json"
    if path is None or not path.exists():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
        figures = {figure: Figure(**own) for figure, own in value["figures"].items()}
        found, state_there = Measured(figures, value["details"]), value["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: expected the figures of an audit, but {error}: delete {path}") from error
    if state_there != state:
        raise RunError(f"{path} holds the figures of another model named {name}: choose another folder")
    return found


def _keep(folder: Path | None, name: str, state: str, found: Measured) -> None:
    if folder is not None:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        figures = {figure: asdict(own) for figure, own in found.figures.items()}
        value = {"state": state, "figures": figures, "details": found.details}
        write_text(folder / FOLDER / f"{name}.json", json.dumps(value, indent=1) + "\n")
