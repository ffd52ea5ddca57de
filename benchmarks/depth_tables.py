"""The tables and pictures of docs/results/depth.md, from the files in benchmarks/depth."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.markdown import head_of, row_of, spread
from benchmarks.method_tables import of_three
from fedunlearn.audits.table import FIGURES
from fedunlearn.evidence.comparison import DEPTH
from fedunlearn.evidence.plots import svg

FOLDER = Path(__file__).parent / "depth"
_MARKS = (8.9, 40)  # times fewer operations: the paper's figure for ResNet20 and CIFAR-10, and our goal
_COLOURS = ("#3b82c4", "#2f9e6e", "#8a8f98", "#e07b1f", "#9a63b5", "#c44f4f")


def read(recipe: str) -> dict[str, Any]:
    """Return what was measured of a recipe."""
    value: dict[str, Any] = json.loads((FOLDER / f"{recipe}.json").read_text("utf-8"))
    return value


def work_table(recipe: str) -> str:
    """Return U, R, depth and speed-ups of each method by the epochs of its clients: mean and range over the seeds."""
    value = read(recipe)
    head = [
        "method",
        "epochs",
        "U",
        "R",
        *(FIGURES[name].label for name in DEPTH),
        "speed-up",
        "whole schedule",
        "outside",
    ]
    lines = head_of(head)
    for method in methods(value):
        for epochs, cells in value["epochs"].items():
            of_seeds = [cell for cell in cells.values() if cell["method"] == method]
            seeds = f" ({len(of_seeds)} seed)" if len(of_seeds) == 1 else ""
            lines.append(
                row_of(
                    [
                        f"`{method}`{seeds}",
                        epochs,
                        *(
                            spread([cell["accuracy"][key] for cell in of_seeds], 100)
                            for key in ("forget_row_kept", "retain")
                        ),
                        *(spread([cell["figures"][name] for cell in of_seeds], 100) for name in DEPTH),
                        ("" if all(cell["speedup_reached"] for cell in of_seeds) else "> ") + _speedup(of_seeds),
                        spread([cell["speedup_whole"] for cell in of_seeds]),
                        _counts([len(cell["outside"]) for cell in of_seeds]),
                    ]
                )
            )
    return "\n".join(lines) + "\n"


def _speedup(cells: list[dict[str, Any]]) -> str:
    # Digits were run by an earlier version, which had it beside the first retrained model alone.
    ends = [end for cell in cells for end in cell.get("speedup_range", [cell["speedup"]])]
    return of_three((fmean(cell["speedup"] for cell in cells), min(ends), max(ends)), 1)


def pictures() -> dict[str, str]:
    """Return the plot of each recipe, as SVG."""
    return {path.stem: picture(path.stem) for path in sorted(FOLDER.glob("*.json"))}


@mpl.rc_context({"svg.fonttype": "none", "font.size": 9.5})
def picture(recipe: str) -> str:
    """Return how far each figure lies from retrained models, in half widths of its band, against operations, as SVG."""
    value = read(recipe)
    names = methods(value)
    figure = Figure(figsize=(4.6, 2.5 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, method in zip(panels, names):
        _draw(panel, value, method)
        panel.set(title=method, ylabel="distance, half bands")
    panels[-1].set(xlabel="times fewer operations than the whole schedule of retraining")
    panels[0].invert_xaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return svg(figure, "depth")


def _draw(panel: Axes, value: dict[str, Any], method: str) -> None:
    for name, colour in zip(DEPTH, _COLOURS):
        low, high = value["bands"][name]
        points = []
        for cells in value["epochs"].values():
            of_seeds = [cell for cell in cells.values() if cell["method"] == method]
            distance = fmean((cell["figures"][name] - (low + high) / 2) / ((high - low) / 2) for cell in of_seeds)
            points.append((fmean(cell["speedup_whole"] for cell in of_seeds), distance))
        panel.plot(*zip(*points), "o-", color=colour, markersize=3, label=FIGURES[name].label)
    panel.axhspan(-1, 1, color="#2f9e6e", alpha=0.12, linewidth=0)
    for mark in _MARKS:
        panel.axvline(mark, color="#8a8f98", linewidth=0.8, linestyle=":")
        panel.annotate(
            f"{mark:g}x", (mark, 1), (2, -10), xycoords=("data", "axes fraction"), textcoords="offset points"
        )
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=2)


def methods(value: dict[str, Any]) -> list[str]:
    """Return the methods in the order in which they were done."""
    return list(dict.fromkeys(cell["method"] for cells in value["epochs"].values() for cell in cells.values()))


def _counts(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
