"""The page of a comparison of methods: one table, a plot of R and depth against work, a card for each method."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from fedunlearn.audits.table import FIGURES
from fedunlearn.errors import RunError
from fedunlearn.evidence.folder import REPORT, check_schema, readable
from fedunlearn.evidence.pages import rendered
from fedunlearn.evidence.words import clipped, in_short, unable
from fedunlearn.files import write_text

COMPARISON = "compare.json"
# Figures of the table, beside U and R: what is left of the class, and how unlike a retrained model a model is.
DEPTH = ("probe", "prototype_10", "relearn", "neighbours", "cka", "procrustes")


def write_comparison(folder: Path) -> None:
    """Write report.html of the comparison in ``folder``; the same compare.json gives the same bytes.

    Raises:
        RunError: the folder holds none.
    """
    file = folder / COMPARISON
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: expected what fedunlearn compare writes, but {error}") from error
    check_schema(file, value)
    with readable(folder):
        text = _page(value)
    write_text(folder / REPORT, text)


def _page(value: Mapping[str, Any]) -> str:
    from fedunlearn.evidence import plots  # slow to import: who only wants the table needs none

    rows, told = summary(value), telling(value)
    shown = [name for name in DEPTH if name in value["bands"] or any(name in row["figures"] for row in rows)]
    values = {
        "value": value,
        "names": ", ".join(value["classes"][label] for label in value["forget"]),
        "rows": rows,
        "shown": shown,
        "labels": {name: figure.label for name, figure in FIGURES.items()},
        "bands": {name: clipped(band, name) for name, band in value["bands"].items() if name in FIGURES},
        "original": value["original"]["figures"],
        "cannot": blind(value),
        "plot": plots.compared(rows, value["retrained"], told, FIGURES[told].label),
        "told": FIGURES[told].label,
    }
    return rendered("comparison.html", values)


def blind(value: Mapping[str, Any]) -> list[str]:
    """Return the figures that cannot tell here: the original lies in the band, or anything does."""
    return unable({name: {"band": band} for name, band in value["bands"].items()}, value["original"]["figures"])


def telling(value: Mapping[str, Any]) -> str:
    """Return the first of the figures of depth that finds the class in the original."""
    cannot = blind(value)
    return next((name for name in DEPTH if name not in cannot), DEPTH[0])


def summary(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row of the table for each method with its settings: means over seeds, with the lowest and the highest.

    Args:
        value: content of compare.json.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, cell in value["cells"].items():
        groups.setdefault(name.rpartition("-seed")[0], []).append(cell)
    rows: list[dict[str, Any]] = []
    for name, cells in groups.items():
        method = value["methods"][cells[0]["method"]]
        names = [figure for figure in cells[0]["figures"] if all(figure in cell["figures"] for cell in cells)]
        rows.append(
            {
                "number": len(rows) + 1,
                "name": name,
                "tuned": name != cells[0]["method"],
                "method": cells[0]["method"],
                "label": method["label"] + (", tuned" if name != cells[0]["method"] else ""),
                "used": cells[0]["used"],
                "same": len(cells) > 1 and all(cell["figures"] == cells[0]["figures"] for cell in cells),
                "seeds": len(cells),
                "u": _spread([cell["accuracy"]["forget_row_kept"] for cell in cells]),
                "r": _spread([cell["accuracy"]["retain"] for cell in cells]),
                "parameters": cells[0]["parameters"],
                "figures": {figure: _spread([cell["figures"][figure] for cell in cells]) for figure in names},
                "speedup": speedup(cells),
                "reached": all(cell.get("speedup_reached", True) for cell in cells),
                "flops": mean(cell["cost"]["client_flops"] for cell in cells),
                "verdicts": dict(Counter(in_short(cell["verdict"], cell["reason"]) for cell in cells)),
                "outside": dict(Counter(figure for cell in cells for figure in cell["outside"])),
            }
        )
    return rows


def speedup(cells: Sequence[Mapping[str, Any]]) -> tuple[float, float, float] | None:
    """Return the speed-up to equal R over seeds and retrained models."""
    if not all("speedup" in cell for cell in cells):
        return None
    ranges = [cell["speedup_range"] for cell in cells]
    return mean(cell["speedup"] for cell in cells), min(map(min, ranges)), max(map(max, ranges))


def _spread(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Return mean, lowest and highest; None where a value is missing."""
    known = [value for value in values if value is not None]
    return (mean(known), min(known), max(known)) if len(known) == len(values) else None
