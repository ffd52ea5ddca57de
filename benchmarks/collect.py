"""Collect an audited run: ``python -m benchmarks.collect DIR NAME`` writes benchmarks/audits/NAME.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedunlearn.evidence.folder import RunFolder

AUDITS = Path(__file__).parent / "audits"


def main(folder: str, name: str) -> None:
    """Write the figures of all models of a run; bands and verdicts follow from them."""
    run = RunFolder.read(Path(folder))
    result = run.result
    value = {
        "version": result["version"],
        "recipe": result["recipe"],
        "figures": {model: model_file["figures"] for model, model_file in run.models.items()},
        "speedup": result["speedup"],
    }
    value["recipe"]["data"]["path"] = ""
    (AUDITS / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
