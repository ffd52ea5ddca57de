"""Which plots a run gets, and what each says to those who do not see it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.numpy

from fedunlearn.audits.relearn import Relearned
from fedunlearn.audits.table import FIGURES
from fedunlearn.checkpoint import read_weights
from fedunlearn.evidence import plots
from fedunlearn.evidence.folder import BEFORE, MAPS, PLAN, SCORES, RunFolder
from fedunlearn.evidence.maps import FeatureMaps
from fedunlearn.evidence.words import sent_to
from fedunlearn.tabular import amount, percent


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


def plots_of(run: RunFolder) -> dict[str, Plot]:
    """Return the plots that a run's files are enough for, by name, in the order of the page."""
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
    curves = {name: model["details"]["relearn"] for name, model in run.models.items()}
    text = "Accuracy on the class as a short training on it brings it back; images count each time they are seen."
    if "original" in run.models:
        back = [images for images in (until_back(run, name) for name in run.oracles) if images is not None]
        span = dict.fromkeys(f"{images:,}" for images in (min(back), max(back))) if back else ()
        beside = f"; retrained models after {' to '.join(span)}" if back else ""
        images = until_back(run, "unlearned")
        after = "not within this training" if images is None else f"after {images:,} images"
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
    mean = {name: statistics.fmean(shares[name] for shares in oracles) for name in before} if oracles else {}
    # A class without test images is one of which nothing is known.
    kept = [name for k, name in enumerate(before) if k not in run.result["forget"] and before[name] is not None]
    now, past = _numbers(after), _numbers(before)
    lost = max(kept, key=lambda name: past[name] - now[name])
    text = "Of the classes that stay, none lost."
    if past[lost] > now[lost]:
        change = f"{percent(past[lost])} % before, {percent(now[lost])} % now"
        text = f"Of the classes that stay, {lost} lost most: {change}."
    if oracles:
        worst = max(kept, key=lambda name: mean[name] - now[name])
        far = f"Farthest below the retrained models: {worst}, {percent(now[worst])} % ({percent(mean[worst])} %)."
        text += f" {far if mean[worst] > now[worst] else 'None lies below the retrained models.'}"
    return Plot(
        "classes",
        "Accuracy per class, before and after",
        text,
        plots.per_class(_numbers(before), _numbers(after), _numbers(mean)),
    )


def _work(run: RunFolder) -> Plot:
    result = run.result
    spent, r = result["cost"]["unlearn"]["client_flops"], result["unlearned"]["validation"]["retain"]
    found = list(result["retraining"].values())
    there = sorted(oracle["client_flops"] for oracle in found if oracle["reached"])
    late = sorted(oracle["curve"][-1][0] for oracle in found if not oracle["reached"])
    beside = []
    if there:
        beside.append(f"Retraining first got there after {_from_to(there)}")
    if late:
        which = "Retraining" if len(found) == 1 else f"{len(late)} of {len(found)} retrained models"
        beside.append(f"{which} had not got there after {_from_to(late)}, at the end of all rounds")
    return Plot(
        "work",
        "R against the work of the clients",
        f"Unlearning ends at R {percent(r)} % on the clients' validation images after {_flops(spent)}. "
        f"{'. '.join(beside)}. On "
        f"test images R is {percent(result['audits']['retain']['figure'])} %.",
        plots.work([oracle["curve"] for oracle in found], {"unlearned": [(spent, r)]}),
    )


def _from_to(counts: Sequence[float]) -> str:
    """Return the first and the last of ``counts``, once where they read the same."""
    first, last = _flops(counts[0]), _flops(counts[-1])
    return first if first == last else f"{first} to {last}"


def _flops(count: float) -> str:
    return f"{amount(count / 1e9)} GFLOP"


def _numbers(shares: Mapping[str, float | None]) -> dict[str, float]:
    return {name: share or 0.0 for name, share in shares.items()}


def _of_this_request(run: RunFolder, pruned: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the removed channels as the scores number them: the plan has those of before too."""
    before = read_weights(run.path / BEFORE).plan.kept
    removed = {}
    for layer, gone in pruned.items():
        staying = before.get(f"{layer}.weight", {}).get(0)
        removed[layer] = gone if staying is None else [place for place, c in enumerate(staying) if c in gone]
    return removed


def _channels(run: RunFolder) -> list[Plot]:
    """Return the heat map of scores and the feature maps, where the run kept them."""
    drawn = []
    file = run.path / SCORES
    if file.exists():
        scores = safetensors.numpy.load_file(file)
        pruned = _of_this_request(run, json.loads((run.path / PLAN).read_text("utf-8"))["pruned"])
        gone = sum(len(channels) for channels in pruned.values())
        total = sum(len(layer) for layer in scores.values())
        drawn.append(
            Plot(
                "scores",
                "Channel scores and what was removed",
                f"A row per layer, darker for a higher score within the layer: {gone} of {total} channels were "
                "removed, in orange.",
                plots.scores(dict(sorted(scores.items())), pruned),
            )
        )
    file = run.path / MAPS
    if file.exists():
        maps = FeatureMaps.load(file)
        half = len(maps.columns) // 2
        titles = [f"{'high' if place < half else 'low'} {channel}" for place, channel in enumerate(maps.columns)]
        drawn.append(
            Plot(
                "maps",
                "What channels saw",
                f"Test images, and feature maps of the original in {maps.layer}: the forgotten class in the upper "
                f"rows; the {half} channels ranked highest, then the {half} ranked lowest. Bright: the channel reacts "
                "there.",
                plots.feature_maps(maps.pictures, maps.maps, maps.rows, titles),
            )
        )
    return drawn


def until_back(run: RunFolder, name: str) -> int | None:
    """Return the images of relearning after which a model's U first reached 95 % of the original's."""
    curve = run.models[name]["details"]["relearn"]
    wanted = 0.95 * run.figures("original")["forget"]
    return Relearned(tuple(curve["samples"]), tuple(curve["forget"])).samples_until(wanted)
