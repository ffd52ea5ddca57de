"""A comparison of methods: its cells, what it chooses by, what is left of it after a kill, and its page."""

import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from conftest import in_browser, write_set
from fedunlearn.audits import verdict
from fedunlearn.console import comparison_notes, comparison_table
from fedunlearn.errors import DataError, RecipeError, RunError
from fedunlearn.evidence.comparison import summary, write_comparison
from fedunlearn.evidence.keys import make_keys
from fedunlearn.evidence.verify import problems
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import Cost
from fedunlearn.methods.base import Method, Outcome, delivered, settings_by
from fedunlearn.methods.table import COMPARED, METHODS
from fedunlearn.models import build_model
from fedunlearn.run.cells import Cells
from fedunlearn.run.commands import run
from fedunlearn.run.compare import Plan, compare
from fedunlearn.run.experiment import prepare
from fedunlearn.run.kept import store
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.tuning import score
from fedunlearn.training.objectives.erase import Erasing
from test_cli import PROGRAM, fedunlearn

SHORT = ("contrast", "finetune", "relabel")
SETTINGS = ["train.rounds=2", "evidence.feature_maps=false"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison, and what was told of it."""
    folder = tmp_path_factory.mktemp("compared")
    recipe, lines = load_recipe(str(write_set(folder, oracles=3)), SETTINGS), []
    value = compare(recipe, folder / "out", Plan((*SHORT, "head_only"), seeds=2), tell=lines.append)
    return folder, value, lines


def test_each_method_has_a_cell_for_each_seed_with_figures_verdict_and_cost(compared):
    folder, value, lines = compared
    assert list(value["cells"]) == [f"{name}-seed{seed}" for name in (*SHORT, "head_only") for seed in (0, 1)]
    assert value["failed"] == {}
    assert value == json.loads((folder / "out" / "compare.json").read_text())
    for name, cell in value["cells"].items():
        assert cell["verdict"] in ("suppressed, not erased", "not forgotten", "no verdict")
        by_cost = {"epochs"} if cell["method"] == "finetune" else set()  # goes on until it has cost as much
        assert set(cell["used"] or {}) == set(cell["settings"] or {}) - by_cost
        assert {"probe", "cka", "relearn"} <= set(cell["figures"])
        assert (cell["cost"]["client_flops"] > 0) == ("speedup" in cell) == (not name.startswith("head_only"))
        assert (folder / "out" / "cells" / name / "model.safetensors").exists()
    first, second = (value["cells"][f"relabel-seed{seed}"]["figures"] for seed in (0, 1))
    assert first != second
    assert len(lines) == 8
    assert lines[0].startswith("contrast-seed0: U ")
    assert lines[0].rstrip(")").endswith("left")
    assert lines[-1].endswith("(8 of 8, about 0 s left)")


def test_the_speed_up_of_a_cell_is_that_beside_every_retrained_model(compared, tmp_path):
    folder, value, _ = compared
    curves = {f"retrained-{seed}": [] for seed in (1, 2, 3)}
    for line in (folder / "out" / "rounds.jsonl").read_text().splitlines()[1:]:
        step = json.loads(line)
        name, _, phase = step["phase"].partition(".")
        if phase == "retrain":
            spent = sum(entry["flops"] for entry in step["entries"] if entry["job"] == "train")
            curves[name].append((spent, step["validation"]))
    for cell in (own for own in value["cells"].values() if "speedup" in own):
        ratios, late = [], 0
        for curve in curves.values():
            spent = 0
            for flops, r in curve:
                spent += flops
                if r >= cell["validation"]["retain"]:
                    break
            else:
                late += 1
            ratios.append(spent / cell["cost"]["client_flops"])
        assert cell["speedup"] == pytest.approx(sum(ratios) / 3)
        assert cell["speedup_range"] == [min(ratios), max(ratios)]
        assert cell["speedup_reached"] == (late == 0)
    # What the page says of the bands and of one seed stands below the table of the terminal.
    assert "One seed" not in comparison_notes(value)
    assert comparison_notes(value | {"seeds": [0]}).startswith("One seed: nothing is known of the spread.\nCannot tell")
    blind = comparison_notes(value | {"controls": {"head_only": "indistinguishable from retraining"}})
    assert blind.endswith("A pass counts for little here: head only passes too.")
    # Where one of them was late it is a bound, on the page and on the terminal.
    told = copy.deepcopy(value)
    told["cells"]["contrast-seed1"]["speedup_reached"] = False
    row = next(row for row in summary(told) if row["name"] == "contrast")
    assert (row["reached"], next(own["reached"] for own in summary(told) if own["name"] == "relabel")) == (False, True)
    text = Console(record=True, width=200, file=io.StringIO())
    text.print(comparison_table(told))
    lines = {line.split()[0]: line for line in text.export_text(clear=False).splitlines() if line.strip()}
    assert f"> {row['speedup'][0]:.1f}" in lines["contrast"]
    assert "> " not in lines["relabel"]
    assert "> is a lower bound" in text.export_text(clear=False)
    shutil.copytree(folder / "out", tmp_path / "out")
    for shown in (value, told):
        (tmp_path / "out" / "compare.json").write_text(json.dumps(shown))
        write_comparison(tmp_path / "out")
        page = (tmp_path / "out" / "report.html").read_text()
        assert (f"&gt; {row['speedup'][0]:.1f}" in page) == (shown is told)
    row = next(row for row in summary(value) if row["name"] == "contrast")
    cells = [value["cells"][f"contrast-seed{seed}"] for seed in (0, 1)]
    assert row["speedup"][1:] == (
        min(cell["speedup_range"][0] for cell in cells),
        max(cell["speedup_range"][1] for cell in cells),
    )


def test_fine_tuning_stops_at_what_pruning_cost_with_the_same_seed(compared):
    _, value, _ = compared
    for seed in (0, 1):
        pruned, tuned = (value["cells"][f"{name}-seed{seed}"]["cost"] for name in ("contrast", "finetune"))
        assert tuned["client_flops"] == pytest.approx(pruned["client_flops"], rel=0.1)


@pytest.mark.parametrize("criterion", ["contrast", "tf_idf"])
def test_the_random_control_loses_as_much_as_the_pruning_it_stands_beside(tmp_path, criterion):
    """Where few channels speak for the class, fewer go than the cut asks for."""
    settings = [*SETTINGS, "unlearn.fraction=0.8", f"unlearn.criterion={criterion}", "audit.oracles=0"]
    value = compare(load_recipe(str(write_set(tmp_path)), settings), tmp_path / "out", Plan((criterion, "random"), 1))
    ours, control = (value["cells"][f"{name}-seed0"] for name in (criterion, "random"))
    assert control["parameters"] == ours["parameters"]
    assert control["prunes"] == ours["gone"]
    assert (ours["gone"] < 0.8) == (criterion == "contrast")


def test_nothing_of_a_day_or_a_machine_is_in_the_file(compared):
    folder, _, _ = compared
    text = (folder / "out" / "compare.json").read_text()
    assert "seconds" not in text
    assert str(folder) not in text


def test_bands_are_fixed_before_any_method_is_measured(compared):
    folder, _, _ = compared
    events = (folder / "out" / "events.jsonl").read_text()
    assert "thresholds fixed" in events
    made = (folder / "out" / "thresholds.json").stat().st_mtime_ns
    first = min(path.stat().st_mtime_ns for path in (folder / "out" / "cells").glob("*/rounds.jsonl"))
    assert made < first


def test_methods_and_seeds_may_be_added_and_what_is_there_is_not_done_again(compared):
    folder, before, _ = compared
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out" / "cells").glob("*.json")}
    recipe = load_recipe(str(folder / "tiny.toml"), ["audit.oracles=3", *SETTINGS])
    value = compare(recipe, folder / "out", Plan((*SHORT, "head_only", "negate"), seeds=2))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert {name: cell for name, cell in value["cells"].items() if not name.startswith("negate")} == before["cells"]
    assert len(value["cells"]) == 10
    lines = []
    compare(recipe, folder / "out", Plan(SHORT, seeds=1), tell=lines.append)
    assert lines[-1].startswith("done before and not asked for now, so not on the page: contrast-seed1, finetune-seed1")
    compare(recipe, folder / "out", Plan((*SHORT, "head_only", "negate"), seeds=2))


def test_the_page_names_each_method_with_its_spread_and_needs_nothing_else(compared):
    folder, value, _ = compared
    page = (folder / "out" / "report.html").read_text()
    for name in (*SHORT, "head_only"):
        assert value["methods"][name]["label"] in page
    assert "<script" not in page
    assert "http" not in page.replace('xmlns="http://www.w3.org', "").replace('"http://www.w3.org', "")
    assert "One seed: nothing is known of the spread." not in page
    (relabelled,) = [row for row in summary(value) if row["name"] == "relabel"]
    rs = [value["cells"][f"relabel-seed{seed}"]["accuracy"]["retain"] for seed in (0, 1)]
    assert relabelled["r"] == (sum(rs) / 2, min(rs), max(rs))
    once = value | {
        "seeds": [0],
        "cells": {name: cell for name, cell in value["cells"].items() if name.endswith("0")},
        "failed": {"negate-seed0": "too few <clients>"},
    }
    other = folder / "once"
    other.mkdir()
    (other / "compare.json").write_text(json.dumps(once))
    write_comparison(other)
    page = (other / "report.html").read_text()
    assert "One seed: nothing is known of the spread." in page
    assert "negate-seed0: too few &lt;clients&gt;" in page
    with pytest.raises(RunError, match=r"expected what fedunlearn compare writes, but"):
        write_comparison(folder)
    (other / "compare.json").write_text('{"schema": 1}')
    with pytest.raises(
        RunError, match=r"compare.json: expected a result of schema 2, got 1: read it by the version of"
    ):
        write_comparison(other)
    (other / "compare.json").write_text('{"schema": 2}')
    with pytest.raises(RunError, match=r"once: its files cannot be read .* \(KeyError: 'cells'\)"):
        write_comparison(other)


@in_browser
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_a_desk_and_its_plot_is_drawn(compared, browser, width, scheme):
    folder, value, _ = compared
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto((folder / "out" / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    table = page.get_by_role("region")
    assert width == 390 or table.evaluate("own => own.scrollWidth <= own.clientWidth")
    assert page.locator("tbody tr").count() >= len(value["methods"]) + 1 + len(value["retrained"])
    assert page.locator("figure svg").bounding_box()["width"] > 250
    assert "mathdefault" not in page.content()
    page.get_by_role("link", name="2 fine-tuning only").click()
    assert page.url.endswith("#finetune")
    assert said == []
    page.close()


def test_a_killed_comparison_goes_on_to_the_same_file(compared, tmp_path):
    folder, _, _ = compared
    given = ["compare", folder / "tiny.toml", "--methods", ",".join((*SHORT, "head_only")), "--seeds", "2"]
    given += ["--out", tmp_path / "out", *(part for own in ("audit.oracles=3", *SETTINGS) for part in ("--set", own))]
    child = subprocess.Popen(
        [PROGRAM, *map(str, given)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while child.poll() is None and not (tmp_path / "out" / "cells" / "finetune-seed0" / "rounds.jsonl").exists():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out" / "compare.json").exists()
    done = fedunlearn(*given)
    assert done.returncode == 0, done.stderr
    assert "relabel" in done.stdout
    found, expected = (json.loads((own / "out" / "compare.json").read_text()) for own in (tmp_path, folder))
    for value in (found, expected):
        value["cells"] = {name: cell for name, cell in value["cells"].items() if not name.startswith("negate")}
        value["methods"].pop("negate", None)
        value["recipe"].pop("data")
    assert json.dumps(found) == json.dumps(expected)  # the order as well


@dataclass(frozen=True)
class Scaled:
    """Settings of a made-up method."""

    by: float = 2.0


def scaled(model, fed, request, settings):
    """Scale all weights; by 0 nothing is left, which counts as a failure of the run."""
    if settings.by == 0:
        raise ZeroDivisionError("nothing\nis left")
    other = model.copy()
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.mul_(settings.by)
    return Outcome(delivered(other, request), Cost())


SCALED = Method("scaled", "made up", "nothing", scaled, settings=Scaled(), space={"by": (0, 1, 3)})


def test_a_method_of_ones_own_is_a_row_and_a_failure_costs_its_cell(compared, monkeypatch):
    folder, _, _ = compared
    monkeypatch.setitem(COMPARED, "scaled", SCALED)
    monkeypatch.setitem(COMPARED, "broken", replace(SCALED, name="broken", label="broken", settings=Scaled(0)))
    recipe = load_recipe(str(folder / "tiny.toml"), ["audit.oracles=3", *SETTINGS])
    lines = []
    plan = Plan((*SHORT, "scaled", "broken"), seeds=1, tune=0)
    value = compare(recipe, folder / "out", plan, tell=lines.append)
    assert "scaled-seed0" in value["cells"]
    assert value["failed"] == {"broken-seed0": "ZeroDivisionError: nothing is left"}
    assert any(line.startswith("broken-seed0 failed: ZeroDivisionError: nothing is left") for line in lines)
    page = (folder / "out" / "report.html").read_text()
    assert "made up" in page
    assert "broken-seed0: ZeroDivisionError: nothing is left" in page


def test_a_trial_is_scored_by_its_u_and_what_its_r_lacks():
    assert score(0.1, 0.7, 0.9) == pytest.approx(0.3)
    assert score(0.1, 0.95, 0.9) == pytest.approx(0.1)


def test_settings_are_tried_on_validation_images_and_all_trials_are_told(tmp_path, monkeypatch):
    monkeypatch.setitem(COMPARED, "scaled", SCALED)
    recipe = load_recipe(str(write_set(tmp_path, oracles=1)), SETTINGS)
    value = compare(recipe, tmp_path / "out", Plan(("scaled", "relabel", "ssd"), seeds=1, tune=3))
    trials = value["methods"]["scaled"]["trials"]
    assert trials[0]["settings"] == {"by": 2.0}
    assert len(trials) == 3
    assert [own["settings"]["by"] for own in trials] == [2.0, 3, 0]  # its own, then others by a draw that is fixed
    assert [own["failed"] for own in trials if own["settings"]["by"] == 0] == ["ZeroDivisionError: nothing is left"]
    for name in ("relabel", "ssd"):
        ended = [own for own in value["methods"][name]["trials"] if "score" in own]
        assert min(own["score"] for own in ended) == next(
            own["score"] for own in ended if own["settings"] == value["methods"][name]["tuned"]
        )
        tuned = value["methods"][name]["tuned"]
        assert (f"{name}-tuned-seed0" in value["cells"]) == (tuned != value["methods"][name]["settings"])
    assert "trial0" not in "".join(value["cells"])
    again = compare(recipe, tmp_path / "out", Plan(("scaled", "relabel", "ssd"), seeds=1, tune=3))
    assert again == value


@pytest.mark.parametrize(
    ("settings", "plan", "text"),
    [
        (
            ["data.validation=0"],
            Plan(("relabel",), tune=1),
            "--tune needs validation images: set data.validation",
        ),
        (
            ["unlearn.forget=[3]", "data.validation=0.02"],
            Plan(("relabel",), tune=3),
            "--tune chooses by validation images of the classes to forget, and the clients hold none of one of them "
            "(data.validation is 0.02): raise it",
        ),
        (
            ['unlearn.method="scrub"', "unlearn.settings={lr=0.02}"],
            Plan(("scrub",)),
            "unlearn.settings is of unlearn.method, and a comparison takes the settings of each method: leave it out",
        ),
        (["audit.oracles=0"], Plan(("relabel",), tune=1), "--tune needs retrained models, whose R it is to reach"),
        (
            ["privacy.noise=2", "privacy.clip=1", "unlearn.sample=0"],
            Plan(("contrast", "head_only")),
            "privacy.noise protects one request, and a comparison measures the clients for each method, seed and trial",
        ),
        (
            ["privacy.secure=true", "federation.engine=flower-simulation"],
            Plan(("contrast", "finetune", "salun", "ssd", "random", "head_only")),
            "privacy.secure protects what clients measure, and other numbers are asked for by salun, ssd: leave",
        ),
        (
            ["unlearn.target=0.5"],
            Plan(("contrast", "erase")),
            "the erase step of erase is a part of the repair's rounds",
        ),
        (["unlearn.repair=reestimate"], Plan(), "the erase step of erase, erase_only is a part of the repair's rounds"),
    ],
)
def test_what_would_be_worth_nothing_is_refused_before_any_work(tmp_path, settings, plan, text):
    recipe = load_recipe(str(write_set(tmp_path, oracles=3)), [*SETTINGS, *settings])
    with pytest.raises(RecipeError) as raised:
        compare(recipe, tmp_path / "out", plan)
    assert text in str(raised.value)
    assert not (tmp_path / "out").exists()  # so that the command may be given again, corrected


def test_models_whose_training_nobody_looked_at_give_no_speed_up_and_nothing_to_tune_towards(signed, tmp_path):
    rounds = json.loads((signed / "plain" / "retraining.json").read_text())["retrained-1"]
    steps = [replace(Step.from_dict(value), validation=None) for value in rounds]
    oracle = build_model("nets:tiny", classes=4, colours=1)
    oracle.load_state_dict(load_file(signed / "plain" / "oracles" / "retrained-1.safetensors"))
    store(tmp_path / "retrained-1.safetensors", oracle, steps)
    shutil.copy(signed / "plain" / "original.safetensors", tmp_path)
    given = [f'audit.models="{tmp_path}"', f'model.weights="{tmp_path / "original.safetensors"}"', "audit.oracles=1"]
    recipe = load_recipe(str(signed / "tiny.toml"), given)
    with pytest.raises(RecipeError, match=r"--tune needs the R of retrained models.*retrained-1 was not measured"):
        compare(recipe, tmp_path / "out", Plan(("ssd",), 1, tune=1))
    cell = compare(recipe, tmp_path / "out", Plan(("ssd",), 1))["cells"]["ssd-seed0"]
    assert "speedup" not in cell
    assert cell["cost"]["client_flops"] > 0


def test_a_comparison_that_is_repeated_is_the_same_where_the_criterion_is_a_control(tmp_path):
    settings = [*SETTINGS, "unlearn.criterion=random", "audit.oracles=0"]
    recipe, plan = load_recipe(str(write_set(tmp_path)), settings), Plan(("finetune", "random"), seeds=1)
    value = compare(recipe, tmp_path / "out", plan)
    assert value["cells"]["finetune-seed0"]["stops_at"] is None  # the control is done after it
    assert compare(recipe, tmp_path / "out", plan) == value


def test_a_cell_that_lost_its_file_is_done_again_and_other_weights_are_refused_before_any_is(signed, tmp_path):
    weights = tmp_path / "original.safetensors"
    shutil.copy(signed / "plain" / "original.safetensors", weights)
    recipe = load_recipe(str(signed / "tiny.toml"), [f'model.weights="{weights}"', "audit.oracles=0"])
    value = compare(recipe, tmp_path / "out", Plan(("ssd",), seeds=1))
    assert value["validation_unseen"] is False
    page = (tmp_path / "out" / "report.html").read_text()
    assert "may have seen the validation images" in page
    (tmp_path / "out" / "report.html").unlink()
    assert fedunlearn("report", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "report.html").read_text() == page
    (tmp_path / "out" / "cells" / "ssd-seed0.json").unlink()
    assert compare(recipe, tmp_path / "out", Plan(("ssd",), seeds=1)) == value
    before = (tmp_path / "out" / "original.safetensors").read_bytes()
    shutil.copy(signed / "plain" / "oracles" / "retrained-1.safetensors", weights)
    with pytest.raises(RunError, match="weights"):
        compare(recipe, tmp_path / "out", Plan(("ssd",), seeds=1))
    assert (tmp_path / "out" / "original.safetensors").read_bytes() == before


@pytest.mark.parametrize("oracles", [0, 1])
def test_with_few_retrained_models_there_are_figures_and_no_verdict(tmp_path, oracles):
    recipe = load_recipe(str(write_set(tmp_path, oracles=oracles)), SETTINGS)
    value = compare(recipe, tmp_path / "out", Plan(("ssd",), seeds=1))
    assert value["cells"]["ssd-seed0"]["verdict"] == "no verdict"
    assert set(value["bands"]) <= {"artefacts"}
    assert (tmp_path / "out" / "report.html").exists()


def test_nothing_passes_where_the_original_never_knew_the_class(tmp_path):
    recipe = load_recipe(str(write_set(tmp_path, oracles=3)), ["train.rounds=1", "train.lr=1e-6"])
    value = compare(recipe, tmp_path / "out", Plan(("relabel",), seeds=1))
    cell = value["cells"]["relabel-seed0"]
    assert cell["verdict"] in ("no verdict", "suppressed, not erased")
    assert ("speedup" in cell) == (value["original"]["forget"] > 0.25)
    assert set(value["controls"]) == {"original", "head_only"}
    assert len(value["calibration"]["models"]) == 3


def test_a_cell_is_done_again_where_its_settings_or_its_budget_changed(tmp_path, monkeypatch):
    monkeypatch.setitem(COMPARED, "scaled", SCALED)
    recipe = load_recipe(str(write_set(tmp_path, oracles=1)), [*SETTINGS, "unlearn.criterion=contrast"])
    first = compare(recipe, tmp_path / "out", Plan(("scaled", "finetune"), seeds=1))
    monkeypatch.setitem(COMPARED, "scaled", replace(SCALED, settings=Scaled(1.5)))
    second = compare(recipe, tmp_path / "out", Plan(("contrast", "scaled", "finetune"), seeds=1))
    assert second["failed"] == {}
    assert second["cells"]["scaled-seed0"]["settings"] == {"by": 1.5}
    assert second["cells"]["scaled-seed0"]["figures"] != first["cells"]["scaled-seed0"]["figures"]
    assert first["cells"]["finetune-seed0"]["stops_at"] is None
    budget = second["cells"]["contrast-seed0"]["cost"]["client_flops"]
    assert second["cells"]["finetune-seed0"]["stops_at"] == budget
    fresh = compare(recipe, tmp_path / "fresh", Plan(("contrast", "scaled", "finetune"), seeds=1))
    assert fresh["cells"] == second["cells"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--methods", "finetune,scrubb"], "there is no method 'scrubb'; known are tf_idf, contrast, erase"),
        (["--methods", "all,scrubb"], "there is no method 'scrubb'; known are tf_idf, contrast, erase"),
        (["--methods", "prune"], "compare takes pruning by the name of its ranking: tf_idf or contrast (or erase)"),
        (["--methods", "all,finetune", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--tune", "-1"], "--tune must be at least 0, got -1"),
        (["--engine", "flower"], "compare runs its clients in this process, or with --engine flower-simulation"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, given, text):
    done = fedunlearn("compare", write_set(tmp_path), "--out", tmp_path / "out", *given)
    assert done.returncode == 2
    assert text in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_class_without_test_images_is_refused_before_anything_is_trained(tmp_path):
    recipe = load_recipe(str(write_set(tmp_path)))
    arrays = dict(np.load(tmp_path / "set.npz"))
    others = arrays["y_test"] != recipe.unlearn.forget[0]
    np.savez(tmp_path / "set.npz", **arrays | {f"{name}_test": arrays[f"{name}_test"][others] for name in "xy"})
    with pytest.raises(DataError, match=r"the test images hold none of class 2 \(2\): an audit"):
        compare(recipe, tmp_path / "out", Plan(("finetune",), seeds=1))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_deployment_compares_nothing(tmp_path):
    from fedunlearn.engines import Order, carry_out

    recipe = load_recipe(str(write_set(tmp_path)), ["federation.engine=flower"])
    order = Order(recipe=recipe, out=tmp_path / "out", superlink="a:1", compared=Plan())
    with pytest.raises(RecipeError, match=r"compare runs its clients in this process, or with --engine flower-simul"):
        carry_out(order)


def test_the_methods_are_listed_with_needs_settings_and_sources():
    done = fedunlearn("methods")
    assert "what [unlearn] and [erase] of the recipe say" in done.stdout  # not read as markup
    assert done.returncode == 0
    for name in COMPARED:
        assert name in done.stdout
    assert "salient 0.5" in " ".join(done.stdout.split())


def test_the_erase_step_of_a_recipe_is_that_of_the_methods_that_have_one(tmp_path):
    recipe = str(write_set(tmp_path))
    for name in ("erase", "erase_only"):
        method = METHODS[name]
        assert settings_by(method, load_recipe(recipe).erase.erasing()) == method.settings
        given = [f"unlearn.method={name}", "erase.complement=5", "erase.share=0.5", "unlearn.settings={every = 2}"]
        read = load_recipe(recipe, given)
        own = replace(settings_by(method, read.erase.erasing()), **read.unlearn.settings)
        assert own.objective() == Erasing(5.0, 0.0, 0.5, 1.0, 2)
        result = run(read, tmp_path / name, command="unlearn")
        used = result["method"]["settings"]
        assert {key: used[key] for key in ("complement", "share", "every")} == {
            "complement": 5.0,
            "share": 0.5,
            "every": 2,
        }
    assert settings_by(METHODS["scrub"], Erasing(1.0)) == METHODS["scrub"].settings


@pytest.mark.parametrize("name", ["ssd", "finetune"])
def test_a_run_forgets_by_any_method_and_its_dossier_is_verified(tmp_path, name):
    recipe = load_recipe(str(write_set(tmp_path, oracles=1)), [f"unlearn.method={name}", *SETTINGS])
    make_keys(tmp_path / "operator")
    result = run(recipe, tmp_path / "out", key=tmp_path / "operator")
    assert problems(tmp_path / "out", tmp_path / "operator.pub") == []
    assert result["cost"]["unlearn"]["client_flops"] > 0
    assert {"original", "head_only", "finetune"} <= set(result["controls"])
    assert "pruned" not in result["controls"]
    method = result["method"]
    for page in ("report.md", "report.html"):
        assert f"Forgotten by {method['label']}" in (tmp_path / "out" / page).read_text()
    assert None not in method["settings"].values()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["unlearn.method=scrubb"], "svd, relabel, scrub (did you mean 'scrub'?), got 'scrubb'"),
        (
            ["unlearn.method=scrub", "unlearn.settings={temperatur = 1.0}"],
            "unlearn.settings: there is no 'temperatur'; the method scrub has lr, epochs, distil, temperature, ascent, "
            "away",
        ),
        (
            ["unlearn.settings={lr = 1.0}"],
            "unlearn.settings: there is no 'lr'; the method prune is set by the other keys of [unlearn] (",
        ),
        (
            ["unlearn.method=scrub", "unlearn.settings={epochs = 0.0}"],
            "Scrub(epochs=...) is out of range: got 0.0",
        ),
        (["unlearn.method=scrub", "erase.complement=1"], "[erase] is no part of the method scrub: leave it out"),
        (["unlearn.method=relabel", "unlearn.repair=none"], "are of what is pruned, and not of the method relabel"),
        (["unlearn.method=relabel", "unlearn.target=0.5"], "are of what is pruned, and not of the method relabel"),
        (["unlearn.target=0.5", "erase.complement=1"], "would end the rounds before those of the erase step are done"),
        (
            ["unlearn.target=0.5", "unlearn.method=erase"],
            "would end the rounds before those of the erase step are done",
        ),
        (["unlearn.repair=none", "unlearn.method=erase"], "the erase step is a part of the repair's rounds"),
        (
            ["unlearn.method=tf_idf", "unlearn.reference=channel"],
            "are of the criterion tf_idf, and unlearn.criterion is contrast: leave them out, or set",
        ),
        (
            ["unlearn.method=ssd", "privacy.noise=2", "privacy.clip=1", "unlearn.sample=0"],
            "protect what clients measure, and the method ssd asks for other numbers: leave them out, or choose one of",
        ),
    ],
)
def test_a_method_or_a_setting_that_there_is_not_is_refused(tmp_path, given, text):
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(write_set(tmp_path)), given)
    assert text in str(raised.value)


def test_settings_of_a_recipe_reach_the_method(tmp_path):
    recipe = load_recipe(
        str(write_set(tmp_path)), ["unlearn.method=l1_sparse", "unlearn.settings={epochs = 1.0}", *SETTINGS]
    )
    result = run(recipe, tmp_path / "out", command="unlearn")
    images = prepare(recipe).table[:, [k for k in range(4) if k not in result["forget"]]].sum()
    assert result["cost"]["unlearn"]["client_samples"] == pytest.approx(int(images), rel=0.1)


def test_the_erase_step_stays_out_of_methods_that_have_none(tmp_path):
    experiment = prepare(load_recipe(str(write_set(tmp_path)), ["erase.complement=3"]))
    assert experiment.repair().training.objective is not None
    cells = Cells(SimpleNamespace(experiment=experiment), None, {}, None, chosen=[])
    asked = cells._request(METHODS["contrast"], experiment.federation(Journal()), 0)
    assert asked.repair.training.objective is None


def test_a_comparison_tells_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setitem(COMPARED, "scaled", replace(SCALED, settings=Scaled(1.0)))  # the original without its row
    said = ["train.rounds=2", "evidence.feature_maps=false", "unlearn.seed=7", "compute.precision=bfloat16"]
    recipe, lines = load_recipe(str(write_set(tmp_path, oracles=3)), said), []
    value = compare(recipe, tmp_path / "out", Plan(("scaled",), seeds=1, tune=9), tell=lines.append)
    assert list(value["cells"])[:1] == ["scaled-seed7"]
    assert value["recipe"]["compute"] == "bfloat16"
    assert value["validation_unseen"] is True
    fixed = json.loads((tmp_path / "out" / "thresholds.json").read_text())["bands"]
    assert value["bands"] == {name: [band["low"], band["high"]] for name, band in fixed.items()}
    assert all(oracle["forget_row_kept"] == oracle["figures"]["forget"] for oracle in value["retrained"].values())
    last = {}  # R of each retrained model after its last round
    for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()[1:]:
        step = json.loads(line)
        if step["phase"].endswith(".retrain"):
            last[step["phase"]] = step["validation"]
    wanted = sum(last.values()) / 3
    trials = [trial for trial in value["methods"]["scaled"]["trials"] if "failed" not in trial]
    assert all(trial["score"] == pytest.approx(trial["u"] + max(0.0, wanted - trial["r"])) for trial in trials)
    (cell, *_) = value["cells"].values()
    beyond = []
    for name, figure in cell["figures"].items():
        kind, band = verdict.KINDS[name], fixed[name]
        below, above = figure < band["low"], figure > band["high"]
        if (below and kind != "apart") or (above and kind != "near"):
            beyond.append(name)
    assert cell["verdict"] == "not forgotten"
    assert cell["outside"] == beyond != ["forget"]
    done = [line for line in lines if " of " in line]
    assert f"({len(done)} of {len(done)}" in done[-1]
