"""The verdict: a model's figures held against the band of models retrained without the class.

With ``n`` retrained models, of which a figure has mean ``m`` and standard deviation ``s``, and the figure's standard
error ``e`` on the images it was measured on, ``d`` figures in all::

    sd   = max(s, e z / t, 0.001)
    band = m +- t sd sqrt(1 + 1/n)

``t`` and ``z`` are the quantiles 1 - 0.05 / (2 d) of Student's t with n - 1 degrees of freedom and of the normal
distribution: ``s`` comes of few models, ``e`` is known. Of normally distributed figures, one more retrained model lies
inside all of its bands together with a probability of 95 % or more, however they are correlated (Bonferroni's
inequality); how often it does, and what fails: docs/results/verdict.md. ``evidence/verify.py`` computes the same
independently.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedunlearn.audits.base import Figure, Kind
from fedunlearn.audits.table import FIGURES

INDISTINGUISHABLE = "indistinguishable from retraining"
SUPPRESSED = "suppressed, not erased"
NOT_FORGOTTEN = "not forgotten"
NO_VERDICT = "no verdict"

MUST_FAIL = ("original", "head_only")  # controls that know the class: where one of them passes, so may anything

UNLIKE = "no audit finds more of the class than in models retrained without it, but it is unlike them"

NO_CONTROL = (
    "the model's figures lie where those of retrained models do, but no model that must fail was audited beside it, so "
    "nobody knows whether one would: give the model before unlearning, --original FILE or the control named original"
)

FEWEST = 3  # retrained models for a verdict
# No pass without these: does it name the other classes, is the class told apart in the features, is it soon relearned,
# does the model send its images where retrained models do? Any model gives them, with its row or without.
NEEDED = ("retain", "probe", "relearn", "neighbours")
_LEVEL = 0.95
_FINEST = 0.001

KINDS: dict[str, Kind] = {name: figure.kind for name, figure in FIGURES.items()}
_MEASURED = sum(figure.fixed is None for figure in FIGURES.values())  # figures whose bands retrained models give


@dataclass(frozen=True)
class Band:
    """Where one more retrained model is expected.

    Attributes:
        mean: of the retrained models.
        sd: the unit of distances, see above.
        low: lower end.
        high: upper end.
    """

    mean: float
    sd: float
    low: float
    high: float


_FIXED = {  # whatever the retrained models give
    name: Band(figure.fixed, 1.0, figure.fixed, figure.fixed)
    for name, figure in FIGURES.items()
    if figure.fixed is not None
}


def factor(oracles: int, figures: int) -> float:
    """Return half the width of a band in ``sd``: ``t sqrt(1 + 1/n)``.

    Args:
        oracles: ``n``, at least 2.
        figures: ``d``, how many have a band.

    Example:
        >>> [round(factor(n, 14), 2) for n in (3, 5, 10)]
        [19.27, 6.72, 4.1]
    """
    return _quantiles(oracles, figures)[0] * math.sqrt(1 + 1 / oracles)


def unseen(oracles: int, images: Sequence[int]) -> tuple[float, float]:
    """Return half the width of the bands of a verdict, all figures having one.

    Args:
        oracles: ``n``, how many retrained models there will be, at least 2.
        images: test images of each forgotten class, at least 1.

    Returns:
        In ``sd``; and of an accuracy of 1/2 on each of the ``K`` classes, with ``m_k`` images, if retrained models are
        all alike, which is the least: ``z sqrt(1 + 1/n) e``, ``e = sqrt(sum_k 1 / (m_k + 4)) / (2 K)``.

    Example:
        >>> [[round(of, 3) for of in unseen(n, images)] for n, images in ((3, [100]), (5, [1000]), (5, [1000, 5]))]
        [[19.27, 0.165], [6.724, 0.05], [6.724, 0.267]]
    """
    z = _quantiles(oracles, _MEASURED)[1]
    error = math.sqrt(sum(1 / (number + 4) for number in images)) / (2 * len(images))
    return factor(oracles, _MEASURED), z * math.sqrt(1 + 1 / oracles) * error


def _quantiles(oracles: int, figures: int) -> tuple[float, float]:
    """Return the quantiles of Student's t and of the normal distribution that leave their share outside."""
    from scipy import special  # slow to import

    below = 1 - (1 - _LEVEL) / (2 * figures)
    return float(special.stdtrit(oracles - 1, below)), float(special.ndtri(below))


