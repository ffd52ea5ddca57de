"""Write the tables of README, docs/results, docs/privacy.md and docs/performance.md from the files in benchmarks.

``python -m benchmarks.tables`` replaces what stands between ``<!-- KIND NAME -->`` and ``<!-- end -->``; ``--check``
only says whether the pages are up to date. Kinds: ``table``, from ``benchmarks/results/NAME-*.json``, one row per file;
``audits``, from ``benchmarks/audits/NAME*.json``; ``measured``, from ``benchmarks/NAME.json``; ``cells``, see
``benchmarks.cell_tables``; ``methods``, see ``benchmarks.method_tables``; ``depth``, see ``benchmarks.depth_tables``;
``dial``, see ``benchmarks.dial_tables``.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.cell_tables import PAPER, depth_table, first_screen, headline, levels, picture, settings_table, several
from benchmarks.depth_tables import pictures as depth_pictures
from benchmarks.depth_tables import work_table
from benchmarks.dial_tables import dial_table
from benchmarks.markdown import head_of, spread
from benchmarks.method_tables import method_table, pictures, trial_table
from benchmarks.requests import SEEDS
from benchmarks.verdict_tables import error_table, power_table
from benchmarks.verdict_tables import picture as power_picture
from fedunlearn.audits.base import Figure
from fedunlearn.audits.table import FIGURES
from fedunlearn.audits.verdict import calibrate, judge
from fedunlearn.evidence.words import MODELS, clipped

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
PAGES = (
    DOCS.parent / "README.md",
    *sorted((DOCS / "results").glob("*.md")),
    DOCS / "privacy.md",
    DOCS / "performance.md",
)
_BLOCK = re.compile(r"(<!-- (table|audits|measured|cells|methods|depth|dial) ([\w -]+) -->\n).*?(<!-- end -->)", re.S)
_HEAD = (
    "| run | original | pruned | unlearned | fine-tuning only | retrained | speed-up |\n|---|---|---|---|---|---|---|\n"
)


def filled(pages: Mapping[Path, str]) -> dict[Path, str]:
    """Return ``pages`` with every table made anew; a file without a table, or a table without a file, is an error."""
    tables = {name for text in pages.values() for _, kind, name, _ in _BLOCK.findall(text) if kind == "table"}
    groups = {file.stem.partition("-")[0] for file in RESULTS.glob("*.json")}
    if tables != groups:
        sys.exit(f"{DOCS} and {RESULTS} must have the same groups, these are in one alone: {sorted(tables ^ groups)}")
    makers = {
        "table": table,
        "audits": audit_table,
        "measured": measured,
        "cells": cell_table,
        "methods": methods,
        "depth": work_table,
        "dial": dial_table,
    }
    return {
        path: _BLOCK.sub(lambda match: match[1] + makers[match[2]](match[3]) + match[4], text)
        for path, text in pages.items()
    }


def measured(name: str) -> str:
    """Return the table of one file."""
    makers: dict[str, Callable[[Any], str]] = {
        "engines": engine_table,
        "speed": speed_table,
        "growth": growth_table,
        "peak": peak_table,
        "precision": precision_table,
        "poisoning": poisoning_table,
        "private": private_table,
        "verdict": error_table,
        "power": power_table,
        "networks": network_table,
        "own_networks": own_table,
        "norms": norm_table,
        "requests": request_table,
    }
    kind = name.removesuffix("-amx")  # the same of another machine
    file = {"growth": "speed", "peak": "speed", "power": "verdict"}.get(kind, kind) + name.removeprefix(kind)
    return makers[kind](json.loads((RESULTS.parent / f"{file}.json").read_text("utf-8")))


def cell_table(name: str) -> str:
    """Return a table of the cells: ``first``, ``headline``, ``levels``, ``several``; ``settings``, ``depth`` of one."""
    kind, _, recipe = name.partition(" ")
    if recipe:
        return {"settings": settings_table, "depth": depth_table}[kind](recipe)
    return {"first": first_screen, "headline": headline, "levels": levels, "several": several}[kind]()


def methods(name: str) -> str:
    """Return a table of a comparison of methods: ``figures`` or ``trials``, and a recipe."""
    kind, _, recipe = name.partition(" ")
    return {"figures": method_table, "trials": trial_table}[kind](recipe)


def engine_table(rows: list[dict[str, Any]]) -> str:
    """Return the seconds of rounds on each engine, median and range, and the memory."""
    lines = head_of(("engine", "clients", "empty round, s", "`Measure`, s", "`Train`, s", "memory, MB"))
    for row in rows:
        cells = []
        for seconds in row["seconds"].values():
            digits = 2 if median(seconds) < 10 else 0
            cells.append(f"{median(seconds):.{digits}f} ({min(seconds):.{digits}f} to {max(seconds):.{digits}f})")
        lines.append(f"| {row['engine']} | {row['clients']} | {' | '.join(cells)} | {row['memory_mb']} |")
    return "\n".join(lines) + "\n"


def speed_table(value: dict[str, Any]) -> str:
    """Return the ratios of ``benchmarks.speed``, median and range over the turns, and images per second."""
    lines = head_of(("comparison", "ratio", "theirs, images/s", "ours, images/s"))
    for name, compared in value["comparisons"].items():
        rates = compared["images_per_second"]
        text = f"{compared['ratio']:.2f} ({compared['low']:.2f} to {compared['high']:.2f})"
        lines.append(f"| `{name}` | {text} | {rates['theirs']} | {rates['ours']} |")
    return "\n".join(lines) + "\n"


def growth_table(value: dict[str, Any]) -> str:
    """Return how cost grows with clients, classes and channels."""
    lines = head_of(("clients", "empty round, ms per client", "training round, s", "peak memory, MB"))
    for row in value["growth"]["clients"]:
        cells = (row["clients"], row["empty_ms_per_client"], row["train_seconds"], row["peak_mb"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| model | statistics over bare passes | images/s |", "|---" * 3 + "|"]
    for kind in ("classes", "channels"):
        for row in value["growth"][kind]:
            name = f"ResNet20, {row[kind]} classes" if kind == "classes" else f"three layers of {row[kind]} channels"
            lines.append(f"| {name} | {row['statistics_vs_bare_forward']:.2f} | {row['images_per_second']} |")
    return "\n".join(lines) + "\n"


def peak_table(value: dict[str, Any]) -> str:
    """Return which share of the speed of large matrix products is reached."""
    peak, precision = value["peak"], value["compute"]["precision"]
    return (
        "| | of the peak |\n|---|---|\n"
        f"| large matrix products in {precision}, all cores: {peak['gflops']:.0f} GFLOP/s | 100 % |\n"
        f"| statistics | {100 * peak['statistics']:.0f} % |\n| training | {100 * peak['train']:.0f} % |\n"
    )


def precision_table(rows: list[dict[str, Any]]) -> str:
    """Return accuracies in each precision, lowest to highest over seeds, in percent."""
    figures = {"original U": "original_forget", "original R": "original_retain", "U": "forget", "R": "retain"}
    return _by_setting(rows, {"precision": "precision"}, figures)


def poisoning_table(rows: list[dict[str, Any]]) -> str:
    """Return what one liar does, with and without a cap, lowest to highest over seeds, in percent."""
    return _by_setting(
        rows,
        {"lie": "attack", "times": "factor", "cap": "cap"},
        {"same channels": "overlap", "U": "forget", "R": "retain", "accuracy on threes": "victim"},
    )


def own_table(value: dict[str, dict[str, Any]]) -> str:
    """Return U / R, parameters and the verdict of each model of each network."""
    names = {"resnet20_gn": "ResNet20, `GroupNorm`", "mobilenet_v2": "MobileNetV2, a quarter of the width"}
    lines = head_of(("network", "model", "U", "R", "parameters", "verdict"))
    for network, block_of in value.items():
        shown = {name: block_of.get(name, {}) | block_of["controls"].get(name, {}) for name in MODELS}
        shown["unlearned"] = block_of["unlearned"] | {"verdict": block_of["verdict"]}
        shown |= {name: block | {"verdict": ""} for name, block in block_of["oracles"].items()}
        for name, block in shown.items():
            if block:
                figures = block["accuracy"]
                u, r = figures["forget_row_kept"], 100 * figures["retain"]
                text = MODELS.get(name, name)
                mark = "**" if name == "unlearned" else ""
                lines.append(
                    f"| {names[network]} | {mark}{text}{mark} | {'-' if u is None else f'{100 * u:.1f}'} | {r:.1f} | "
                    f"{block['parameters']:,} | {block['verdict']} |"
                )
    return "\n".join(lines) + "\n"


def norm_table(rows: list[dict[str, Any]]) -> str:
    """Return U / R of each stage with each normalisation, lowest to highest over seeds, in percent."""
    stages = {
        "original": "original",
        "pruned": "pruned",
        "corrected": "normalisation corrected",
        "repaired": "repaired",
    }
    flat = [
        {
            "norm": row["norm"],
            **{f"{kind} {stage}": row[stage][kind] for stage in stages for kind in ("forget", "retain")},
        }
        for row in rows
    ]
    figures = {
        f"{text}, {letter}": f"{kind} {stage}"
        for stage, text in stages.items()
        for letter, kind in (("U", "forget"), ("R", "retain"))
    }
    return _by_setting(flat, {"norm": "norm"}, figures)


def request_table(rows: list[dict[str, Any]]) -> str:
    """Return U, R and the retrained R of each kind of request, mean and range over seeds, in percent."""
    lines = head_of(("request", "class", "R before", "U", "R", "retrained R", "parameters", "verdict"))
    for name in dict.fromkeys(row["request"] for row in rows):
        requests = [row for row in rows if row["request"] == name]
        cells = [
            spread([row[key] for row in requests], 100) for key in ("before", "forget_row_kept", "retain", "retrained")
        ]
        verdicts = Counter(row["verdict"] for row in requests)
        told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
        sizes = sorted({row["parameters"] for row in requests})
        size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        some = f" ({len(requests)} of {len(SEEDS)} seeds)" if len(requests) < len(SEEDS) else ""
        lines.append(f"| {name}{some} | {', '.join(requests[0]['forget'])} | {' | '.join(cells)} | {size} | {told} |")
    return "\n".join(lines) + "\n"


def network_table(value: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the Markdown table of what can be pruned of each network."""
    lines = [
        "| network | layers that lose channels | left out | parameters | sliced from masked |",
        "|---|---|---|---|---|",
    ]
    for name, found in value.items():
        if "refused" in found:
            lines.append(f"| {name} | refused: {found['refused']} | | | |")
            continue
        left = "; ".join(f"{count}: {reason.partition(',')[0]}" for reason, count in found["left_out"].items())
        before, after = found["parameters"]
        lines.append(
            f"| {name} | {found['layers']} | {left} | {-100 * (1 - after / before):.0f} % | {found['apart']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def private_table(value: dict[str, Any]) -> str:
    """Return what the privacy options cost, lowest to highest over seeds, in percent."""
    columns = {"min_count": "min_count", "clip": "clip", "noise": "noise", "epsilon": "epsilon"}
    return _by_setting(value["rows"], columns, {"same channels": "overlap", "U": "forget", "R": "retain"})


def _by_setting(rows: list[dict[str, Any]], settings: dict[str, str], figures: dict[str, str]) -> str:
    """Return a table with a row for each combination of ``settings``, seeds taken together."""
    lines = head_of([*settings, *figures])
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in settings.values()), []).append(row)
    for setting, group in groups.items():
        cells = ["" if part is None else f"{part:.3g}" if isinstance(part, float) else str(part) for part in setting]
        for key in figures.values():
            values = [100 * row[key] for row in group]
            cells.append(f"{min(values):.1f} to {max(values):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def audit_table(name: str) -> str:
    """Return the figures of the audited runs whose files start with ``name``, in percent; a column per model.

    Retrained models and the controls that do not depend on the criterion are those of the first file. A figure outside
    the band is in bold.
    """
    runs = {
        file.stem: json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.parent.glob(f"audits/{name}*.json"))
    }
    first = next(iter(runs.values()))
    oracles = _retrained(first)
    columns = [(model, MODELS[model], first) for model in ("original", "head_only", "finetune", "random")]
    for run in runs.values():
        criterion = run["recipe"]["unlearn"]["criterion"]
        columns += [("pruned", f"{criterion}, pruning only", run), ("unlearned", f"**{criterion}**", run)]
    head = ["figure", f"{len(oracles)} retrained", "band", *(text for _, text, _ in columns)]
    lines = head_of(head)
    for figure, band in calibrate(oracles).items():
        if FIGURES[figure].fixed is not None:
            continue
        values = [oracle[figure].value for oracle in oracles]
        cells = [f"{100 * min(values):.1f} to {100 * max(values):.1f}"]
        low, high = clipped((band.low, band.high), figure)
        cells.append(f"{100 * low:.1f} to {100 * high:.1f}")
        for model, _, run in columns:
            value = run["figures"][model].get(figure, {}).get("value")
            shown = "" if value is None else f"{100 * value:.1f}"
            outside = value is not None and not band.low <= value <= band.high
            cells.append(f"**{shown}**" if outside else shown)
        lines.append(f"| {FIGURES[figure].label} | " + " | ".join(cells) + " |")
    verdicts = [_verdict(run, model) for model, _, run in columns]
    lines.append("| verdict | | | " + " | ".join(verdicts) + " |")
    return "\n".join(lines) + "\n"


