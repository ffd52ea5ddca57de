"""The plots of the report, as SVG that takes the colours of the page.

Drawn by matplotlib, without a script: such a page opens offline, prints, and stays small (the script of an interactive
plotting library alone is near 5 MB). Text stays text. Black is replaced by ``currentColor``, so a dark page has light
axes; the other colours are legible on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from fedunlearn.evidence.words import clipped

_INK = "#010203"  # replaced by currentColor
_BLUE, _ORANGE, _GREEN, _GREY, _PURPLE = "#3b82c4", "#e07b1f", "#2f9e6e", "#8a8f98", "#9a63b5"
_COLOURS, _MARKERS = (_BLUE, _GREEN, _GREY, _PURPLE), ("D", "s", "o", "^")  # sixteen things are told apart
_STYLE: Any = {
    "text.parse_math": False,  # a class may be named with a dollar sign
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_WIDTH = 4.3  # inches: the width of a phone, so that text is not shrunk there
_CELL = 48  # pixels of a feature map
_KEPT = LinearSegmentedColormap.from_list("kept", ["#e4eef7", _BLUE])
_GONE = LinearSegmentedColormap.from_list("gone", ["#fbe9d8", _ORANGE])


@mpl.rc_context(_STYLE)
def compared(rows: Sequence[Mapping[str, Any]], retrained: Mapping[str, Any], figure_name: str, label: str) -> str:
    """Return R and one more figure of each method against the operations of its clients, beside retrained models.

    Args:
        rows: of ``evidence.comparison.summary``; a point has the number of its row.
        retrained: that block of compare.json.
        figure_name: the other figure.
        label: its name in words.
    """
    figure = Figure(figsize=(_WIDTH, 6.4), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    for panel, name, text in zip(panels, ("retain", figure_name), ("R, %", f"{label}, %")):
        for row in rows:
            value = row["r"] if name == "retain" else row["figures"].get(name)
            if value is not None and row["flops"] > 0:
                at, (middle, low, high) = row["flops"] / 1e12, value
                colour = _ORANGE if row["tuned"] else _BLUE
                panel.plot([at, at], [100 * low, 100 * high], "-", color=_GREY, linewidth=1)
                panel.plot(at, 100 * middle, "o", color=colour, markersize=4)
                place = (at, 100 * middle)
                panel.annotate(str(row["number"]), place, (3, 3), textcoords="offset points", fontsize=7.5)
        for oracle in retrained.values():
            value = oracle["retain"] if name == "retain" else oracle["figures"].get(name)
            if value is not None:
                panel.axhline(100 * value, color=_GREEN, linewidth=0.8)
        panel.set(xscale="log", ylabel=text)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_ylim(top=min(panel.get_ylim()[1], 101))
    panels[-1].set(xlabel="operations of all clients, 10^12")
    return svg(figure, "compared")


@mpl.rc_context(_STYLE)
def per_class(before: Mapping[str, float], after: Mapping[str, float], retrained: Mapping[str, float]) -> str:
    """Return bars of the accuracy per class before and after, with a mark for retrained models."""
    names = list(before)
    figure, axes = _figure(0.42 * len(names) + 0.9)
    places = np.arange(len(names))
    axes.barh(places - 0.2, [100 * before[name] for name in names], 0.38, color=_GREY, label="original")
    axes.barh(places + 0.2, [100 * after[name] for name in names], 0.38, color=_BLUE, label="unlearned")
    if retrained:
        means = [100 * retrained[name] for name in names]
        axes.plot(means, places, "|", color=_ORANGE, markersize=14, markeredgewidth=2, label="retrained, mean")
    axes.set_yticks(places, [_short(name) for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on test images, %", xlim=(0, 103))
    _legend(figure, axes, 3)
    return svg(figure, "classes")


@mpl.rc_context(_STYLE)
def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Return the confusion of a model: a row per class, in shares of the row."""
    table = np.asarray(counts, dtype=float)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    few = len(names) <= 20
    figure, axes = _figure(4.2)
    axes.imshow(shares, cmap=_KEPT, vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="answer of the model", ylabel="true class")
    if few:
        places = range(len(names))
        axes.set_xticks(places, [_short(name) for name in names], rotation=90)
        axes.set_yticks(places, [_short(name) for name in names])
        for row, column in zip(*np.nonzero(shares >= 0.005)):
            # On these colours black is legible whatever the page is like.
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color="#000", size=7.5)
    return svg(figure, "confusion")


