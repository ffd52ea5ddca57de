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
from fedunlearn.evidence.words import (
    GLOSSARY,
    LIMITS,
    MODELS,
    VERDICTS,
    certainty,
    chosen,
    clipped,
    in_short,
    outside,
    sent_to,
    summary,
    unable,
)
from fedunlearn.tabular import amount

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
    cannot_tell = unable(run.result["audits"], run.figures("original"))
    values = {
        "result": run.result,
        "names": ", ".join(run.result["classes"][label] for label in run.result["forget"]),
        "summary": summary(run.result),
        "outside": outside(run.result, cannot_tell),
        "certainty": certainty(run.result),
        "verdicts": VERDICTS,
        "tested": _tested(run),
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
        environment.filters["signed"] = _signed
        environment.filters["amount"] = amount
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


def _signed(distance: float) -> str:
    """Return a distance with its sign; what rounds to 0 has none."""
    text = f"{distance:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _rows(run: RunFolder) -> list[dict[str, Any]]:
    """Return the models of the U/R table with their verdicts: the candidate, the controls, the retrained models."""
    result = run.result
    rows = [
        {"text": text, "block": block, "verdict": _short(block), "candidate": name == "unlearned"}
        for name, text in MODELS.items()
        for block in [{**_own(result, name), **result.get("controls", {}).get(name, {})}]
        if "accuracy" in block  # that of a file audited by an older version has none
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
    own: Mapping[str, Any] = result.get("model" if name == "unlearned" and "model" in result else name, {})
    return own


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
    return [
        (MODELS.get(name, name), _until(run, name)) for name in [*(n for n in MODELS if n in run.models), *run.oracles]
    ]


def _until(run: RunFolder, name: str) -> int | None:
    curve = run.models[name]["details"]["relearn"]
    wanted = 0.95 * run.figures("original")["forget"]
    return Relearned(tuple(curve["samples"]), tuple(curve["forget"])).samples_until(wanted)


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
        "The band is where one more retrained model is expected. Outside: " + ("; ".join(outside) or "none") + ".",
        plots.bands(
            audits,
            [run.figures(name) for name in run.oracles],
            run.figures("original"),
            {name: figure.label for name, figure in FIGURES.items()},
        ),
    )


def _relearning(run: RunFolder) -> Plot:
    curves = {name: own["details"]["relearn"] for name, own in run.models.items()}
    text = "Accuracy on the class as a short training on it brings it back; images count each time they are seen."
    if "original" in run.models:
        back = [own for own in (_until(run, name) for name in run.oracles) if own is not None]
        span = sorted({f"{own:,}" for own in (min(back), max(back))}, key=len) if back else []
        beside = f"; retrained models after {' to '.join(span)}" if back else ""
        own = _until(run, "unlearned")
        after = "not within this training" if own is None else f"after {own:,} images"
        text += f" The unlearned model is back at 95 % of the original's accuracy {after}{beside}."
    return Plot("relearning", "Relearning", text, plots.relearning(curves, oracles=run.oracles))


def _confusion(run: RunFolder) -> Plot:
    counts, names = run.models["unlearned"]["details"]["confusion"], run.result["classes"]
    sent = " ".join(sent_to(counts[label], names, label) for label in run.result["forget"])
    return Plot(
        "confusion",
        "What each class is named",
        f"A row per true class, in % of its test images. {sent}",
        plots.confusion(counts, names),
    )


def _classes(run: RunFolder) -> Plot:
    before, after = (run.result[name]["accuracy"]["per_class"] for name in ("original", "unlearned"))
    oracles = [_numbers(block["accuracy"]["per_class"]) for block in run.result.get("oracles", {}).values()]
    mean = {name: statistics.fmean(own[name] for own in oracles) for name in before} if oracles else {}
    kept = [name for place, name in enumerate(before) if place not in run.result["forget"]]
    now, past = _numbers(after), _numbers(before)
    lost = max(kept, key=lambda name: past[name] - now[name])
    text = f"Of the classes that stay, {lost} lost most: {_percent(past[lost])} % before, {_percent(now[lost])} % now."
    if oracles:
        worst = max(kept, key=lambda name: mean[name] - now[name])
        text += f" Farthest below the retrained models: {worst}, {_percent(now[worst])} % ({_percent(mean[worst])} %)."
    return Plot(
        "classes",
        "Accuracy per class, before and after",
        text,
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
        f"Unlearning ends at R {_percent(r)} % on the clients' validation images after {_flops(spent)}. {beside}. On "
        f"test images R is {_percent(result['audits']['retain']['figure'])} %.",
        plots.work([result["retraining"]], {"unlearned": [(spent, r)]}),
    )


def _flops(count: float) -> str:
    return f"{amount(count / 1e9)} GFLOP"


def _numbers(shares: Mapping[str, float | None]) -> dict[str, float]:
    return {name: share or 0.0 for name, share in shares.items()}


def _of_this_request(run: RunFolder, pruned: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the removed channels as the scores number them: the plan has those of before too."""
    before = read_weights(run.path / "original.safetensors").plan.kept
    own = {}
    for layer, gone in pruned.items():
        staying = before.get(f"{layer}.weight", {}).get(0)
        own[layer] = gone if staying is None else [place for place, c in enumerate(staying) if c in gone]
    return own


def _channels(run: RunFolder) -> list[Plot]:
    """Return the heat map of scores and the feature maps, where the run kept them."""
    drawn = []
    file = run.path / "scores.safetensors"
    if file.exists():
        scores = safetensors.numpy.load_file(file)
        pruned = _of_this_request(run, json.loads((run.path / "plan.json").read_text("utf-8"))["pruned"])
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
                f"Test images, and feature maps of the original in {own.layer}: the forgotten class in the upper rows; "
                f"the {half} channels ranked highest, then the {half} ranked lowest. Bright: the channel reacts there.",
                plots.feature_maps(own.pictures, own.maps, own.rows, titles),
            )
        )
    return drawn