def _verdict(run: Mapping[str, Any], model: str) -> str:
    """Return the verdict on a model of an audited run with ten classes."""
    oracles = _retrained(run)
    figures = _figures(run["figures"][model])
    return str(judge(figures, calibrate(oracles), oracles=len(oracles), chance=0.1)["verdict"])


def _retrained(run: Mapping[str, Any]) -> list[dict[str, Figure]]:
    return [_figures(figures) for model, figures in run["figures"].items() if model.startswith("retrained")]


def _figures(values: Mapping[str, Mapping[str, float]]) -> dict[str, Figure]:
    return {name: Figure(**figure) for name, figure in values.items()}


def table(name: str) -> str:
    """Return the Markdown table of the runs whose files start with ``name-``."""
    files = sorted(RESULTS.glob(f"{name}-*.json"))
    rows = [_row(file.stem.removeprefix(f"{name}-"), json.loads(file.read_text("utf-8"))) for file in files]
    return _HEAD + "".join(rows)


def _row(name: str, result: dict[str, Any]) -> str:
    blocks = [result.get("original"), result.get("pruned"), result.get("unlearned")]
    blocks += [result.get("controls", {}).get("finetune")]
    cells = [_accuracy(block) for block in blocks] + [_mean_accuracy(result.get("oracles", {}))]
    ratio = result.get("speedup", {}).get("client_flops")
    at_least = "" if result.get("cost", {}).get("retrain", {}).get("reached", True) else "> "
    return f"| {name} | {' | '.join(cells)} | {'' if ratio is None else f'{at_least}{ratio:.1f}x'} |\n"