@mpl.rc_context(_STYLE)
def relearning(curves: Mapping[str, Mapping[str, Sequence[float]]], *, oracles: Sequence[str]) -> str:
    """Return U as training brings the class back; the retrained models as one thin line each."""
    figure, axes = _figure(3.0)
    colours = {"original": _GREY, "head_only": _GREEN, "unlearned": _BLUE}
    lines = {"original": "--", "head_only": ":", "unlearned": "-"}
    for place, name in enumerate(oracles):
        curve = curves[name]
        label = "retrained" if place == 0 else None
        axes.plot(_positions(curve), _percent(curve["forget"]), color=_ORANGE, linewidth=0.9, label=label)
    for name, colour in colours.items():
        if name in curves:
            curve = curves[name]
            text = name.replace("_", " ")
            axes.plot(_positions(curve), _percent(curve["forget"]), lines[name], color=colour, linewidth=2, label=text)
    samples = curves["unlearned"]["samples"]
    axes.set_xticks(range(len(samples)), [f"{int(sample):,}" for sample in samples])
    axes.set(xlabel="training images seen", ylabel="U, %", ylim=(-3, 103))
    _legend(figure, axes, 4)
    return svg(figure, "relearning")


@mpl.rc_context(_STYLE)
def work(
    retraining: Sequence[Sequence[tuple[float, float]]], points: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """Return R against the operations of the clients: retraining as lines, what else was done as points.

    Args:
        retraining: of each retrained model, operations so far and R, at each look.
        points: operations and R by what was done, a point per seed.
    """
    figure, axes = _figure(3.2)
    for place, curve in enumerate(retraining):
        label = "retraining" if place == 0 else None
        spent, accuracy = zip(*curve)
        axes.plot(spent, _percent(accuracy), color=_ORANGE, linewidth=0.9, label=label)
    for place, (name, pairs) in enumerate(points.items()):
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place // len(_COLOURS) % len(_MARKERS)]
        spent, accuracy = zip(*pairs)
        axes.plot(spent, _percent(accuracy), marker, color=colour, markersize=5, label=name)
    axes.set_xscale("log")
    drawn = [flops for pairs in (*retraining, *points.values()) for flops, _ in pairs]
    unit, name = (1e12, "TFLOP") if max(drawn) > 1e13 else (1e9, "GFLOP")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(drawn) < 100 * min(drawn) else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda flops, _: f"{flops / unit:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=f"operations of clients, {name}", ylabel="R on validation images, %")
    _legend(figure, axes, 4)
    return svg(figure, "work")


@mpl.rc_context(_STYLE)
def bands(
    audits: Mapping[str, Mapping[str, Any]],
    oracles: Sequence[Mapping[str, float]],
    original: Mapping[str, float],
    texts: Mapping[str, str],
) -> str:
    """Return the figures of the candidate beside their bands, the retrained models and the original."""
    names = list(audits)
    figure, axes = _figure(0.36 * len(names) + 1.0)
    for place, name in enumerate(names):
        audit = audits[name]
        if audit["band"] is not None:
            low, high = clipped(audit["band"], name)
            axes.barh(place, 100 * (high - low), 0.62, left=100 * low, color=_ORANGE, alpha=0.25, linewidth=0)
        axes.plot(
            [100 * figures[name] for figures in oracles if name in figures],
            [place] * sum(name in figures for figures in oracles),
            "|",
            color=_ORANGE,
            markersize=9,
        )
        if name in original:
            axes.plot(100 * original[name], place, "o", color=_GREY, markersize=6, fillstyle="none")
        axes.plot(100 * audit["figure"], place, "D", color=_BLUE, markersize=5)
    handles = [
        Patch(color=_ORANGE, alpha=0.25, label="band"),
        Line2D([], [], color=_ORANGE, marker="|", linestyle="", label="retrained"),
        Line2D([], [], color=_GREY, marker="o", fillstyle="none", linestyle="", label="original"),
        Line2D([], [], color=_BLUE, marker="D", linestyle="", label="unlearned"),
    ]
    axes.set_yticks(range(len(names)), [texts[name] for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="%", xlim=(-3, max(103, axes.get_xlim()[1])))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, handletextpad=0.3, columnspacing=1.0)
    return svg(figure, "bands")


@mpl.rc_context(_STYLE)
def scores(layers: Mapping[str, NDArray[np.float64]], pruned: Mapping[str, Sequence[int]]) -> str:
    """Return a row per layer, a cell per channel from the highest score to the lowest; pruned ones in orange."""
    widest = max(len(values) for values in layers.values())
    image = np.zeros((len(layers), widest, 4))
    for row, (layer, values) in enumerate(layers.items()):
        order = np.argsort(-values, kind="stable")
        spread = float(values.max() - values.min()) or 1.0
        depth = (values[order] - values.min()) / spread
        gone = np.isin(order, list(pruned.get(layer, ())))
        image[row, : len(values)] = np.where(gone[:, None], _GONE(depth), _KEPT(depth))
    figure, axes = _figure(0.2 * len(layers) + 1.1)
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(layers)), [_short(layer, 26) for layer in layers], size=7.5)
    axes.set(xlabel="channels, highest score first")
    handles = [Patch(color=_ORANGE, label="removed"), Patch(color=_BLUE, label="kept")]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return svg(figure, "scores")