def calibrate(oracles: Sequence[Mapping[str, Figure]]) -> dict[str, Band]:
    """Return the band of each figure that all retrained models have, none for fewer than two of them; and of artefacts.

    A figure that is no finite number in one of them has no band.

    Args:
        oracles: the figures of each retrained model.

    Example:
        >>> band = calibrate([{"probe": Figure(0.7)}, {"probe": Figure(0.75)}, {"probe": Figure(0.8)}])["probe"]
        >>> round(band.mean, 3), round(band.sd, 3), round(band.low, 3), round(band.high, 3)
        (0.75, 0.05, 0.502, 0.998)
    """
    measured = {name: [figures[name] for figures in oracles if name in figures] for name in KINDS if name not in _FIXED}
    usable = {
        name: figures
        for name, figures in measured.items()
        if 2 <= len(figures) == len(oracles) and all(math.isfinite(f.value) and math.isfinite(f.error) for f in figures)
    }
    bands = dict(_FIXED)
    t, z = _quantiles(len(oracles), len(usable)) if usable else (math.nan, math.nan)
    for name, figures in usable.items():
        mean = statistics.fmean(figure.value for figure in figures)
        error = max(figure.error for figure in figures)
        sd = max(statistics.stdev(figure.value for figure in figures), error * z / t, _FINEST)
        half = t * math.sqrt(1 + 1 / len(oracles)) * sd
        bands[name] = Band(mean, sd, mean - half, mean + half)
    return bands


def judge(figures: Mapping[str, Figure], bands: Mapping[str, Band], *, oracles: int, chance: float) -> dict[str, Any]:
    """Return the verdict on a model as it stands in result.json.

    ``not forgotten``: U lies above the band and above chance. ``indistinguishable from retraining``: every figure lies
    in its band, or nearer to the retrained models than they are to each other. ``suppressed, not erased``: all else.
    ``no verdict``: it would pass, but a figure has no band, or one of ``NEEDED`` is missing; or there are too few
    retrained models. The burden of proof is the model's: where no audit finds the class and the model yet differs from
    retrained ones (it sends the class elsewhere, say), erasure is not shown; ``reason`` tells the two cases apart.

    Args:
        figures: of the model.
        bands: of the retrained models.
        oracles: how many they are.
        chance: U of a model that guesses.

    Returns:
        ``verdict``, ``reason``, ``decided_by`` (names of figures) and ``audits``: per figure ``figure``, ``band``,
        ``distance`` from the mean in ``sd``, and ``verdict``: ``inside``, ``above`` or ``below``, or None without a
        band.
    """
    audits = {name: _held(figures[name], bands.get(name)) for name in KINDS if name in figures}
    held = [name for name, audit in audits.items() if audit["verdict"] is not None]
    if oracles < FEWEST:
        reason = f"{oracles} retrained models, at least {FEWEST} are needed: every figure is reported without a verdict"
        if oracles == 0:
            reason += "; membership, neighbours and features, which compare with retrained models, are left out"
        return {"verdict": NO_VERDICT, "reason": reason, "decided_by": [], "audits": audits}
    apart = speaking_against({"audits": audits})
    shown = [name for name in apart if (KINDS[name], audits[name]["verdict"]) == ("class", "above")]
    if "forget" in shown and figures["forget"].value > chance:
        verdict, decided, reason = NOT_FORGOTTEN, ["forget"], "the model still names the class"
    elif shown:
        verdict, decided, reason = SUPPRESSED, apart, "it knows more of the class than models retrained without it"
    elif apart:
        verdict, decided, reason = SUPPRESSED, apart, UNLIKE
    elif missing := [name for name in KINDS if name not in held and (name in NEEDED or name in audits)]:
        verdict, decided = NO_VERDICT, []
        reason = (
            f"a pass needs the figures {', '.join(NEEDED)}, and each that the model has, of every retrained model too: "
            f"{', '.join(missing)} cannot be held against a band"
        )
    else:
        reason = f"all {len(held)} figures lie where one more retrained model is expected"
        verdict, decided = INDISTINGUISHABLE, held
    return {"verdict": verdict, "reason": reason, "decided_by": decided, "audits": audits}


def speaking_against(judgement: Mapping[str, Any]) -> list[str]:
    """Return the figures of a judgement that lie outside their band on a side that speaks against the model."""
    sides = {name: audit["verdict"] for name, audit in judgement["audits"].items()}
    beyond = {name: side for name, side in sides.items() if side in ("above", "below")}
    return [name for name, side in beyond.items() if (KINDS[name], side) not in _HARMLESS]


