"""The words of the report: what each verdict means; those of each figure are in the table of audits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedunlearn.audits.table import FIGURES
from fedunlearn.audits.verdict import (
    FEWEST,
    INDISTINGUISHABLE,
    NO_VERDICT,
    NOT_FORGOTTEN,
    SUPPRESSED,
    UNLIKE,
    speaking_against,
)
from fedunlearn.evidence.folder import RunFolder
from fedunlearn.methods.table import CONTROLS

_LABELS = {control.name: control.label for control in CONTROLS}
# Name to label of each model in the tables: on the way to the candidate, then what it is compared with.
MODELS = {name: _LABELS.get(name, name) for name in ("original", "pruned", "unlearned")} | _LABELS

# What each verdict means, from best to worst.
VERDICTS = {
    INDISTINGUISHABLE: "in no audit can the model be told from models that never saw the class: the pass",
    SUPPRESSED: "the model no longer names the class, but audits can tell it from models that never saw it: they find "
    "traces of the class, or that it is unlike those models in other ways, as the line says; no pass",
    NOT_FORGOTTEN: "the model still names the class, more often than models that never saw it; no pass",
    NO_VERDICT: "nothing can be said, for one of these reasons: there are too few retrained models; a figure that a "
    "pass needs is missing; the model before never knew the class; no control was audited, or one passed",
}
# Words of the page that not everybody knows; those of each figure are in the table of audits.
GLOSSARY = {
    "U": "forgotten class: of its test images, the share that is named right, of several classes the mean. A model "
    "that gave up the answer can never name it, so it is measured with the answer (its output row) put back; low was "
    "asked for, and is no proof",
    "R": "other classes: the same share of all their test images, which is what the model is still worth",
    "retrained model": "a model trained from nothing without the class: what a perfect erasure would look like",
    "control": "a model that must not pass, or the audits are no good here",
    "band": "where the figure of one more retrained model is expected: at least 19 of 20 of them lie inside all bands",
    "sd": "how far a figure is from the mean of the retrained models, by their usual distance from it (standard "
    "deviation), or by what few images leave uncertain where that is more. What counts is whether it lies inside its "
    "band, which is several sd wide where there are few models",
    "linear probe": "a simple reader trained on what the inside of the model computes: can it tell the class? Models "
    "that never saw the class often let it be told as well: only what goes beyond theirs is a trace",
    "prototypes": "can the class be recognised from one, five or ten sample images, by likeness inside it? Models "
    "that never saw it can do so to some degree, since they learned what other classes have in common with it: only "
    "what goes beyond theirs is a trace",
    "relearning": "how fast the class comes back when somebody trains the model on it again",
    "validation images": "images that clients hold back from training: settings, and the end of retraining, are "
    "chosen by them",
    "membership AUC": "can the very images that were trained on be told from others? 50 is guessing, 100 is certain",
    "neighbours (TV)": "how far the mean probabilities of the other answers, on images of the class, are from those "
    "that retrained models give; 0 is the same (total variation), and a surer or less sure model differs too. Outside, "
    "the class is answered in another way, which need not mean that the model knows it",
    "features (CKA), features (Procrustes)": "how alike what the layers compute is to retrained models. CKA: 100 is "
    "the same; Procrustes: 0 is the same. Outside, the model computes in another way, which need not mean that it "
    "knows the class",
    "8 bits, 4 bits, re-estimated": "does a coarser copy of the model, or one with new statistics in its layers, name "
    "the class again?",
    "artefacts": "pieces of the class left in the delivered file",
    "original": "a control: the model before",
    "head only": "a control: the original with nothing but the answer removed: it knows the class and cannot say it",
    "random + repair": "a control: as many channels removed, chosen by lot, and trained on as the unlearned model",
    "fine-tuning only": "a control: trained on with the other classes at equal cost, nothing removed",
    "pruning only": "a control: the model right after channels were removed, before it was trained on",
    "channels": "the parts of a layer; those that speak for the class are removed (pruning)",
    "GFLOP": "10^9 operations: what the clients' computers did, whatever their speed",
}


# Lowest and highest figure of retrained models over that of their original, where both were measured: CIFAR-10,
# CIFAR-100 and digits, docs/results/stopping.md.
RETRAINED_SHARE = {"probe": (0.72, 1.0), "prototype_1": (0.33, 0.57)}
_GONE = 0.01  # U below which a class is said not to be answered


def sent_to(counts: Sequence[int], classes: Sequence[str], label: int) -> str:
    """Return what the images of a class are named now, the three most frequent answers, of a row of the confusion."""
    total = sum(counts)
    ranked = sorted(((count, k) for k, count in enumerate(counts) if count), key=lambda pair: (-pair[0], pair[1]))[:3]
    answers = ", ".join(f"“{classes[k]}” ({100 * count / total:.0f} %)" for count, k in ranked)
    return f"Test images of “{classes[label]}” are now named {answers}." if total else ""


def clipped(band: Sequence[float], name: str) -> tuple[float, float]:
    """Return the part of a band that the figure can reach."""
    low, high = band
    return max(low, 0.0), min(high, FIGURES[name].largest)


def summary(result: Mapping[str, Any], cannot_tell: Sequence[str] = ()) -> str:
    """Return the verdict in plain words.

    Args:
        result: content of result.json.
        cannot_tell: audits without a say, see ``unable``.
    """
    text = _verdict_words(result, cannot_tell)
    if len(result["classes"]) - len(result["forget"]) == 1:
        text += " One class stays, which any model names: R is 100 and says nothing."
    return text


def _verdict_words(result: Mapping[str, Any], cannot_tell: Sequence[str]) -> str:
    names = ", ".join(f"“{result['classes'][label]}”" for label in result["forget"])
    row = "no output row for the class" if len(result["forget"]) == 1 else "no output rows for the classes"
    named = f"It has {row}, so its accuracy there says nothing."
    if "forget" in result["audits"]:
        put_back = "It" if "model" in result else "Even with the answer (its output row) put back it"
        share, whose = _tenth(result["audits"]["forget"]["figure"]), _whose(result)
        mean = " on average over them" * (len(result["forget"]) > 1)
        named = f"{put_back} names {share} of {whose} test images{mean}."
    if result["verdict"] == NOT_FORGOTTEN:
        return f"Not passed. The model still answers {names}. {named}"
    if result["verdict"] == INDISTINGUISHABLE:
        like = f"the model behaves towards {names} like models retrained without it"
        if cannot_tell:
            among = len(result["audits"])
            told = f"the {_number(among - len(cannot_tell), 'figure')} that can tell here, of {among}"
            return f"Passed, by {told}: {like}. {named}"
        return f"Passed. In every audit {like}. {named}"
    if result["verdict"] == SUPPRESSED:
        it = "it" if len(result["forget"]) == 1 else "them"
        if any(_shows_class(result["audits"], name) for name in result["decided_by"]):
            left = f"traces of {it} are left: audits find more of {it} than in models retrained without {it}"
        else:
            left = f"it is unlike models retrained without {it}, though no audit finds more of {it} than in them"
        u = result["audits"].get("forget", {"figure": 0.0, "verdict": None})
        answers = (
            f"names {names} no more often than {'by chance' if u['verdict'] == 'above' else 'retrained models may'}"
        )
        if "forget" in result["audits"] and u["verdict"] is None:
            answers = f"names {names} in {_tenth(u['figure'])} of its images, which no retrained model is held against"
        if u["figure"] < _GONE:
            answers = f"no longer answers {names}"
        return f"Not passed. The model {answers}, but {left}. {named}"
    assert result["verdict"] == NO_VERDICT
    return f"There is no verdict on {names}: {result['reason']}. {named}"


def outside(result: Mapping[str, Any], cannot_tell: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """Return how many of the audits lie outside their bands, by what that means, how many inside, how many cannot tell.

    Args:
        result: content of result.json.
        cannot_tell: audits without a say, see ``unable``.

    Returns:
        A phrase each, with the figures that it is about; each audit is counted in one. None without a verdict.
    """
    if result["verdict"] == NO_VERDICT:
        return []
    audits = result["audits"]
    held = [name for name in audits if audits[name]["verdict"] is not None]
    traces, unlike, suffered = _kinds_apart(audits)
    against = (*traces, *unlike, *suffered)
    beyond = [name for name in held if audits[name]["verdict"] != "inside" and name not in against]
    open_ones = [name for name in cannot_tell if name not in (*against, *beyond)]
    without = [name for name in audits if name not in held]
    inside = [name for name in held if name not in (*against, *beyond, *open_ones)]
    asked = [f"{FIGURES[name].label} ({FIGURES[name].question})" for name in open_ones]
    of = "the class" if len(result["forget"]) == 1 else "the classes"
    groups: list[tuple[list[str], str, list[str]]] = [
        (
            traces,
            f"{_count(traces, 'find')} more of {of} than in retrained models; the share of its images that is",
            [_against(audits[name], name, delivered="model" not in result) for name in traces],
        ),
        (unlike, f"{_count(unlike, 'show')} that it is unlike retrained models in other ways: {_listed(unlike)}", []),
        (
            suffered,
            "1 shows that the other classes suffered; of their images",
            [_below(audits[name]) for name in suffered],
        ),
        (open_ones, f"{len(open_ones)} cannot tell here, so what is asked stays open", asked),
        (beyond, f"{_count(beyond, 'lie')} outside on the side that speaks for the model: {_listed(beyond)}", []),
        (without, f"{len(without)} cannot be held against a band: {_listed(without)}", []),
        (
            inside,
            f"{_count(inside, 'lie')} inside {'its band' if len(inside) == 1 else 'their bands'}: {_listed(inside)}",
            [],
        ),
    ]
    return [(text, figures) for there, text, figures in groups if there]


def apart(audits: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the audits whose figures lie outside their bands and speak against the model, by what that means."""
    words = ("finds more of the class", "unlike retrained models in other ways", "the other classes suffered")
    return [(what, names) for what, names in zip(words, _kinds_apart(audits), strict=True) if names]


