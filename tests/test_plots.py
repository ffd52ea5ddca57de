"""What is drawn: each mark of a plot is a number of the run, by the object that matplotlib draws."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_hex

from fedunlearn.evidence import plots
from fedunlearn.evidence.folder import RunFolder
from fedunlearn.evidence.pictures import _bands, _classes, _confusion, _relearning, _work


@pytest.fixture
def drawn(monkeypatch):
    """Let every plot be the figure itself, not its text."""
    monkeypatch.setattr(plots, "svg", lambda figure, name: figure)


def labelled(axes):
    """Return x and y of each line that the legend names."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def widths(axes):
    return {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}


def test_bars_per_class_are_before_and_after_and_marks_the_mean_of_retrained_models(drawn):
    figure = plots.per_class({"a": 0.9, "b": 0.8}, {"a": 0.7, "b": 0.0}, {"a": 0.85, "b": 0.1})
    (axes,) = figure.axes
    assert widths(axes) == {"original": pytest.approx([90, 80]), "unlearned": pytest.approx([70, 0])}
    assert labelled(axes)["retrained, mean"] == (pytest.approx([85, 10]), [0, 1])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]


def test_a_confusion_is_drawn_in_shares_of_the_true_class(drawn):
    (axes,) = plots.confusion([[3, 1], [0, 8]], ["a", "b"]).axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}


def test_a_curve_of_relearning_is_that_of_its_model(drawn):
    curves = {
        name: {"samples": [0, 64, 128], "forget": [0.0, share, 1.0], "retain": [0.5, 0.5, 0.5]}
        for name, share in (("original", 0.9), ("head_only", 0.4), ("unlearned", 0.3), ("a", 0.2), ("b", 0.1))
    }
    (axes,) = plots.relearning(curves, oracles=["a", "b"]).axes
    seen = [line.get_ydata()[1] for line in axes.get_lines()]
    assert seen == pytest.approx([20, 10, 90, 40, 30])
    named = {name: y[1] for name, (_, y) in labelled(axes).items()}
    assert named["retrained"] == pytest.approx(20)
    assert [named[name] for name in ("original", "head only", "unlearned")] == pytest.approx([90, 40, 30])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "64", "128"]


def test_work_is_operations_and_r_of_retraining_and_of_what_was_done(drawn):
    points = {"unlearned": [(2e9, 0.7)], "other": [(1e9, 0.6), (3e9, 0.65)]}
    (axes,) = plots.work([[(1e9, 0.5), (4e9, 0.8)], [(1e9, 0.4), (4e9, 0.9)]], points).axes
    assert labelled(axes)["retraining"] == ([1e9, 4e9], pytest.approx([50, 80]))
    assert labelled(axes)["unlearned"] == ([2e9], pytest.approx([70]))
    assert labelled(axes)["other"] == ([1e9, 3e9], pytest.approx([60, 65]))


