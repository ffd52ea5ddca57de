"""The tables and pictures of the pages of cells, docs/results/cell*.md, from benchmarks/cells and benchmarks/models."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import safetensors

from benchmarks.cells import CELLS, LESS_WORK, MODELS, SEEDS, SETTINGS, cell_of
from benchmarks.markdown import head_of, row_of, spread
from benchmarks.method_tables import FOLDER, read
from fedunlearn.audits.table import FIGURES
from fedunlearn.evidence.plots import work
from fedunlearn.evidence.words import MODELS as LABELS
from fedunlearn.evidence.words import clipped
from fedunlearn.federation.journal import Step
from fedunlearn.run.result import cost_until, training_curve

Result = dict[str, Any]
# R unlearned, R retrained and speed-up in rounds, as the paper gives them.
PAPER = {
    "cifar10-resnet20": (86.40, 86.33, 8.9),
    "cifar10-vgg11": (87.24, 87.13, 7.9),
    "cifar100-resnet20": (57.17, 57.11, 9.9),
    "cifar100-vgg11": (59.25, 58.20, 8.4),
}
# The same for several classes at once, ResNet20 on CIFAR-10.
PAPER_CLASSES = {
    (0, 9): (87.12, 87.29, 8.7),
    (0, 5): (89.62, 89.75, 10.6),
    (5, 9): (88.37, 88.21, 8.9),
    (0, 5, 9): (89.62, 89.23, 8.45),
}
# R on test images that the original and the retrained models are to reach, from the paper's retrained R.
LEVEL = {"cifar10-resnet20": 86, "cifar10-vgg11": 87, "cifar100-resnet20": 57, "cifar100-vgg11": 58}
NOT_RUN = "not run"
# Of the first table: the paper's ranking by its settings and ours, our ranking, the erase step; controls of equal cost.
HEADLINE = ("tf_idf-paper", "tf_idf", "contrast", "erase-again", "erase-again-rest")
_EQUAL_COST = (LABELS["finetune"], LABELS["random"])
_BY_RECIPE = ("contrast", "tf_idf")  # settings that a comparison of methods has too
# Controls to show beside a setting; those that any ranking shares beside contrast.
_BESIDE = {
    "contrast": ("original", "head_only", "finetune", "random"),
    "erase": ("random",),
    "erase-only": ("finetune",),
    "erase-again-rest": ("finetune",),  # it is that of erase-again-decay too
    "erase-again-often-half": ("finetune",),
    "tf_idf-paper": ("random", "finetune"),
}
_OWN_LABELS = {
    ("erase", "random"): "random, erased and repaired",
    ("erase-only", "finetune"): "fine-tuning only, the step's rate",
    ("erase-again-rest", "finetune"): "fine-tuning only, the same decay",
    ("erase-again-often-half", "finetune"): "fine-tuning only, twice that decay and half of the work",
    ("tf_idf-paper", "random"): "random + repair, as many channels as the paper",
    ("tf_idf-paper", "finetune"): "fine-tuning only, beside tf_idf-paper",
}


def results(recipe: str, setting: str) -> list[Result]:
    """Return the results of a setting in the order of their seeds; those that are there."""
    paths = [CELLS / f"{recipe}-{setting}-seed{seed}.json" for seed in SEEDS]
    found = [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]
    return found or (_compared(recipe, setting) if setting in _BY_RECIPE else [])


def _compared(recipe: str, setting: str) -> list[Result]:
    """Return the same from the comparison of methods, as a run would have written it."""
    if not (FOLDER / f"{recipe}.json").exists():
        return []
    value = read(recipe)
    shared = {"original": {"accuracy": value["original"], "figures": value["original"]["figures"]}}
    shared["original"]["verdict"] = value["controls"]["original"]
    oracles = {name: {"accuracy": block} for name, block in value["retrained"].items()}
    found = []
    for seed in SEEDS:
        candidate = value["cells"].get(f"{setting}-seed{seed}")
        if candidate is None:
            continue
        cells = {name: value["cells"].get(f"{name}-seed{seed}") for name in ("head_only", "finetune", "random")}
        controls = shared | {name: cell for name, cell in cells.items() if cell is not None}
        measured = {
            name: one["figures"] for name, one in {**value["retrained"], **controls, "unlearned": candidate}.items()
        }
        found.append(
            {
                "unlearned": candidate,
                "verdict": candidate["verdict"],
                "oracles": oracles,
                "controls": controls,
                "figures": {
                    name: {figure: {"value": number} for figure, number in figures.items()}
                    for name, figures in measured.items()
                },
                "audits": {figure: {"band": band} for figure, band in value["bands"].items()},
                "cost": {"unlearn": candidate["cost"], "retrain": {"reached": candidate.get("speedup_reached")}},
                **{
                    name: {"client_flops": candidate[name]}
                    for name in ("speedup", "speedup_whole")
                    if name in candidate
                },
            }
        )
    return found


def headline() -> str:
    """Return the four cells: U, R, retrained R and both speed-ups, mean and range over the seeds, with controls."""
    head = ["cell", "model", "U, row in place", "R", "R, retrained", "operations to equal R", "rounds to equal R"]
    head += ["operations, whole schedule", "paper: R, rounds to equal R"]
    lines = head_of(head)
    for recipe, (unlearned, retrained, ratio) in PAPER.items():
        runs = {setting: results(recipe, setting) for setting in HEADLINE}
        for setting, of_seeds in runs.items():
            some = f", {len(of_seeds)} of {len(SEEDS)} seeds" if len(of_seeds) < len(SEEDS) else ""
            for name, blocks in _models(setting, of_seeds):
                if name not in (f"**{setting}**", *_EQUAL_COST):
                    continue
                ratios = [""] * 4
                if name not in _EQUAL_COST:
                    whole = spread(
                        [one["speedup_whole"]["client_flops"] for one in of_seeds if "speedup_whole" in one], unit="x"
                    )
                    ours = [_to_equal_r(recipe, of_seeds, unit) for unit in ("client_flops", "rounds")]
                    ratios = [*ours, whole, f"{unlearned:.2f} \\| {retrained:.2f}, {ratio}x"]
                accuracies = [spread([of(block) for block in blocks]) for of in (_u, _r)]
                lines.append(row_of((recipe, name + some, *accuracies, spread(_retrained(of_seeds[0])), *ratios)))
        if missing := [setting for setting, of_seeds in runs.items() if not of_seeds]:
            lines.append(row_of((recipe, ", ".join(missing), *[NOT_RUN] * 6, "")))
    return "\n".join(lines) + "\n"


def first_screen() -> str:
    """Return the table of README: pruning and the erase step beside controls in the four cells, means of seeds."""
    head = ["network, data", "R, retrained", "pruning: U, R", "its controls: U", "erase step: U, R", "its control: U"]
    head += ["rounds, times fewer", "the paper's"]
    lines = head_of(head)
    for recipe, (_, _, paper) in PAPER.items():
        data, _, network = recipe.partition("-")
        # The step that was chosen last, and the one before it where that was not run.
        erased = results(recipe, "erase-again-rest") or results(recipe, "erase-again")
        pruned = results(recipe, "contrast")
        first = next(iter((*pruned, *erased)), None)
        cells = [NOT_RUN if first is None else f"{fmean(_retrained(first)):.1f}", _means(pruned)]
        cells += [", ".join(_of_control(pruned, name) for name in ("random", "finetune")) if pruned else NOT_RUN]
        # Fine-tuning of the same decay: erase-again has none, and the fine-tuning beside it is that of pruning.
        cells += [_means(erased), _of_control(results(recipe, "erase-again-rest"), "finetune")]
        rounds = [f"{fmean(_ratios(recipe, runs, 'rounds')[0]):.1f}" if runs else NOT_RUN for runs in (pruned, erased)]
        cells += [", ".join(rounds) if first else NOT_RUN]
        name = f"{network.replace('resnet', 'ResNet').replace('vgg', 'VGG')}, {data.replace('cifar', 'CIFAR-')}"
        lines.append(row_of((name, *cells, str(paper))))
    return "\n".join(lines) + "\n"


def _of_control(runs: Sequence[Result], name: str) -> str:
    return f"{fmean(_u(one['controls'][name]) for one in runs):.1f}" if runs else NOT_RUN


def _means(runs: Sequence[Result]) -> str:
    if not runs:
        return NOT_RUN
    u, r = (fmean(of(one["unlearned"]) for one in runs) for of in (_u, _r))
    return f"{u:.1f}, {r:.1f}" + ("" if len(runs) == len(SEEDS) else f" ({len(runs)} of {len(SEEDS)} seeds)")


def several() -> str:
    """Return U and R where several classes go at once, beside the paper's: one seed, one retrained model."""
    head = ["classes", "ranking", "U, row in place", "R", "R, retrained", "operations to equal R", "rounds to equal R"]
    head += ["paper: R, rounds to equal R"]
    lines = head_of(head)
    for classes, (unlearned, retrained, ratio) in PAPER_CLASSES.items():
        cell = cell_of("cifar10-resnet20", classes)
        for setting in _BY_RECIPE:
            of_seeds = results(cell, setting)
            found = [NOT_RUN] * 5
            if of_seeds:
                found = [
                    spread([_u(one["unlearned"]) for one in of_seeds]),
                    spread([_r(one["unlearned"]) for one in of_seeds]),
                    spread(_retrained(of_seeds[0])),
                    *(_to_equal_r(cell, of_seeds, unit) for unit in ("client_flops", "rounds")),
                ]
            paper = f"{unlearned:.2f} \\| {retrained:.2f}, {ratio}x"
            lines.append(row_of((" + ".join(map(str, classes)), setting, *found, paper)))
    return "\n".join(lines) + "\n"


