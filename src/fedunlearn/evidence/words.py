"""The words of the report: what each verdict means; the words of each figure are in the table of audits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedunlearn.audits.table import FIGURES
from fedunlearn.audits.verdict import INDISTINGUISHABLE, NO_VERDICT, NOT_FORGOTTEN, SUPPRESSED, UNLIKE
from fedunlearn.methods.table import CONTROLS

_LABELS = {control.name: control.label for control in CONTROLS}
# Name to label of each model in the tables: on the way to the candidate, then what it is compared with.
MODELS = {name: _LABELS.get(name, name) for name in ("original", "pruned", "unlearned")} | _LABELS

LIMITS = (
    "This is approximate unlearning: evidence from audits, no formal bound. An audit nobody thought of could still "
    "find the class.",
    "The verdict is one test at 95 %: up to one retrained model in twenty fails it. Bands of few retrained models are "
    "wide, so that it finds little: read the verdicts on the controls beside it.",
    "The server learned which class was forgotten, which classes each client holds and their summed activations.",
    "Retrained models follow the recipe's training, also where the original's weights came from elsewhere and were "
    "trained for longer: then they are no counterpart of it.",
    "Nothing is claimed about the privacy of single images of the classes that stay.",
)


# Words of the page that not everybody knows; those of each figure are in the table of audits.
GLOSSARY = {
    "U": "share of the test images of the forgotten class that are named right, measured with the class's output row "
    "put back; low is what was asked for, and not yet proof",
    "R": "the same of all other classes: what the model is still worth",
    "retrained model": "a model trained from nothing without the class: what a perfect erasure would look like",
    "band": "where the figure of one more retrained model is expected; all bands together hold it with 95 %",
    "sd": "standard deviation: the usual distance of one retrained model from another; three and more is far",
    "linear probe": "a simple reader trained on the features inside the model: can it still tell the class?",
    "prototypes": "the same from one, five or ten sample images of the class",
    "relearning": "how fast the class comes back when somebody trains the model on it again",
    "membership AUC": "whether training images of the class can be told from others: 50 is guessing, 100 is certain",
    "neighbours (TV)": "total variation: the share of the images of the class that goes elsewhere than by retrained "
    "models; 0 is the same",
    "features (CKA), features (Procrustes)": "how alike what the layers compute is to retrained models: CKA 100 is the "
    "same, Procrustes 0 is the same",
    "original": "the model before; it must fail the audits",
    "head only": "the original with nothing but the output row removed: it knows the class, cannot say it, must fail",
    "random + repair": "as many channels removed, chosen by lot: must fail, or the choice did nothing",
    "fine-tuning only": "trained on with the other classes at equal cost, nothing removed: must fail likewise",
    "pruning only": "the model right after channels were removed, before its repair",
}


def sent_to(counts: Sequence[int], classes: Sequence[str], label: int) -> str:
    """Return what the images of a class are named now, the three most frequent answers, of a row of the confusion."""
    total = sum(counts)
    ranked = sorted(((count, k) for k, count in enumerate(counts) if count), key=lambda own: (-own[0], own[1]))[:3]
    answers = ", ".join(f"“{classes[k]}” ({100 * count / total:.0f} %)" for count, k in ranked)
    return f"Test images of “{classes[label]}” are now named {answers}." if total else ""


def clipped(band: Sequence[float], name: str) -> tuple[float, float]:
    """Return the part of a band that the figure can reach."""
    low, high = band
    return max(low, 0.0), min(high, FIGURES[name].largest)


def summary(result: Mapping[str, Any]) -> str:
    """Return the verdict in plain words."""
    names = ", ".join(f"“{result['classes'][label]}”" for label in result["forget"])
    named = "It has no output row for the class, so its accuracy on it says nothing."
    if "forget" in result["audits"]:
        u = result["audits"]["forget"]["figure"]
        named = f"With the output row in place it names {100 * u:.1f} % of the test images right."
    if result["verdict"] == NOT_FORGOTTEN:
        return f"The model still answers {names}. {named}"
    if result["verdict"] == INDISTINGUISHABLE:
        return f"In every audit the model behaves towards {names} like models retrained without it. {named}"
    if result["verdict"] == SUPPRESSED:
        more = [name for name in result["decided_by"] if _shows_class(result["audits"], name)]
        if more:
            return (
                f"The model no longer answers {names}, but audits find more of it than in models retrained without "
                f"it: {_listed(more)}. {named}"
            )
        return (
            f"The model no longer answers {names}, and no audit finds more of it than in models retrained without it. "
            f"Yet it can be told from them, so erasure is not shown: {_listed(result['decided_by'])}. {named}"
        )
    assert result["verdict"] == NO_VERDICT
    return f"There is no verdict on {names}: {result['reason']}. {named}"


def chosen(fraction: Mapping[str, Any]) -> str:
    """Return which cut was chosen, and by what, of the block ``fraction``."""
    tried = [
        f"{_share(own['fraction'])} ({_share(own['probability'])}, U {_share(own['forget'])})"
        for own in fraction["attempts"]
    ]
    return (
        f"{_share(fraction['chosen'])} of the channels went: of the cuts that were tried, the smallest after which the "
        "clients' validation images of the class are given little probability for it, 5 % in the mean or less: "
        f"{', '.join(tried)}. The cost is that of all attempts."
    )


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def unable(audits: Mapping[str, Any], original: Mapping[str, float]) -> list[str]:
    """Return the audits that cannot tell here: the original, which knows the class, lies in the band; or anything does.

    Args:
        audits: of the candidate, with the bands.
        original: figures of the original, as far as they are known.
    """
    names = []
    for name, audit in audits.items():
        if audit["band"] is not None and FIGURES[name].kind == "class" and FIGURES[name].fixed is None:
            low, high = audit["band"]
            if low <= original.get(name, float("inf")) <= high or (low <= 0 and high >= 1):
                names.append(name)
    return names


def in_short(verdict: str, reason: str) -> str:
    """Return a verdict as it fits into a table: what kind of suppression was seen."""
    if verdict != SUPPRESSED:
        return verdict
    return f"{verdict} ({'unlike retrained models' if reason == UNLIKE else 'traces of the class'})"


def _shows_class(audits: Mapping[str, Any], name: str) -> bool:
    return audits[name]["verdict"] == "above" and FIGURES[name].kind == "class"


def _listed(names: list[str]) -> str:
    return ", ".join(FIGURES[name].label for name in names)
