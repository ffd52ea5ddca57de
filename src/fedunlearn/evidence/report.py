"""The report of a run: one HTML file that needs nothing else, and the same in Markdown for pull requests.

``write_card`` writes the model card, in the format of the Hugging Face hub.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import safetensors.numpy

from fedunlearn.audits.relearn import Relearned
from fedunlearn.audits.table import FIGURES
from fedunlearn.checkpoint import read_weights
from fedunlearn.evidence import plots
from fedunlearn.evidence.events import EVENTS, OPERATOR
from fedunlearn.evidence.folder import REPORT, RunFolder, write_unsigned
from fedunlearn.evidence.maps import FeatureMaps
from fedunlearn.evidence.words import GLOSSARY, LIMITS, MODELS, chosen, clipped, in_short, sent_to, summary, unable

MARKDOWN = "report.md"
CARD = "README.md"


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    Attributes:
        name: its id in the page.
        title: what it is.
        text: what it says, read to those who do not see it.
        svg: the drawing.
    """

    name: str
    title: str
    text: str
    svg: str


def write_report(folder: Path) -> None:
    """Write report.html and report.md into the folder of an audited run; the same files give the same bytes.

    Raises:
        RunError: the folder does not hold an audited run.
        EvidenceError: the folder is signed, and the signature would no longer fit.
    """
    run = RunFolder.audited(folder)
    plan = folder / "plan.json"
    values = {
        "result": run.result,
        "names": ", ".join(run.result["classes"][label] for label in run.result["forget"]),
        "summary": summary(run.result),
        "chosen": chosen(run.result["fraction"]) if "fraction" in run.result else "",
        "rows": _rows(run),
        "audits": [
            (name, figure.label, figure.question, run.result["audits"][name])
            for name, figure in FIGURES.items()
            if name in run.result["audits"]
        ],
        "unable": unable(run.result["audits"], run.figures("original")),
        "oracle_mean": {name: _mean_of_oracles(run, name) for name in FIGURES},
        "original": run.figures("original"),
        "neighbours": run.models["unlearned"]["details"].get("neighbours", {}),
        "membership": run.models["unlearned"]["details"].get("membership", {}),
        "representation": run.models["unlearned"]["details"].get("representation", {}),
        "retrained_representation": _mean_representation(run),
        "relearned": _relearned(run),
        "models": MODELS,
        "labels": {name: figure.label for name, figure in FIGURES.items()},
        "plots": _plots(run),
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
    texts = {}
    for name in (MARKDOWN, REPORT):  # where the page is there, all is
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("fedunlearn", "evidence/templates"),
            autoescape=name == REPORT,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters["percent"] = _percent
        environment.filters["clipped"] = clipped
        texts[name] = environment.get_template(name).render(values)
    for name, text in texts.items():
        write_unsigned(folder, name, text)


def write_card(folder: Path) -> None:
    """Write README.md, the card of model.safetensors, into the folder of an audited run.

    Raises:
        RunError: the folder does not hold an audited run.
        EvidenceError: the folder is signed, and the signature would no longer fit.
    """
    run = RunFolder.audited(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedunlearn", "evidence/templates"),
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    classes = run.result["classes"]
    weights = read_weights(folder / "model.safetensors")
    text = environment.get_template("card.md").render(
        result=run.result,
        summary=summary(run.result),
        forgotten=[classes[label] for label in run.result["forget"]],
        kept=[name for label, name in enumerate(classes) if label not in run.result["forget"]],
        colours=len(weights.mean or ()),
        limits=LIMITS,
    )
    write_unsigned(folder, CARD, text)


def _record(run: RunFolder) -> dict[str, Any]:
    """Return who asked, when it happened and which files it is about, by the event log; empty text for the unknown."""
    path = run.path / EVENTS
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    events = {own["event"]: own for own in map(json.loads, lines)}

    def when(event: str) -> str:
        return str(events[event]["time"]).replace("T", " ").replace("+00:00", " UTC") if event in events else ""

    def fact(event: str, name: str) -> str:
        return str(events.get(event, {}).get("facts", {}).get(name, ""))

    return {
        "request": run.result["recipe"]["evidence"]["request"],
        "audited": when("audited"),
        "fixed": when("thresholds fixed"),
        "before": fact("original ready", "sha256"),
        "after": fact("unlearned", "sha256"),
        "key": fact(OPERATOR, "key"),
        "folder": run.path.resolve().name,
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _rows(run: RunFolder) -> list[dict[str, Any]]:
    """Return the models of the U/R table with their verdicts: the candidate, the controls, the retrained models."""
    result = run.result
    rows = [
        {"text": text, "block": block, "verdict": _short(block), "candidate": name == "unlearned"}
        for name, text in MODELS.items()
        for block in [{**result.get(name, {}), **result.get("controls", {}).get(name, {})}]
        if block
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


def _short(block: Mapping[str, Any]) -> str:
    return in_short(block["verdict"], block["reason"]) if "verdict" in block else ""


def _mean_of_oracles(run: RunFolder, name: str) -> float | None:
    own = [run.figures(oracle)[name] for oracle in run.oracles if name in run.figures(oracle)]
    return statistics.fmean(own) if own else None


def _mean_representation(run: RunFolder) -> dict[str, dict[str, float]]:
    """Return, per layer, how far retrained models are from each other."""
    own = [run.models[name]["details"]["representation"] for name in run.oracles if len(run.oracles) > 1]
    if not own:
        return {}
    return {
        layer: {kind: statistics.fmean(details[layer][kind] for details in own) for kind in ("cka", "procrustes")}
        for layer in own[0]
    }


def _relearned(run: RunFolder) -> list[tuple[str, int | None]]:
    """Return, per model, the images after which U first reached 95 % of the original's."""
    if "original" not in run.models:
        return []
    wanted = 0.95 * run.figures("original")["forget"]
    found = []
    for name in [*(name for name in MODELS if name in run.models), *run.oracles]:
        curve = run.models[name]["details"]["relearn"]
        reached = Relearned(tuple(curve["samples"]), tuple(curve["forget"])).samples_until(wanted)
        found.append((MODELS.get(name, name), reached))
    return found


def _plots(run: RunFolder) -> dict[str, Plot]:
    result = run.result
    drawn = [_bands(run), _relearning(run), _confusion(run)]
    if "unlearned" in result:
        drawn.append(_classes(run))
    if "retraining" in result:
        drawn.append(_work(run))
    drawn += _channels(run)
    return {plot.name: plot for plot in drawn}


def _bands(run: RunFolder) -> Plot:
    audits = {
        name: run.result["audits"][name]
        for name, figure in FIGURES.items()
        if name in run.result["audits"] and figure.fixed is None
    }
    outside = [FIGURES[name].label for name, audit in audits.items() if audit["verdict"] in ("above", "below")]
    return Plot(
        "bands",
        "Every figure beside its band",
        "The band is where one more retrained model is expected. Outside: " + (", ".join(outside) or "none") + ".",
        plots.bands(
            audits,
            [run.figures(name) for name in run.oracles],
            run.figures("original"),
            {name: figure.label for name, figure in FIGURES.items()},
        ),
    )


def _relearning(run: RunFolder) -> Plot:
    curves = {name: own["details"]["relearn"] for name, own in run.models.items()}
    last = curves["unlearned"]
    return Plot(
        "relearning",
        "Relearning",
        f"Accuracy on the class as a short training brings it back. Unlearned: {100 * last['forget'][0]:.0f} % at the "
        f"start, {100 * last['forget'][-1]:.0f} % after {last['samples'][-1]:,} images.",
        plots.relearning(curves, oracles=run.oracles),
    )


def _confusion(run: RunFolder) -> Plot:
    counts, names = run.models["unlearned"]["details"]["confusion"], run.result["classes"]
    parts = []
    for label in run.result["forget"]:
        total = max(sum(counts[label]), 1)
        top = sorted(range(len(names)), key=lambda other: -counts[label][other])[:3]
        parts.append(f"{names[label]}: " + ", ".join(f"{names[k]} {100 * counts[label][k] / total:.0f} %" for k in top))
    return Plot(
        "confusion",
        "What each class is named",
        "Rows are the true class, in % of its test images. Forgotten " + "; ".join(parts) + ".",
        plots.confusion(counts, names),
    )


def _classes(run: RunFolder) -> Plot:
    before, after = (run.result[name]["accuracy"]["per_class"] for name in ("original", "unlearned"))
    oracles = [_numbers(block["accuracy"]["per_class"]) for block in run.result.get("oracles", {}).values()]
    mean = {name: statistics.fmean(own[name] for own in oracles) for name in before} if oracles else {}
    kept = [name for place, name in enumerate(before) if place not in run.result["forget"]]
    change = max(kept, key=lambda name: abs((after[name] or 0) - (before[name] or 0)))
    return Plot(
        "classes",
        "Accuracy per class, before and after",
        f"The largest change among the kept classes is {change}: {_percent(before[change])} to "
        f"{_percent(after[change])} %.",
        plots.per_class(_numbers(before), _numbers(after), _numbers(mean)),
    )


def _work(run: RunFolder) -> Plot:
    result = run.result
    spent, r = result["cost"]["unlearn"]["client_flops"], result["unlearned"]["validation"]["retain"]
    retrain = result["cost"]["retrain"]
    whole = result["cost"]["retrain_whole"]["client_flops"]
    beside = (
        f"Retraining first got there after {_flops(retrain['client_flops'])}"
        if retrain["reached"]
        else f"Retraining had not got there after {_flops(whole)}, when it ended"
    )
    return Plot(
        "work",
        "R against the work of the clients",
        f"Unlearning ends at R {_percent(r)} % on the clients' validation images after {_flops(spent)}. {beside}.",
        plots.work([result["retraining"]], {"unlearned": [(spent, r)]}),
    )


def _flops(count: float) -> str:
    return f"{count / 1e12:,.3g} TFLOP"


def _numbers(shares: Mapping[str, float | None]) -> dict[str, float]:
    return {name: share or 0.0 for name, share in shares.items()}


def _channels(run: RunFolder) -> list[Plot]:
    """Return the heat map of scores and the feature maps, where the run kept them."""
    drawn = []
    file = run.path / "scores.safetensors"
    if file.exists():
        scores = safetensors.numpy.load_file(file)
        pruned = json.loads((run.path / "plan.json").read_text("utf-8"))["pruned"]
        gone = sum(len(channels) for channels in pruned.values())
        total = sum(len(own) for own in scores.values())
        drawn.append(
            Plot(
                "scores",
                "Channel scores and what was removed",
                f"A row per layer, darker for a higher score within the layer: {gone} of {total} channels were "
                "removed, in orange.",
                plots.scores(dict(sorted(scores.items())), pruned),
            )
        )
    file = run.path / "maps.safetensors"
    if file.exists():
        own = FeatureMaps.load(file)
        half = len(own.columns) // 2
        titles = [f"{'high' if place < half else 'low'} {channel}" for place, channel in enumerate(own.columns)]
        drawn.append(
            Plot(
                "maps",
                "What channels saw",
                f"Feature maps of the original in {own.layer}: the forgotten class in the upper rows; the {half} "
                f"channels ranked highest, then the {half} ranked lowest.",
                plots.feature_maps(own.pictures, own.maps, own.rows, titles),
            )
        )
    return drawn