@mpl.rc_context(_STYLE)
def feature_maps(
    pictures: NDArray[np.uint8], maps: NDArray[np.uint8], rows: Sequence[str], columns: Sequence[str]
) -> str:
    """Return a grid: a row per image, the image first, then what each channel makes of it.

    Args:
        pictures: shape ``(images, colours, height, width)``.
        maps: shape ``(images, channels, height, width)``.
        rows: name of each image's class.
        columns: name of each channel.
    """
    count, channels = maps.shape[:2]
    side, gap = _CELL, _CELL // 8
    # One picture of all cells: an axes for each of them takes seconds to lay out.
    board = np.zeros((count * (side + gap), (channels + 1) * (side + gap), 4), dtype=np.uint8)
    for row in range(count):
        for column, cell in enumerate([pictures[row], *(feature_map[None] for feature_map in maps[row])]):
            top, left = row * (side + gap), column * (side + gap)
            board[top : top + side, left : left + side, :3] = _resized(cell, side)
            board[top : top + side, left : left + side, 3] = 255
    figure, axes = _figure(_WIDTH * count / (channels + 1) + 0.5)
    axes.imshow(board, interpolation="nearest")
    centres = [place * (side + gap) + side / 2 for place in range(max(count, channels + 1))]
    axes.set_xticks(centres[: channels + 1], ["image", *columns], rotation=60, size=7.5)
    axes.set_yticks(centres[:count], [_short(name, 10) for name in rows], size=7.5)
    axes.tick_params(length=0, labelbottom=False, labeltop=True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return svg(figure, "maps")


def _resized(cell: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return a picture of shape ``(1 or 3 colours, height, width)`` as ``(side, side, 1 or 3)``, pixels repeated."""
    _, height, width = cell.shape
    rows, columns = np.arange(side) * height // side, np.arange(side) * width // side
    picked: NDArray[np.uint8] = cell[:, rows[:, None], columns].transpose(1, 2, 0)
    return picked if picked.shape[2] == 3 else picked[:, :, :1]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=columns, handletextpad=0.4, columnspacing=1.0, fontsize=8.5
    )


def svg(figure: Figure, name: str) -> str:
    """Return the figure as SVG whose ids start with ``name`` and whose bytes depend on what is drawn alone."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    # Hashes of unrounded floats, whose last bits differ between processors.
    hashed = dict.fromkeys(re.findall(r'\bid="([a-z]+[0-9a-f]{10})"', text))
    for number, mark in enumerate(hashed, 1):
        text = text.replace(mark, f"mark-{number}")
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace(_INK, "currentColor")


def _positions(curve: Mapping[str, Sequence[float]]) -> list[int]:
    return list(range(len(curve["samples"])))


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _short(name: str, length: int = 14) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
