"""Write the tables of docs/results.md from the result.json files in benchmarks/results.

``python -m benchmarks.tables`` replaces what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` by the table
of ``benchmarks/results/NAME-*.json``, one row per file; ``--check`` only says whether the page is up to date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"
_BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
_HEAD = (
    "| run | original | pruned | unlearned | fine-tuning only | retrained | speed-up |\n|---|---|---|---|---|---|---|\n"
)


def filled(page: str) -> str:
    """Return ``page`` with every table made anew; a file without a table, or a table without a file, is an error."""
    tables = {name for _, name, _ in _BLOCK.findall(page)}
    groups = {file.stem.partition("-")[0] for file in RESULTS.glob("*.json")}
    if tables != groups:
        sys.exit(f"{PAGE} and {RESULTS} must have the same groups, these are in one alone: {sorted(tables ^ groups)}")
    return _BLOCK.sub(lambda match: match[1] + table(match[2]) + match[3], page)


def table(name: str) -> str:
    """Return the Markdown table of the runs whose files start with ``name-``."""
    files = sorted(RESULTS.glob(f"{name}-*.json"))
    rows = [_row(file.stem.removeprefix(f"{name}-"), json.loads(file.read_text("utf-8"))) for file in files]
    return _HEAD + "".join(rows)


def _row(name: str, result: dict[str, Any]) -> str:
    blocks = [result.get("original"), result.get("pruned"), result.get("unlearned")]
    blocks += [result.get("controls", {}).get("finetune"), *result.get("oracles", {}).values()]
    cells = [_accuracy(block) for block in blocks] + [""] * (5 - len(blocks))
    ratio = result.get("speedup", {}).get("client_flops")
    at_least = "" if result.get("cost", {}).get("retrain", {}).get("reached", True) else "> "
    return f"| {name} | {' | '.join(cells)} | {'' if ratio is None else f'{at_least}{ratio:.1f}x'} |\n"


def _accuracy(block: dict[str, Any] | None) -> str:
    """Return U, the row of the class in place, and R in percent."""
    if block is None:
        return ""
    return f"{100 * block['accuracy']['forget_row_kept']:.2f} / {100 * block['accuracy']['retain']:.2f}"


def main() -> None:
    """Bring the page up to date, or say that it is not."""
    page = PAGE.read_text("utf-8")
    if "--check" in sys.argv:
        sys.exit(None if filled(page) == page else f"{PAGE}: run python -m benchmarks.tables")
    PAGE.write_text(filled(page), "utf-8")


if __name__ == "__main__":
    main()
