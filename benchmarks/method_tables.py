"""The tables and pictures of docs/results/methods.md, from what fedunlearn compare wrote into benchmarks/methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.markdown import head_of, row_of, spread
from fedunlearn.audits.table import FIGURES
from fedunlearn.evidence.comparison import DEPTH, summary, telling
from fedunlearn.evidence.plots import compared
from fedunlearn.evidence.words import clipped

FOLDER = Path(__file__).parent / "methods"


def read(name: str) -> dict[str, Any]:
    """Return the comparison of a recipe."""
    value: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    return value


def method_table(name: str) -> str:
    """Return U, R, depth, speed-up and verdict of each method: the mean, the lowest and the highest over the seeds."""
    value = read(name)
    shown = [figure for figure in DEPTH if figure in value["original"]["figures"] or figure in value["bands"]]
    head = ["method", "U", "R", *(FIGURES[figure].label for figure in shown), "speed-up", "outside the bands"]
    lines = head_of(head)
    for row in summary(value):
        outside = [FIGURES[figure].label for figure in row["outside"]]
        seeds = "" if row["seeds"] == len(value["seeds"]) else f" ({row['seeds']} of {len(value['seeds'])} seeds)"
        lines.append(
            row_of(
                [
                    f"{row['number']} `{row['name']}`{seeds}",
                    *(of_three(values) for values in (row["u"], row["r"])),
                    *(of_three(row["figures"].get(figure)) for figure in shown),
                    ("" if row["reached"] else "> ") + of_three(row["speedup"], 1),
                    f"{len(outside)}: {', '.join(outside)}" if outside else "none",
                ]
            )
        )
    for failed, why in value["failed"].items():
        lines.append(row_of([f"`{failed}`", f"failed: {why}", *[""] * (len(head) - 2)]))
    original = value["original"]
    lines.append(
        row_of(
            ["original", *(f"{100 * original[key]:.1f}" for key in ("forget", "retain"))]
            + [f"{100 * original['figures'][figure]:.1f}" if figure in original["figures"] else "" for figure in shown]
            + ["", ""]
        )
    )
    oracles = list(value["retrained"].values())
    known = [[oracle["figures"][figure] for oracle in oracles] for figure in shown]
    lines.append(
        row_of(
            [
                f"{len(oracles)} retrained",
                *(spread([oracle[key] for oracle in oracles], 100) for key in ("forget_row_kept", "retain")),
            ]
            + [spread(values, 100) for values in known]
            + ["", ""]
        )
    )
    bands = [clipped(value["bands"][figure], figure) for figure in ("forget", "retain", *shown)]
    lines.append(row_of(["band", *(f"{100 * low:.1f} to {100 * high:.1f}" for low, high in bands), "", ""]))
    return "\n".join(lines) + "\n"


def trial_table(name: str) -> str:
    """Return the settings that were published and those that tuning chose, with their scores on validation images."""
    lines = head_of(("method", "published", "score", "chosen", "score", "tried"))
    for method, about in read(name)["methods"].items():
        trials = about.get("trials", [])
        if not trials or about["tuned"] is None:
            continue
        best = next(trial for trial in trials if trial["settings"] == about["tuned"])
        cells = [part for trial in (trials[0], best) for part in (_settings(trial["settings"]), _score(trial))]
        lines.append(row_of([f"`{method}`", *cells, str(len(trials))]))
    return "\n".join(lines) + "\n"


def pictures() -> dict[str, str]:
    """Return the plot of each comparison by recipe, as SVG."""
    made = {}
    for path in sorted(FOLDER.glob("*.json")):
        value = read(path.stem)
        told = telling(value)
        made[path.stem] = compared(summary(value), value["retrained"], told, FIGURES[told].label)
    return made


def _score(trial: dict[str, Any]) -> str:
    return f"{100 * trial['score']:.1f}" if "score" in trial else "failed"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.3g}" for key, value in settings.items() if value is not None) or "as the recipe"


def of_three(value: tuple[float, float, float] | None, factor: float = 100) -> str:
    """Return mean, lowest and highest as text; the one value where they agree, a dash where there is none."""
    if value is None:
        return "-"
    middle, low, high = (f"{factor * number:.1f}" for number in value)
    return middle if low == high else f"{middle} ({low} to {high})"
