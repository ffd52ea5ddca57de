"""The model card, in the format of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import jinja2

from fedunlearn.checkpoint import read_weights
from fedunlearn.evidence.folder import RunFolder
from fedunlearn.evidence.words import LIMITS, summary
from fedunlearn.files import write_text

CARD = "README.md"


def write_card(folder: Path) -> None:
    """Write README.md, the card of model.safetensors, into the folder of an audited run.

    Raises:
        RunError: the folder does not hold an audited run.
    """
    run = RunFolder.read(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedunlearn", "evidence/templates"),
        autoescape=False,  # Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    classes = run.result["classes"]
    weights = read_weights(folder / "model.safetensors")
    text = environment.get_template("card.md").render(
        result=run.result,
        summary=summary(run.result),
        forgotten=[classes[label] for label in run.result["forget"]],
        kept=[name for label, name in enumerate(classes) if label not in run.result["forget"]],
        colours=len(weights.mean or ()),
        limits=LIMITS,
    )
    write_text(folder / CARD, text)
