"""Results as a table: printed, in a notebook, as a data frame."""

import sys

import pandas
import pytest

import fedunlearn as fu
from conftest import make_images, make_net
from fedunlearn.audits.base import Found
from fedunlearn.audits.findings import Findings
from fedunlearn.audits.verdict import Band
from fedunlearn.errors import FedUnlearnError
from fedunlearn.federation.ledger import Cost
from fedunlearn.unlearn import Forgotten

FINDINGS = Findings(
    {"retain": Band(0.9, 0.01, 0.85, 1.02)},
    {"unlearned": Found({}, {})},
    {
        "unlearned": {
            "verdict": "suppressed, not erased",
            "reason": "a < b & c",
            "audits": {
                "retain": {"figure": 0.9, "band": (0.85, 1.02), "verdict": "inside"},
                "probe": {"figure": 0.5, "band": None, "verdict": None},
            },
        }
    },
    {},
)


def test_findings_are_printed_with_bands_cut_to_what_a_figure_can_reach():
    assert str(FINDINGS).splitlines() == [
        "suppressed, not erased: a < b & c",
        "audit             figure, %   retrained, %",
        "R, other classes       90.0  85.0 to 100.0  inside",
        "linear probe           50.0                 no band",
    ]


def test_a_notebook_gets_a_table_of_the_same_cells_with_nothing_read_as_markup():
    page = FINDINGS._repr_html_()
    assert "<caption>suppressed, not erased: a &lt; b &amp; c</caption>" in page
    assert page.count("<tr>") == 3
    assert "<td>85.0 to 100.0</td>" in page


def test_a_frame_has_a_row_per_figure():
    frame = FINDINGS.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["figure"]) == [0.9, 0.5]
    assert list(frame.columns) == ["audit", "label", "figure", "low", "high", "lies"]


def test_without_pandas_a_frame_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)  # an import of it then fails
    with pytest.raises(FedUnlearnError, match=r"needs pandas, which is not installed: pip install 'fedunlearn\[frames"):
        FINDINGS.to_frame()


def test_what_was_forgotten_is_printed_with_its_cost_and_a_row_per_layer():
    fed = fu.Federation(fu.LocalEngine(fu.partition(make_images(60), by="iid", clients=2, seed=0)))
    result = fu.unlearn(make_net(), fed, forget=1, cut=fu.Cut(0.25), repair=fu.Repair(fu.Training(0.05, 8), rounds=2))
    head, names, *rows = str(result).splitlines()
    weights = sum(own.numel() for own in result.model.module.parameters())
    assert head.startswith(
        f"forgot class 1: {weights:,} parameters stay; 2 rounds, {result.cost.client_samples:,} images"
    )
    assert names.split() == ["layer", "channels", "removed"]
    assert [row.split() for row in rows] == [
        [own["layer"], str(own["channels"]), str(own["removed"])] for own in result.table()
    ]
    for own in result.table():
        left = result.model.module.get_submodule(own["layer"]).weight.shape[0]
        assert own["channels"] - own["removed"] == left
    other = fu.Federation(fed.engine)
    plan = fu.unlearn(make_net(), other, forget=1, cut=fu.Cut(0.05), repair=fu.Repair(fu.Training(0.05, 8)))
    assert plan.removed() == 0
    assert result.removed() == pytest.approx((1 + 2) / (6 + 8))
    assert [(row["channels"], row["removed"]) for row in plan.table()] == [(6, 0), (8, 0)]  # too few for a channel
    nothing = Forgotten(
        forget=(0, 1),
        repaired=result.repaired,
        model=fu.Classifier(make_net(), (1, 8, 8)),
        clients=(),
        cost=Cost(client_flops=1_500_000_000, bytes_up=10**6),
    )
    assert str(nothing).startswith("forgot classes 0, 1: ")
    assert str(nothing).endswith(" 0 rounds, 0 images, 1.50 GFLOP, 1 MB")  # and no table without rows