def levels() -> str:
    """Return U and R on test images of the original and the retrained models that are kept, beside the level asked."""
    head = ("cell", "R asked", "original, U", "original, R", "retrained, R", "models", "trained in")
    lines = head_of(head)
    for recipe, asked in LEVEL.items():
        if not (MODELS / recipe).exists():
            lines.append(row_of((recipe, str(asked), *[NOT_RUN] * 5)))
        # Models retrained without other classes are of the same original.
        for folder in sorted(MODELS.glob(f"{recipe}*")):
            found = json.loads((folder / "levels.json").read_text("utf-8"))
            original = found.pop("original", None)
            cells = ["", ""] if original is None else [f"{100 * original[name]:.1f}" for name in ("forget", "retain")]
            retrained = spread([100 * level["retain"] for level in found.values()])
            used = Counter(level["precision"] for level in found.values())
            precision = ", ".join(f"{name} ({number})" for name, number in used.items())
            if original is not None:
                precision = f"original {original['precision']}; {precision}"
            lines.append(row_of((folder.name, str(asked), *cells, retrained, str(len(found)), precision)))
    return "\n".join(lines) + "\n"


def settings_table(recipe: str) -> str:
    """Return U, R and the verdicts of each setting and of its controls, mean and range over the seeds."""
    head = ("model", "U, row in place", "R", "R less retrained", "speed-up to equal R", "verdict")
    lines = head_of(head)
    runs = {setting: results(recipe, setting) for setting in SETTINGS}
    for setting, of_seeds in runs.items():
        for name, blocks in _models(setting, of_seeds):
            verdicts = Counter(block["verdict"] for block in blocks)
            lines.append(
                row_of(
                    (
                        name,
                        spread([_u(block) for block in blocks]),
                        spread([_r(block) for block in blocks]),
                        spread([_r(block) - fmean(_retrained(one)) for block, one in zip(blocks, of_seeds)], sign="+"),
                        _to_equal_r(recipe, of_seeds) if name == f"**{setting}**" else "",
                        ", ".join(f"{verdict} ({count})" for verdict, count in verdicts.items()),
                    )
                )
            )
    # Cells of other classes are made by the settings that matter.
    missing = [setting for setting, of_seeds in runs.items() if not of_seeds and setting not in LESS_WORK]
    if missing and recipe in PAPER:
        lines.append(row_of((", ".join(missing), *[NOT_RUN] * 5)))
    return "\n".join(lines) + "\n"