def test_a_band_is_drawn_where_it_is_with_retrained_models_original_and_candidate_in_their_row(drawn):
    audits = {"probe": {"band": [-0.1, 0.4], "figure": 0.3}, "cka": {"band": None, "figure": 0.9}}
    (axes,) = plots.bands(
        audits, [{"probe": 0.1}, {"probe": 0.2, "cka": 0.8}], {"probe": 0.95}, {"probe": "p", "cka": "c"}
    ).axes
    ((bar,),) = axes.containers
    assert (bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2) == pytest.approx((0, 40, 0))
    marks = [(line.get_marker(), *map(list, line.get_data())) for line in axes.get_lines()]
    assert marks == [
        ("|", pytest.approx([10, 20]), [0, 0]),
        ("o", pytest.approx([95]), [0]),
        ("D", pytest.approx([30]), [0]),
        ("|", pytest.approx([80]), [1]),
        ("D", pytest.approx([90]), [1]),
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["p", "c"]


def test_channels_are_drawn_from_the_highest_score_and_removed_ones_in_orange(drawn):
    layers = {"a": np.array([1.0, 3.0, 2.0]), "b": np.array([5.0, 5.0])}
    (axes,) = plots.scores(layers, {"a": [1], "b": [0]}).axes
    image = axes.images[0].get_array()
    np.testing.assert_allclose(image[0], [plots._GONE(1.0), plots._KEPT(0.5), plots._KEPT(0.0)])
    np.testing.assert_allclose(image[1], [plots._GONE(0.0), plots._KEPT(0.0), [0, 0, 0, 0]])


def test_feature_maps_stand_beside_their_image_in_the_order_of_their_channels(drawn):
    pictures = np.full((2, 1, 2, 2), 10, dtype=np.uint8) + np.arange(2, dtype=np.uint8)[:, None, None, None]
    maps = np.arange(100, 106, dtype=np.uint8).reshape(2, 3, 1, 1).repeat(2, 2).repeat(2, 3)
    (axes,) = plots.feature_maps(pictures, maps, ["a", "b"], ["x", "y", "z"]).axes
    board, step = axes.images[0].get_array(), plots._CELL + plots._CELL // 8
    cells = [[int(board[row * step, column * step, 0]) for column in range(4)] for row in range(2)]
    assert cells == [[10, 100, 101, 102], [11, 103, 104, 105]]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["image", "x", "y", "z"]


def test_a_comparison_is_drawn_with_the_spread_of_each_method_and_retrained_models_as_lines(drawn):
    rows = [
        {"number": 1, "flops": 2e12, "tuned": False, "r": (0.8, 0.7, 0.9), "figures": {"probe": (0.5, 0.4, 0.6)}},
        {"number": 2, "flops": 4e12, "tuned": True, "r": (0.6, 0.6, 0.6), "figures": {"probe": None}},
    ]
    retrained = {"a": {"retain": 0.85, "figures": {"probe": 0.3}}}
    above, below = plots.compared(rows, retrained, "probe", "linear probe").axes
    for panel, spans, points, line in (
        (above, [[70, 90], [60, 60]], [(2, 80, plots._BLUE), (4, 60, plots._ORANGE)], 85),
        (below, [[40, 60]], [(2, 50, plots._BLUE)], 30),
    ):
        lines = panel.get_lines()
        assert [
            list(one.get_ydata()) for one in lines if one.get_linestyle() == "-" and one.get_color() == plots._GREY
        ] == [pytest.approx(span) for span in spans]
        marks = [one for one in lines if one.get_marker() == "o"]
        assert [(one.get_xdata()[0], one.get_ydata()[0], one.get_color()) for one in marks] == [
            (pytest.approx(x), pytest.approx(y), colour) for x, y, colour in points
        ]
        (level,) = [one.get_ydata()[0] for one in lines if to_hex(one.get_color()) == to_hex(plots._GREEN)]
        assert level == pytest.approx(line)
    assert [text.get_text() for text in above.texts] == ["1", "2"]


def test_each_picture_of_a_page_draws_the_model_that_it_names(copied, drawn):
    folder, _ = copied
    run = RunFolder.read(folder)
    result = json.loads((folder / "result.json").read_text())
    accuracy = {name: result[name]["accuracy"]["per_class"] for name in ("original", "unlearned")}
    (axes,) = _classes(run).svg.axes
    for name, shares in accuracy.items():
        assert widths(axes)[name] == pytest.approx([100 * (share or 0) for share in shares.values()])
    audits = {path.stem: json.loads(path.read_text()) for path in (folder / "audits").glob("*.json")}
    (axes,) = _relearning(run).svg.axes
    for name in ("original", "head only", "unlearned"):
        curve = audits[name.replace(" ", "_")]["details"]["relearn"]["forget"]
        assert labelled(axes)[name][1] == pytest.approx([100 * share for share in curve])
    assert len(axes.get_lines()) == 3 + len(result["oracles"])
    (axes,) = _confusion(run).svg.axes
    counts = np.array(audits["unlearned"]["details"]["confusion"])
    np.testing.assert_allclose(axes.images[0].get_array(), counts / counts.sum(1, keepdims=True))
    (axes,) = _work(run).svg.axes
    spent, r = result["cost"]["unlearn"]["client_flops"], result["unlearned"]["validation"]["retain"]
    assert labelled(axes)["unlearned"] == ([spent], pytest.approx([100 * r]))
    (axes,) = _bands(run).svg.axes
    figures = audits["original"]["figures"]
    drawn_of_it = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "o"]
    named = [name for name in result["audits"] if name in figures and name != "artefacts"]
    assert drawn_of_it == pytest.approx([100 * figures[name]["value"] for name in named])