def _mean_accuracy(blocks: Mapping[str, dict[str, Any]]) -> str:
    """Return the means of U and R over several models in percent."""
    accuracies = [block["accuracy"] for block in blocks.values()]
    if not accuracies:
        return ""
    return " / ".join(f"{100 * fmean(each[name] for each in accuracies):.2f}" for name in ("forget_row_kept", "retain"))


def _accuracy(block: dict[str, Any] | None) -> str:
    """Return U, the row of the class in place, and R in percent."""
    if block is None:
        return ""
    return f"{100 * block['accuracy']['forget_row_kept']:.2f} / {100 * block['accuracy']['retain']:.2f}"


def main() -> None:
    """Bring pages and pictures up to date, or say that they are not."""
    made = filled({path: path.read_text("utf-8") for path in PAGES})
    for recipe in PAPER:
        drawn = picture(recipe)
        if drawn is not None:
            made[DOCS / "results" / f"{recipe}.svg"] = drawn
    made[DOCS / "results" / "verdict.svg"] = power_picture()
    made |= {DOCS / "results" / f"methods-{name}.svg": drawn for name, drawn in pictures().items()}
    made |= {DOCS / "results" / f"depth-{name}.svg": drawn for name, drawn in depth_pictures().items()}
    for path, text in made.items():
        if "--check" in sys.argv and not (path.exists() and path.read_text("utf-8") == text):
            sys.exit(f"{path}: run python -m benchmarks.tables")
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