def controlled(
    judgement: Mapping[str, Any],
    controls: Mapping[str, Mapping[str, Figure]],
    bands: Mapping[str, Band],
    *,
    oracles: int,
    chance: float,
) -> dict[str, Any]:
    """Return ``judgement``, without a verdict where it is a pass that would mean nothing.

    It does where no model of ``MUST_FAIL`` was measured, or one of them does not fail by the figures that the candidate
    has: a candidate without its output row is judged without U, by which its controls may fail.

    Args:
        judgement: on the candidate.
        controls: figures by name of those of ``MUST_FAIL`` that were measured.
        bands: of the retrained models.
        oracles: how many they are.
        chance: U of a model that guesses.
    """
    if judgement["verdict"] != INDISTINGUISHABLE:
        return dict(judgement)
    passing = []
    for name, figures in controls.items():
        judged = {figure: value for figure, value in figures.items() if figure in judgement["audits"]}
        if judge(judged, bands, oracles=oracles, chance=chance)["verdict"] not in (SUPPRESSED, NOT_FORGOTTEN):
            passing.append(name)
    reason = "" if controls else NO_CONTROL
    if passing:
        names = " and ".join(passing)
        reason = f"the audits cannot tell {names} from retraining, so a pass means nothing: use more images or models"
    return {**judgement, "verdict": NO_VERDICT, "reason": reason, "decided_by": []} if reason else dict(judgement)


def never_known(judgement: Mapping[str, Any], original: Mapping[str, Figure], *, chance: float) -> dict[str, Any]:
    """Return ``judgement``, without a verdict where the original did not know the class: nothing could be forgotten.

    It did not where its U is not above chance; to lie in its band says nothing, that of few images holds any U. This
    is said where there is no verdict for another reason too, such as too few retrained models: more would not help.

    Args:
        judgement: on the unlearned model.
        original: figures of the model before unlearning.
        chance: U of a model that guesses.
    """
    if judgement["verdict"] == NOT_FORGOTTEN or "forget" not in original:
        return dict(judgement)
    u = original["forget"].value
    if u > chance:
        return dict(judgement)
    reason = (
        f"the original itself names the class in {100 * u:.1f} % of its images, no more than by chance: "
        "there was nothing to forget; train the original for longer (train.rounds)"
    )
    return {**judgement, "verdict": NO_VERDICT, "reason": reason, "decided_by": []}


_HARMLESS = {("near", "above"), ("apart", "below")}  # closer to the retrained models than they are to each other


def leave_one_out(
    oracles: Mapping[str, Mapping[str, Figure]], controls: Mapping[str, Mapping[str, Figure]], *, chance: float
) -> dict[str, Any]:
    """Return what the verdict is on each retrained model, and on controls, by the bands of the other retrained models.

    Fewer than three retrained models cannot be held out. The figures that compare with retrained models (membership,
    neighbours, features) of the judging ones were measured with the held-out one among them, which favours it a little.

    Args:
        oracles: figures of each retrained model.
        controls: figures of models that must fail.
        chance: U of a model that guesses.

    Returns:
        ``models``: per held-out model its ``verdict``, the figures ``outside`` and the verdicts on ``controls``;
        ``false_positives`` of ``figures``: how many of the held-out models' figures lie outside.
    """
    models: dict[str, Any] = {}
    figures = beyond_all = 0
    for name, held in oracles.items() if len(oracles) >= FEWEST else ():
        others = [theirs for other, theirs in oracles.items() if other != name]
        bands = calibrate(others)
        # The bands of two models are wide enough to be used where three are needed: they are only a check here.
        asked = max(len(others), FEWEST)
        found = judge(held, bands, oracles=asked, chance=chance)
        beyond = [figure for figure, audit in found["audits"].items() if audit["verdict"] in ("above", "below")]
        figures += sum(audit["verdict"] is not None for audit in found["audits"].values())
        beyond_all += len(beyond)
        models[name] = {
            "verdict": found["verdict"],
            "outside": beyond,
            "controls": {
                control: judge(theirs, bands, oracles=asked, chance=chance)["verdict"]
                for control, theirs in controls.items()
            },
        }
    return {"models": models, "figures": figures, "false_positives": beyond_all}


def thresholds_json(bands: Mapping[str, Band], *, oracles: int) -> dict[str, Any]:
    """Return thresholds as they stand in thresholds.json."""
    figures = len(bands) - len(_FIXED)
    return {
        "level": _LEVEL,
        "oracles": oracles,
        "figures": figures,
        "factor": factor(oracles, figures) if figures else None,
        "bands": {name: asdict(band) for name, band in bands.items()},
    }


def _held(figure: Figure, band: Band | None) -> dict[str, Any]:
    if band is None:
        return {"figure": figure.value, "error": figure.error, "band": None, "distance": None, "verdict": None}
    # A figure that is not a number lies outside.
    side = "inside" if band.low <= figure.value <= band.high else "below" if figure.value < band.low else "above"
    return {
        "figure": figure.value,
        "error": figure.error,
        "band": [band.low, band.high],
        "distance": (figure.value - band.mean) / band.sd,
        "verdict": side,
    }
