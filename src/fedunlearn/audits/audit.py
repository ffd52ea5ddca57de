"""The audit: bands from retrained models, written down before the candidate is measured, then the verdict."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedunlearn.arguments import is_name, must_be
from fedunlearn.audits.base import Audit, Figure, Found, Subject, View
from fedunlearn.audits.findings import CANDIDATE, Findings
from fedunlearn.audits.images import AuditImages
from fedunlearn.audits.table import AUDITS
from fedunlearn.audits.verdict import (
    FEWEST,
    MUST_FAIL,
    calibrate,
    controlled,
    judge,
    leave_one_out,
    never_known,
    thresholds_json,
)
from fedunlearn.channels.fit import without_addresses
from fedunlearn.errors import EvidenceError, ModelError, RunError
from fedunlearn.files import write_text

THRESHOLDS = "thresholds.json"
FOLDER = "audits"
ORIGINAL = "original"
_RULES = 3  # of how figures are measured: those by other rules are not taken up
# Figures and details come first in a file in this order, which is older than the table; all others follow.
_ORDER = (
    "retain",
    "forget",
    "reestimated",
    "int8",
    "int4",
    "confusion",
    "probe",
    "probe_retain",
    "prototype_1",
    "prototype_5",
    "prototype_10",
    "prototype_draws",
    "relearn",
    "neighbours",
    "membership",
)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Record:
    """Where an audit writes, and whom it tells.

    Attributes:
        folder: where thresholds.json and, per model, audits/NAME.json go; an audit that was cut off goes on from them.
        fixed: called with the SHA-256 of thresholds.json before the candidate is measured.
        observe: called with ``"audit"``, models done and models planned.
    """

    folder: Path | None = None
    fixed: Callable[[str], None] = lambda digest: None
    observe: Callable[[str, int, int], None] = lambda phase, done, planned: None


def audit(
    candidate: Subject,
    images: AuditImages,
    *,
    oracles: Mapping[str, Subject],
    controls: Mapping[str, Subject] = {},
    record: Record = Record(),
) -> Findings:
    """Judge a model by bands that its retrained counterparts set before it is measured.

    Args:
        candidate: the model.
        images: what to audit with.
        oracles: retrained models by name; fewer than three give figures and no verdict.
        controls: models that should fail, by name; without ``original`` or ``head_only`` no model passes.
        record: where thresholds and figures go.

    Raises:
        RunError: thresholds.json is there and says something else, or a file of figures is of another model, of other
            images or beside other retrained models.
        ModelError: a model's rows, labels and the classes of the images do not fit together, or its weights are not
            finite.
        EvidenceError: two models have the same name, or one has none that a file can have; or a figure is not a finite
            number.
    """
    for what, given in (("oracles", oracles), ("controls", controls)):
        must_be(Mapping, given, f"audit({what}=...)", "models by name, such as {'a': Subject(model)}", EvidenceError)
    names = [*oracles, *controls, CANDIDATE]
    for name in names:
        _check_name(name)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise EvidenceError(f"two models are named {twice!r}, by which their figures are told apart: rename one")
    must_be(AuditImages, images, "audit(images)", "what audit_images(...) returns", EvidenceError)
    # All of them before any is measured: a fault in the last one would waste the rest.
    subjects = [*oracles.items(), *controls.items(), (CANDIDATE, candidate)]
    checked = {name: _checked(name, subject, images) for name, subject in subjects}
    calibrated = calibration(images, {name: checked[name] for name in oracles}, record, planned=len(names))
    for name in [*controls, CANDIDATE]:
        calibrated.measured(name, checked[name])
    record.observe("audit", len(names), len(names))
    judgements = {name: calibrated.judged(name, beside=CANDIDATE) for name in controls}
    judgements[CANDIDATE] = calibrated.judged_beside(CANDIDATE)
    return Findings(calibrated.bands, calibrated.models, judgements, calibrated.held_out(controls, beside=CANDIDATE))


class Calibrated:
    """Bands from retrained models, and what is measured and judged by them.

    Args:
        images: what to audit with.
        oracles: retrained models by name, checked.
        record: where thresholds and figures go.
        planned: how many models are to be measured.

    Attributes:
        bands: per figure, where one more retrained model is expected.
        models: what was measured so far, by name.
    """

    def __init__(self, images: AuditImages, oracles: Mapping[str, Subject], record: Record, planned: int) -> None:
        self._images = images
        self._shown = images.digest()
        self._views = {name: View(subject, images) for name, subject in oracles.items()}
        self._record = record
        self._planned = planned
        self.models: dict[str, Found] = {}
        figures = [self.measured(name, subject).figures for name, subject in oracles.items()]
        self.bands = calibrate(figures if len(figures) >= FEWEST else [])
        record.fixed(
            _fix(record.folder, json.dumps(thresholds_json(self.bands, oracles=len(oracles)), indent=2) + "\n")
        )

    @property
    def _chance(self) -> float:
        return 1 / len(self._images.test.classes)

    def measured(self, name: str, subject: Subject) -> Found:
        """Return the figures of a model, read back where they were measured before.

        Args:
            name: of the file of its figures.
            subject: the model, checked.

        Raises:
            RunError: the file is of another model, of other images or beside other retrained models.
            EvidenceError: a figure is not a finite number.
        """
        self._record.observe("audit", len(self.models), self._planned)
        references = [view for other, view in self._views.items() if other != name]
        seen = self._views.get(name) or View(subject, self._images, before=name == ORIGINAL)
        about = {
            "state": _state_hash(seen.subject),
            "images": self._shown,
            "references": [_state_hash(other.subject) for other in references],
        }
        self.models[name] = _measured(self._record.folder, name, about, seen, references)
        return self.models[name]

    def judged(self, name: str, *, beside: str | None = None) -> dict[str, Any]:
        """Return the verdict on a model that was measured, by the figures that the model ``beside`` has too."""
        return judge(self._figures(name, beside), self.bands, oracles=len(self._views), chance=self._chance)

    def _figures(self, name: str, beside: str | None) -> Mapping[str, Figure]:
        """Return the figures of a control: it could fail by what the candidate ``beside`` it lacks."""
        figures = self.models[name].figures
        shared = figures if beside is None else self.models[beside].figures
        return {key: figures[key] for key in figures if key in shared}

    def judged_beside(self, name: str) -> dict[str, Any]:
        """Return the verdict on a candidate: none where the original did not know the class, see ``controlled``."""
        beside = {control: self.models[control].figures for control in MUST_FAIL if control in self.models}
        judgement = never_known(self.judged(name), beside.get(ORIGINAL, {}), chance=self._chance)
        return controlled(judgement, beside, self.bands, oracles=len(self._views), chance=self._chance)

    def held_out(self, controls: Iterable[str], *, beside: str | None = None) -> dict[str, Any]:
        """Return the verdicts on each retrained model by the bands of the others, see ``leave_one_out``."""
        retrained = {name: self.models[name].figures for name in self._views}
        others = {name: self._figures(name, beside) for name in controls}
        return leave_one_out(retrained, others, chance=self._chance)


def calibration(images: AuditImages, oracles: Mapping[str, Subject], record: Record, *, planned: int) -> Calibrated:
    """Measure retrained models and fix the bands by them; then others are measured, each when it is there.

    Args:
        images: what to audit with.
        oracles: retrained models by name; fewer than three give figures and no verdict.
        record: where thresholds and figures go.
        planned: how many models will be measured, these among them.

    Raises:
        RunError, ModelError, EvidenceError: see ``audit``.
    """
    checked = {name: _checked(name, subject, images) for name, subject in oracles.items()}
    return Calibrated(images, checked, record, planned)


def _check_name(name: object) -> None:
    if not is_name(name):
        raise EvidenceError(
            f"the name of a model names a file, so it must be text in one line without / or \\, got {name!r}: rename it"
        )


def _checked(name: str, subject: Subject, images: AuditImages) -> Subject:
    must_be(Subject, subject, f"the audit of {name}: the model", "a Subject, such as Subject(model)", ModelError)
    return subject.checked(name, len(images.test.classes), images.forget)


def measure(audits: Sequence[Audit], seen: View, references: Sequence[View] = ()) -> Found:
    """Return what ``audits`` find of one model.

    Args:
        audits: rows of the table.
        seen: what the model makes of the images.
        references: what retrained models make of them, this model not among them.

    Raises:
        EvidenceError: an audit gives a figure that it does not declare, which no verdict would heed.
    """
    found = Found()
    for audit in audits:
        part = audit.measure(seen.subject, seen.images, seen, references)
        for name in part.figures:
            if name not in audit.figures:
                raise EvidenceError(
                    f"the audit {audit.name} gives the figure {name!r}, which it does not declare: add it to AUDIT"
                )
        found.figures.update(part.figures)
        found.details.update(part.details)
    return found


def _measured(
    folder: Path | None, name: str, about: Mapping[str, Any], seen: View, references: Sequence[View]
) -> Found:
    """Read the figures of a model or measure them, and write them with what they are ``about``."""
    kept = _kept(folder, name, about)
    found = measure([audit for audit in AUDITS if kept is None or not audit.resumed], seen, references)
    if kept is not None:
        found = Found(kept.figures | found.figures, kept.details | found.details)
    for name_of_figure, figure in found.figures.items():
        if not (math.isfinite(figure.value) and math.isfinite(figure.error)):
            raise EvidenceError(
                f"the audit of {name}: {name_of_figure} is {figure.value} with an error of {figure.error}, which no "
                "band can be held against: retrain or replace this model"
            )
    _keep(folder, name, about, found)
    return found


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
    digest = hashlib.sha256(json.dumps([_RULES, subject.labels]).encode())
    for model in (subject.model, subject.row_kept):
        if model is not None:  # the same weights in other layers are another model
            digest.update(without_addresses(model.module).encode())
        for name, tensor in ({} if model is None else model.module.state_dict()).items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kept(folder: Path | None, name: str, about: Mapping[str, Any]) -> Found | None:
    path = None if folder is None else folder / FOLDER / f"{name}.json"
    if path is None or not path.exists():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
        figures = {figure: Figure(**fields) for figure, fields in value["figures"].items()}
        found, there = Found(figures, value["details"]), {key: value[key] for key in about}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: expected the figures of an audit, but {error}: delete {path}") from error
    for key, of in (
        ("state", f"of another model named {name}, or of this one by an earlier version"),
        ("images", f"of {name} on other images, or by other settings of the audit"),
        ("references", f"of {name} beside other retrained models"),
    ):
        if there[key] != about[key]:
            raise RunError(f"{path} holds the figures {of}: choose another folder")
    return found


def _keep(folder: Path | None, name: str, about: Mapping[str, Any], found: Found) -> None:
    if folder is not None:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        figures = {figure: asdict(value) for figure, value in _in_order(found.figures).items()}
        value = {**about, "figures": figures, "details": _in_order(found.details)}
        write_text(folder / FOLDER / f"{name}.json", json.dumps(value, indent=1) + "\n")


def _in_order(values: Mapping[str, T]) -> dict[str, T]:
    names = sorted(values, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    return {name: values[name] for name in names}
