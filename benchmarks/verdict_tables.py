"""The tables and the picture of docs/results/verdict.md, from benchmarks/verdict.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fedunlearn.audits.table import FIGURES
from fedunlearn.evidence.plots import svg
from fedunlearn.evidence.words import MODELS as LABELS

FILE = Path(__file__).parent / "verdict.json"
_COLOURS = {"3": "#8a8f98", "5": "#3b82c4", "10": "#e07b1f"}


def saw(left: int) -> str:
    """Return the name of models that saw ``left`` images of the class."""
    return f"saw {left} image{'s' * (left > 1)}"


def error_table(value: Mapping[str, Any]) -> str:
    """Return how many of the retrained models fail, by number of retrained models that judge."""
    lines = [
        "| retrained models | fail, odd seeds | fail, even seeds | fail by single bands of 95 % |",
        "|---|---|---|---|",
    ]
    for n, counts in value.items():
        halves = [counts["odd_seeds"], counts["even_seeds"]]
        draws = sum(half["draws"] for half in halves)
        alone = sum(half["failing_by_single_bands"] for half in halves) / draws
        shares = [f"{100 * half['failing'] / half['draws']:.1f} %" for half in halves]
        lines.append(f"| {n} | {shares[0]} | {shares[1]} | {100 * alone:.1f} % |")
    return "\n".join(lines) + "\n"


def power_table(value: Mapping[str, Any]) -> str:
    """Return how many of the verdicts on models that must fail say so, and the figures that most often do with five."""
    lines = [
        "| model | " + " | ".join(f"{n} retrained" for n in value) + " | outside most often, of 5 retrained |",
        "|---" * (len(value) + 2) + "|",
    ]
    for name, five in value["5"]["must_fail"].items():
        shares = [_share(counts["must_fail"][name]) for counts in value.values()]
        often = sorted(five["figures"].items(), key=lambda item: -item[1])[:3]
        shown = ", ".join(f"{FIGURES[figure].label} {100 * count / five['draws']:.0f} %" for figure, count in often)
        shown_name = LABELS.get(name, name)
        lines.append(f"| {shown_name} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + f" | {shown} |")
    return "\n".join(lines) + "\n"


@mpl.rc_context({"svg.fonttype": "none", "font.size": 9.5})
def picture() -> str:
    """Return the share of failing verdicts against the images of the class that a model has seen, as SVG."""
    value = json.loads(FILE.read_text("utf-8"))
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    for n, counts in value.items():
        halves = [counts["odd_seeds"], counts["even_seeds"]]
        points = [(0, sum(half["failing"] for half in halves) / sum(half["draws"] for half in halves))]
        points += [(left, _share(counts["must_fail"][saw(left)])) for left in (1, 4, 16, 64)]
        axes.plot(*zip(*points), "o-", color=_COLOURS[n], markersize=4, label=f"{n} retrained models")
    axes.axhline(0.05, color="#8a8f98", linewidth=0.8, linestyle=":")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks((0, 1, 4, 16, 64), ("0", "1", "4", "16", "64"))
    axes.set(xlabel="images of the class seen in training", ylabel="share of verdicts that fail the model")
    axes.legend(frameon=False)
    return svg(figure, "verdict")


def _share(counted: Mapping[str, Any]) -> float:
    return float(counted["failing"] / counted["draws"])
