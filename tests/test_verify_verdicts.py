"""What the verifier says of a verdict, its reason and what decided it, by figures given by hand."""

from fedunlearn.evidence import verify

BAND = dict.fromkeys(verify._NEEDED, (0.1, 0.05, 0.0, 0.2)) | {"forget": (0.0, 0.05, -0.1, 0.1)}
INSIDE = dict.fromkeys(verify._NEEDED, (0.1, 0.0)) | {"forget": (0.0, 0.0)}
NAMED = INSIDE | {"forget": (0.9, 0.0)}
FOUND = INSIDE | {"probe": (0.9, 0.0)}


def verdicts(candidate, verdict, decided, reason, **controls):
    """Return what the verifier says of a verdict, beside controls by their figures."""
    said = {}
    for name, figures in controls.items():
        own, by, sides = verify._judged({key: figures[key] for key in figures if key in candidate}, BAND, 3, 0.25)
        said[name] = {"verdict": own, "decided_by": by, "reason": verify._reason(own, by, sides)}
    result = {"controls": said, "oracles": dict.fromkeys("abc")}
    result |= {"verdict": verdict, "decided_by": decided, "reason": reason}
    return list(verify._verdicts(result, candidate, controls, BAND, 0.25))


def test_an_original_that_never_knew_the_class_leaves_no_verdict_but_that_it_is_named():
    traces, named = verify._REASONS["class"], verify._REASONS["named"]
    assert verdicts(FOUND, "suppressed, not erased", ["probe"], traces, original=NAMED) == []
    for u in (0.2, 0.25):
        never = INSIDE | {"forget": (u, 0.0)}
        assert verdicts(FOUND, "no verdict", [], "whatever", original=never) == []
        assert verdicts(FOUND, "suppressed, not erased", ["probe"], traces, original=never) == [
            "the verdict 'suppressed, not erased' does not follow from the figures: they give 'no verdict'"
        ]
        assert verdicts(NAMED, "not forgotten", ["forget"], named, original=never) == []


def test_the_figures_and_the_reason_of_a_verdict_follow():
    traces = verify._REASONS["class"]
    (found,) = verdicts(FOUND, "suppressed, not erased", ["relearn"], traces, original=NAMED)
    assert found.startswith("the verdict 'suppressed, not erased' does not follow from the figures")
    assert verdicts(FOUND, "suppressed, not erased", ["probe"], verify._REASONS["apart"], original=NAMED) == [
        "the reason of the verdict does not follow from the figures"
    ]


def test_a_pass_counts_only_where_the_controls_fail_by_what_the_candidate_has():
    rowless = {name: own for name, own in INSIDE.items() if name != "forget"}
    found = verdicts(rowless, "indistinguishable from retraining", sorted(rowless), "", original=NAMED)
    assert found == [
        "the verdict 'indistinguishable from retraining' does not follow from the figures: they give 'no verdict'"
    ]


def test_a_model_from_elsewhere_lacks_the_figures_of_its_row_all_together_or_none_of_them():
    bands, rowless = BAND | {"int8": ()}, {name: figure for name, figure in INSIDE.items() if name != "forget"}
    assert verify._missing(bands, rowless, elsewhere=True) == set()
    assert verify._missing(bands, rowless, elsewhere=False) == {"forget", "int8"}
    assert verify._missing(bands, INSIDE, elsewhere=True) == {"int8"}