def depth_table(recipe: str) -> str:
    """Return the figures of the audits: retrained models, band, controls and each setting, mean over the seeds."""
    runs = {setting: of_seeds for setting in SETTINGS if (of_seeds := results(recipe, setting))}
    if not runs:
        return f"{NOT_RUN}\n"
    first = next(iter(runs.values()))[0]
    columns: list[tuple[str, list[tuple[Any, Any]]]] = []  # the figures of a model, and the bands of its own run
    for setting, of_seeds in runs.items():
        shown = [name for name in _BESIDE.get(setting, ()) if all(name in one["figures"] for one in of_seeds)]
        labels = {name: _label(setting, name) for name in shown} | {"unlearned": f"**{setting}**"}
        columns += [
            (text, [(one["figures"][name], one["audits"]) for one in of_seeds]) for name, text in labels.items()
        ]
    head = ["figure", "retrained", "band", *(text for text, _ in columns)]
    lines = head_of(head)
    oracles = [figures for name, figures in first["figures"].items() if name.startswith("retrained")]
    for figure, audit in first["audits"].items():
        if FIGURES[figure].fixed is not None or audit["band"] is None:
            continue
        low, high = audit["band"]
        theirs = [100 * figures[figure]["value"] for figures in oracles]
        band = " to ".join(f"{100 * end:.1f}" for end in clipped((low, high), figure))
        cells = [f"{min(theirs):.1f} to {max(theirs):.1f}", band]
        for _, models in columns:
            held = [(of[figure]["value"], bands[figure]["band"]) for of, bands in models if figure in of]
            text = f"{100 * fmean(value for value, _ in held):.1f}" if held else ""
            outside = any(not bottom <= value <= top for value, (bottom, top) in held)
            cells.append(f"**{text}**" if outside else text)
        lines.append(row_of((FIGURES[figure].label, *cells)))
    return "\n".join(lines) + "\n"