def _kinds_apart(audits: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    against = speaking_against({"audits": audits})
    traces = [name for name in against if _shows_class(audits, name)]
    suffered = [name for name in against if name == "retain"]
    return traces, [name for name in against if name not in (*traces, *suffered)], suffered


def _whose(result: Mapping[str, Any]) -> str:
    return "the class's" if len(result["forget"]) == 1 else "the classes'"


def _count(names: Sequence[str], verb: str) -> str:
    return f"{len(names)} {verb}{'s' * (len(names) == 1)}"


def _against(audit: Mapping[str, Any], name: str, *, delivered: bool) -> str:
    """Return a figure above its band beside the mean of the retrained models, and where the band ends."""
    if FIGURES[name].fixed is not None:  # counted
        return f"{FIGURES[name].label} {audit['figure']:g}"
    mean, end = sum(audit["band"]) / 2, clipped(audit["band"], name)[1]
    plain = FIGURES[name].plain or FIGURES[name].label
    if name == "forget" and delivered:  # without its output row
        plain += " with the answer put back"
    return f"{plain}: {_tenth(audit['figure'])} (retrained models: mean {_tenth(mean)}, band to {_tenth(end)})"


def _below(audit: Mapping[str, Any]) -> str:
    mean, end = sum(audit["band"]) / 2, clipped(audit["band"], "retain")[0]
    return f"named right: {_tenth(audit['figure'])} (retrained models: mean {_tenth(mean)}, band from {_tenth(end)})"


def _tenth(share: float) -> str:
    return f"{100 * share:.1f} %"


def certainty(result: Mapping[str, Any]) -> str:
    """Return how often the verdict is wrong, as far as that is known."""
    held = result.get("calibration", {}).get("models", {})
    if result["verdict"] == NO_VERDICT or not held:
        return ""
    passed = sum(judged["verdict"] == INDISTINGUISHABLE for judged in held.values())
    erased = (
        "a truly retrained model would be failed by mistake at most once in 20 times, as the bands are computed; of "
        f"the {len(held)} here {passed} passed when the others judged them"
    )
    controls = {name: block["verdict"] for name, block in result.get("controls", {}).items() if "verdict" in block}
    failed = sum(verdict in (SUPPRESSED, NOT_FORGOTTEN) for verdict in controls.values())
    like = [MODELS.get(name, name) for name, verdict in controls.items() if verdict == INDISTINGUISHABLE]
    passing = f" (passed: {', '.join(like)})" if like else ""
    known = (
        f"of {_number(len(controls), 'control')}, which must fail, {failed} did{passing}; how often a model that still "
        "knows the class would pass is not known"
        if controls
        else "no model that must fail was audited, so nothing says whether one would"
    )
    first, then = (known, erased) if result["verdict"] == INDISTINGUISHABLE else (erased, known)
    return f"How sure: {first}. {then[0].upper()}{then[1:]}."


def hint(result: Mapping[str, Any], original: Mapping[str, float]) -> str:
    """Return which share of what is found in the original is still found, where too few models were retrained.

    Args:
        result: content of result.json.
        original: figures of the original by name.
    """
    if len(result["oracles"]) >= FEWEST:
        return ""
    shares, measured = [], []
    for name, (low, high) in RETRAINED_SHARE.items():
        if original.get(name) and name in result["audits"]:
            share = result["audits"][name]["figure"] / original[name]
            shares.append(f"{100 * share:.0f} % by the {FIGURES[name].label}")
            measured.append(f"{100 * low:.0f} to {100 * high:.0f} %")
    if not shares:
        return ""
    return (
        f"A hint, and no more: of what audits find of the class in the original, {' and '.join(shares)} are still "
        f"found. In models that never saw their class these were {' and '.join(measured)}, on three data sets: more is "
        "a trace of it, and less proves nothing."
    )


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def chosen(fraction: Mapping[str, Any]) -> str:
    """Return which cut was chosen, and by what, of the block ``fraction``."""
    tried = [
        f"{_share(attempt['fraction'])} ({_share(attempt['probability'])}, U {_share(attempt['forget'])})"
        for attempt in fraction["attempts"]
    ]
    removed = fraction["removed"]
    went = f"{_share(removed)} of the channels went, by a cut of {_share(fraction['chosen'])}"
    if removed < fraction["chosen"] - _ROUNDED:
        went += " (the others of that share do not speak for the class)"
    went += ": of the cuts that were tried"
    if fraction["passed"]:
        why = (
            ", the smallest after which the clients' validation images of the class are given little probability for "
            "it, 5 % in the mean or less"
        )
    else:
        why = (
            " none brought the probability that the clients' validation images of the class are given for it to 5 % in "
            "the mean, and this one came nearest (more rounds of repair, an erase step or another criterion may help)"
        )
    return f"{went}{why}: {', '.join(tried)}. The cost is that of all attempts."


_ROUNDED = 0.03  # by whole channels a cut of a narrow layer is this much less


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


def unable(audits: Mapping[str, Any], original: Mapping[str, float]) -> list[str]:
    """Return the audits that cannot tell here: the original is not above the band, or nothing can be.

    Args:
        audits: of the candidate, with the bands.
        original: figures of the original, as far as they are known.
    """
    names = []
    for name, audit in audits.items():
        if audit["band"] is not None and FIGURES[name].kind == "class" and FIGURES[name].fixed is None:
            low, high = audit["band"]
            if original.get(name, float("inf")) <= high or (low <= 0 and high >= 1):
                names.append(name)
    return names


def unable_of(run: RunFolder) -> list[str]:
    """Return the same of a run; none where it was not audited."""
    return unable(run.result.get("audits", {}), run.figures("original"))


def means(result: Mapping[str, Any]) -> str:
    """Return by what a run forgot, in the words of a sentence."""
    if "method" in result:
        return str(result["method"]["label"])
    recipe = result["recipe"]
    end = "highest" if recipe["unlearn"]["end"] == "highest" else "LOWEST"
    ranked = f"pruning the channels that rank {end} for it by {recipe['unlearn']['criterion']}"
    parts = [ranked] if recipe["unlearn"]["fraction"] else []
    if recipe["erase"]["complement"] or recipe["erase"]["separation"]:
        parts.append("training on its images once more, to erase it")
    parts.append("no repair" if recipe["unlearn"]["repair"] == "none" else "repair on the other classes")
    return ", and ".join(parts)


def in_short(verdict: str, reason: str) -> str:
    """Return a verdict as it fits into a table: what kind of suppression was seen."""
    if verdict != SUPPRESSED:
        return verdict
    return f"{verdict} ({'unlike retrained models' if reason == UNLIKE else 'traces of the class'})"


def _shows_class(audits: Mapping[str, Any], name: str) -> bool:
    return audits[name]["verdict"] == "above" and FIGURES[name].kind == "class"


def _listed(names: list[str]) -> str:
    return "; ".join(FIGURES[name].label for name in names)
