"""The table of docs/results/erasing.md on what can be told without retrained models: from benchmarks/cells and methods.

A dial is set on two classes of CIFAR-10 and read on all that was measured: the linear probe and the one-shot prototypes
of a model, each over that of its original, are at most what the bands of both classes allow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.cells import CELLS
from benchmarks.markdown import head_of, row_of
from benchmarks.method_tables import FOLDER, read
from fedunlearn.audits.table import FIGURES

DIALS = ("probe", "prototype_1")
_TRACES = (*DIALS, "prototype_5", "prototype_10", "relearn")  # audits in which more is more of the class
_SET_ON = ("CIFAR-10, class 0", "CIFAR-10, class 9")
_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits"}


@dataclass(frozen=True)
class Model:
    """A model that was audited: its figures, those of its original, and the bands that it was held against."""

    retrained: bool
    figures: Mapping[str, float]
    original: Mapping[str, float]
    bands: Mapping[str, tuple[float, float]]

    def share(self, figure: str) -> float:
        """Return a figure over that of the original."""
        return self.figures[figure] / self.original[figure]

    def edge(self, figure: str) -> float:
        """Return the upper end of the band over the figure of the original."""
        return self.bands[figure][1] / self.original[figure]

    def hides_it(self) -> bool:
        """Return whether no audit finds more of the class than retrained models may show."""
        return all(self.figures[name] <= self.bands[name][1] for name in _TRACES)


def known() -> dict[str, list[Model]]:
    """Return all audited models by data and class, where one went: those of the cells and of comparisons, each once.

    Not those whose R lies below its band, such as the pruned model before its repair: what has forgotten the other
    classes too says nothing of a dial.
    """
    sources: list[tuple[str, Mapping[str, Mapping[str, float]], Mapping[str, tuple[float, float]]]] = []
    for path in sorted(CELLS.glob("*.json")):
        value = json.loads(path.read_text("utf-8"))
        if len(value["forget"]) > 1:  # beside one retrained model, which sets no band
            continue
        figures = {
            model: {name: one["value"] for name, one in measured.items()}
            for model, measured in value["figures"].items()
        }
        bands = {name: audit["band"] for name, audit in value["audits"].items() if audit["band"]}
        sources.append((_label(value), figures, bands))
    for path in sorted(FOLDER.glob("*.json")):
        value = read(path.stem)
        blocks = {**value["retrained"], **value["cells"], "original": value["original"]}
        sources.append((_label(value), {name: block["figures"] for name, block in blocks.items()}, value["bands"]))
    found: dict[str, dict[Any, Model]] = {}
    for source in sorted(sources, key=lambda one: -_retrained(one[1])):  # those beside most retrained models first
        _add(found, *source)
    return {label: list(models.values()) for label, models in sorted(found.items())}


def _label(value: Mapping[str, Any]) -> str:
    (forgotten,) = value["forget"]
    # The dial is set on ResNet20; another network is another row.
    network = value["recipe"]["model"]["name"]
    of = "" if network in ("resnet20", "small-cnn") else f", {network}"
    return f"{_DATA[value['recipe']['data']['source']]}, class {forgotten}{of}"


def _add(
    found: dict[str, dict[Any, Model]],
    label: str,
    figures: Mapping[str, Mapping[str, float]],
    bands: Mapping[str, tuple[float, float]],
) -> None:
    for name, measured in figures.items():
        worth = not (band := bands.get("retain")) or measured["retain"] >= band[0]
        if name != "original" and worth and all(figure in measured for figure in _TRACES):
            # A model stands beside several settings, whose repair decides by which rate it relearns.
            key = tuple(measured[figure] for figure in _TRACES if figure != "relearn")
            model = Model(name.startswith("retrained"), measured, figures["original"], bands)
            found.setdefault(label, {}).setdefault(key, model)


def _retrained(figures: Mapping[str, Any]) -> int:
    return sum(name.startswith("retrained") for name in figures)


def limits(models: Mapping[str, list[Model]]) -> dict[str, float]:
    """Return the dial: the most that the narrowest bands of both classes that set it allow, over the original."""
    return {name: min(model.edge(name) for label in _SET_ON for model in models[label]) for name in DIALS}


def shares(models: Mapping[str, list[Model]]) -> dict[str, tuple[float, float]]:
    """Return the lowest and the highest figure of retrained models over that of their original."""
    retrained = [model for all_of_it in models.values() for model in all_of_it if model.retrained]
    return {name: _ends([model.share(name) for model in retrained]) for name in DIALS}


def dial_table(name: str) -> str:
    """Return how often the dial and the audits agree, by data and class."""
    models = known()
    most = limits(models)
    columns = [f"retrained, {FIGURES[name].label} over the original's" for name in DIALS]
    head = ("data, class", *columns, "retrained that the dial lets through", "dial and audits: no more than retrained")
    head += ("dial and audits: more", "dial: no more, audits: more", "dial: more, audits: no more")
    lines = head_of(head)
    for label, of_data in models.items():
        retrained, others = ([model for model in of_data if model.retrained is kind] for kind in (True, False))
        low = {id(model): all(model.share(name) <= most[name] for name in DIALS) for model in of_data}
        counts = [
            sum((low[id(model)], model.hides_it()) == both for model in others)
            for both in ((True, True), (False, False), (True, False), (False, True))
        ]
        spans = [_ends([model.share(name) for model in retrained]) for name in DIALS]
        ends = [f"{lowest:.2f} to {highest:.2f}" for lowest, highest in spans]
        passed = f"{sum(low[id(model)] for model in retrained)} of {len(retrained)}"
        mark = " (sets it)" if label in _SET_ON else ""
        lines.append(row_of((label + mark, *ends, passed, *map(str, counts))))
    told = " and ".join(f"{FIGURES[name].label} {most[name]:.2f}" for name in DIALS)
    return "\n".join(lines) + f"\n\nThe dial: at most {told} of the original's.\n"


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)