def picture(recipe: str) -> str | None:
    """Return R on validation images against operations of clients as SVG; None where nothing was run."""
    points = {
        setting: [
            (one["cost"]["unlearn"]["client_flops"], one["unlearned"]["validation"]["retain"])
            for one in results(recipe, setting)
        ]
        for setting in SETTINGS
    }
    points = {setting: pairs for setting, pairs in points.items() if pairs}
    curves = [_curve(path) for path in sorted((MODELS / recipe).glob("retrained-*.safetensors"))]
    told = [one["retraining"] for setting in points for one in results(recipe, setting) if one.get("schema", 1) > 1]
    if not curves and told:
        curves = [[(spent, r) for spent, r in block["curve"]] for block in told[0].values()]
    return work(curves, points) if points and curves else None


def _curve(path: Path) -> list[tuple[int, float]]:
    return training_curve(_steps(path))


@functools.cache
def _steps(path: Path) -> list[Step]:
    """Return the rounds by which a model that is kept was trained."""
    with safetensors.safe_open(path, "pt") as file:
        return [Step.from_dict(value) for value in json.loads(file.metadata()["steps"])]


def _models(setting: str, runs: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Yield the models to show of a setting, a block per seed."""
    for name in _BESIDE.get(setting, ()) if runs else ():
        if all(name in one["controls"] for one in runs):
            yield _label(setting, name), [one["controls"][name] for one in runs]
    if runs:
        yield f"**{setting}**", [one["unlearned"] | {"verdict": one["verdict"]} for one in runs]


def _label(setting: str, control: str) -> str:
    return _OWN_LABELS.get((setting, control), LABELS[control])


def _u(block: Result) -> float:
    """Return U with the row in place, NaN of a model whose row is gone."""
    u = block["accuracy"]["forget_row_kept"]
    return math.nan if u is None else 100 * float(u)


def _r(block: Result) -> float:
    return 100 * float(block["accuracy"]["retain"])


def _retrained(result: Result) -> list[float]:
    return [_r(block) for block in result["oracles"].values()]


def _to_equal_r(recipe: str, runs: Sequence[Result], unit: str = "client_flops") -> str:
    """Return the speed-up to equal R, ``>`` where a retrained model never was as good as the unlearned one."""
    found, reached = _ratios(recipe, runs, unit)
    return ("" if reached else "> ") + spread(found, unit="x")


def _ratios(recipe: str, runs: Sequence[Result], unit: str) -> tuple[list[float], bool]:
    """Return the speed-up of each seed beside each retrained model, the first would be chance, and if all reach R."""
    found, reached = [], True
    for one in runs:
        if "speedup" not in one:
            continue
        for cost in _beside(recipe, one):
            found.append(cost[unit] / one["cost"]["unlearn"][unit])
            reached = reached and cost["reached"]
    return found, reached


def _beside(recipe: str, one: Result) -> Iterator[dict[str, Any]]:
    """Yield what each retrained model cost until it was as good as the unlearned one, and whether it was ever.

    Large models are not kept; results of schema 2 tell it, those before it by the models.
    """
    if one.get("schema", 1) > 1:
        train = one["recipe"]["train"]
        for block in one["retraining"].values():
            looks = 1 + sum(flops < block["client_flops"] for flops, _ in block["curve"])
            rounds = min(looks * train["validate_every"], train["rounds"])
            yield {"client_flops": block["client_flops"], "rounds": rounds, "reached": block["reached"]}
        return
    for name in one["oracles"]:
        steps = _steps(MODELS / recipe / f"{name}.safetensors")
        yield cost_until(steps, one["unlearned"]["validation"]["retain"])
