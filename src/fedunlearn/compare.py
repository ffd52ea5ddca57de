"""What unlearning cost beside retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedunlearn.federation.ledger import Cost
from fedunlearn.journal import Step


def speedup(unlearned: Mapping[str, Any], retrained: Mapping[str, Any]) -> dict[str, float]:
    """Return retraining cost over unlearning cost, of two cost blocks of result.json."""
    pairs = {name: (retrained[name], unlearned[name]) for name in ("client_flops", "rounds", "client_seconds")}
    pairs["bytes"] = (
        retrained["bytes_up"] + retrained["bytes_down"],
        unlearned["bytes_up"] + unlearned["bytes_down"],
    )
    return {name: above / below for name, (above, below) in pairs.items() if below}


def cost_until(steps: Sequence[Step], accuracy: float) -> dict[str, Any]:
    """Return what training cost until its validation accuracy first reached ``accuracy``; all of it if it never did.

    Its evaluations are not counted, which is in favour of retraining.
    """
    first = next((k for k, step in enumerate(steps, 1) if (step.validation or 0.0) >= accuracy), None)
    spent = [entry for step in steps[:first] for entry in step.entries if entry.job == "train"]
    return asdict(Cost.of(spent)) | {"reached": first is not None}
