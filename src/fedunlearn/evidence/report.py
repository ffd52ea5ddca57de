"""The report of a run: one HTML file that needs nothing else, and the same in Markdown for pull requests.

``write_card`` writes the model card, in the format of the Hugging Face hub.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedunlearn.audits.table import FIGURES
from fedunlearn.checkpoint import read_weights
from fedunlearn.evidence.events import EVENTS, OPERATOR, events_of
from fedunlearn.evidence.folder import MODEL, PLAN, REPORT, RunFolder, readable, write_unsigned
from fedunlearn.evidence.pages import rendered
from fedunlearn.evidence.pictures import plots_of, until_back
from fedunlearn.evidence.speedup import to_equal_r
from fedunlearn.evidence.verify import LIMITS
from fedunlearn.evidence.words import (
    GLOSSARY,
    MODELS,
    VERDICTS,
    certainty,
    chosen,
    hint,
    in_short,
    means,
    outside,
    sent_to,
    summary,
    unable_of,
)

MARKDOWN = "report.md"
CARD = "README.md"


def write_report(folder: Path) -> None:
    """Write report.html and report.md into the folder of an audited run; the same files give the same bytes.

    Raises:
        RunError: the folder does not hold an audited run, or its files do not hold what one writes.
        EvidenceError: the folder is signed, and the signature would no longer fit.
    """
    with readable(folder):
        values = _values(RunFolder.audited(folder))
        texts = {name: rendered(name, values) for name in (MARKDOWN, REPORT)}
    for name in (MARKDOWN, REPORT):  # where the page is there, all is
        write_unsigned(folder, name, texts[name])


def _values(run: RunFolder) -> dict[str, Any]:
    """Return what the templates ask for."""
    plan = run.path / PLAN
    cannot_tell = unable_of(run)
    return {
        "result": run.result,
        "names": ", ".join(run.result["classes"][label] for label in run.result["forget"]),
        "summary": summary(run.result, cannot_tell),
        "outside": outside(run.result, cannot_tell),
        "certainty": certainty(run.result) or hint(run.result, run.figures("original")),
        "verdicts": VERDICTS,
        "tested": _tested(run),
        "compared": to_equal_r(run.result),
        "chosen": chosen(run.result["fraction"]) if "fraction" in run.result else "",
        "rows": _rows(run),
        "audits": [
            (name, figure.label, figure.question, run.result["audits"][name])
            for name, figure in FIGURES.items()
            if name in run.result["audits"]
        ],
        "unable": cannot_tell,
        "oracle_mean": {name: _mean_of_oracles(run, name) for name in FIGURES},
        "original": run.figures("original"),
        "membership": run.models["unlearned"]["details"].get("membership", {}),
        "representation": run.models["unlearned"]["details"].get("representation", {}),
        "retrained_representation": _mean_representation(run),
        "relearned": _relearned(run),
        "models": MODELS,
        "labels": {name: figure.label for name, figure in FIGURES.items()},
        "plots": plots_of(run),
        "pruned": json.loads(plan.read_text("utf-8"))["pruned"] if plan.exists() else {},
        "recipe": json.dumps(run.result["recipe"], indent=2),
        "limits": LIMITS,
        "glossary": GLOSSARY,
        "record": _record(run),
        "sent": [
            sent_to(run.models["unlearned"]["details"]["confusion"][label], run.result["classes"], label)
            for label in run.result["forget"]
        ],
    }


def write_card(folder: Path) -> None:
    """Write README.md, the card of model.safetensors, into the folder of an audited run.

    Raises:
        RunError: the folder does not hold an audited run.
        EvidenceError: the folder is signed, and the signature would no longer fit.
    """
    run = RunFolder.audited(folder)
    classes = run.result["classes"]
    weights = read_weights(folder / MODEL)
    values = {
        "result": run.result,
        "summary": summary(run.result, unable_of(run)),
        "forgotten": [classes[label] for label in run.result["forget"]],
        "means": means(run.result),
        "kept": [name for label, name in enumerate(classes) if label not in run.result["forget"]],
        "colours": len(weights.mean or ()),
        "limits": LIMITS,
    }
    write_unsigned(folder, CARD, rendered("card.md", values))


def _record(run: RunFolder) -> dict[str, Any]:
    """Return who asked, when it happened and which files it is about, by the event log; empty text for the unknown."""
    events = events_of(run.path / EVENTS)

    def when(event: str) -> str:
        return str(events[event]["time"]).replace("T", " ").replace("+00:00", " UTC") if event in events else ""

    def fact(event: str, name: str) -> str:
        return str(events.get(event, {}).get("facts", {}).get(name, ""))

    return {
        **{name: run.result["recipe"]["evidence"].get(name, "") for name in ("request", "operator", "valid_days")},
        "forgotten": when("unlearned"),
        "audited": when("audited"),
        "fixed": when("thresholds fixed"),
        "before": fact("original ready", "sha256"),
        "after": fact("unlearned", "sha256"),
        "key": fact(OPERATOR, "key"),
        "signed": when(OPERATOR),
    }


def _tested(run: RunFolder) -> int:
    """Return the number of test images of the forgotten classes."""
    counts = run.models["unlearned"]["details"]["confusion"]
    return sum(sum(counts[label]) for label in run.result["forget"])


def _rows(run: RunFolder) -> list[dict[str, Any]]:
    """Return the models of the U/R table with their verdicts: the candidate, the controls, the retrained models."""
    result = run.result
    rows = [
        {"text": text, "block": block, "verdict": _short(block), "candidate": name == "unlearned"}
        for name, text in MODELS.items()
        for block in [{**_own(result, name), **result.get("controls", {}).get(name, {})}]
        if "accuracy" in block  # not every run has every model
    ]
    for row in rows:
        if row["candidate"]:
            row["verdict"] = _short(result)
    held_out = result.get("calibration", {}).get("models", {})
    rows += [
        {"text": name, "block": block, "verdict": held_out.get(name, {}).get("verdict", ""), "candidate": False}
        for name, block in result.get("oracles", {}).items()
        if block
    ]
    return rows


def _own(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the block of a model on the way to the candidate, which an audit of a file has as ``model``."""
    block: Mapping[str, Any] = result.get("model" if name == "unlearned" and "model" in result else name, {})
    return block


def _short(block: Mapping[str, Any]) -> str:
    return in_short(block["verdict"], block["reason"]) if "verdict" in block else ""


def _mean_of_oracles(run: RunFolder, name: str) -> float | None:
    values = [run.figures(oracle)[name] for oracle in run.oracles if name in run.figures(oracle)]
    return statistics.fmean(values) if values else None


def _mean_representation(run: RunFolder) -> dict[str, dict[str, float]]:
    """Return, per layer, how far retrained models are from each other."""
    measured = [run.models[name]["details"]["representation"] for name in run.oracles if len(run.oracles) > 1]
    if not measured:
        return {}
    return {
        layer: {kind: statistics.fmean(details[layer][kind] for details in measured) for kind in ("cka", "procrustes")}
        for layer in measured[0]
    }


def _relearned(run: RunFolder) -> list[tuple[str, int | None]]:
    """Return, per model, the images after which U first reached 95 % of the original's."""
    if "original" not in run.models:
        return []
    return [
        (MODELS.get(name, name), until_back(run, name))
        for name in [*(n for n in MODELS if n in run.models), *run.oracles]
    ]
