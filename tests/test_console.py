"""What the terminal says of a run, and what a command hands on."""

from dataclasses import replace
from pathlib import Path

import torch
from typer.testing import CliRunner

from conftest import write_set
from fedunlearn import cli, engines
from fedunlearn.console import audit_table, describe, result_table
from fedunlearn.errors import RecipeError
from fedunlearn.run import audit_file
from fedunlearn.run.compare import Plan
from fedunlearn.run.experiment import prepare
from fedunlearn.run.recipe import load_recipe

BLOCK = {"accuracy": {"forget": 0.0, "forget_row_kept": 0.02, "retain": 0.9}, "parameters": 10}


def test_what_clients_hold_is_told_by_number(tmp_path):
    table = torch.tensor([[1, 0, 5, 5], [10, 1, 5, 4], [20, 10, 0, 0]])
    said = describe(replace(prepare(load_recipe(str(write_set(tmp_path)))), table=table))
    assert "11 to 30 images per client (median 20), 9 to 31 per class\neach class is held by 2 to 3 clients" in said


def test_a_figure_outside_its_band_is_told_though_the_audit_can_tell_little():
    audit = {"figure": 0.9, "band": [0.4, 0.6], "distance": 7.0}
    for verdict, said in (("above", "above"), ("inside", "cannot tell")):
        table = audit_table({"audits": {"probe": audit | {"verdict": verdict}}}, ["probe"])
        assert list(table.columns[-1].cells) == [said]


def test_what_a_control_cost_stands_beside_it():
    cost = {"client_samples": 1234, "client_flops": 5e9}
    table = result_table({"controls": {"finetune": BLOCK | {"cost": cost}}})
    cells = {column.header: list(column.cells) for column in table.columns}
    assert (cells["client\nsamples"], cells["client\nGFLOP"]) == (["1,234"], ["5.0"])


def test_what_an_audit_is_asked_for_reaches_it(monkeypatch, tmp_path):
    asked = []

    def told(recipe, folder, candidate, **how):
        asked.append((candidate, how["key"]))
        raise RecipeError("enough")

    monkeypatch.setattr(cli, "read_weights", lambda path: None)
    monkeypatch.setattr(audit_file, "audit_model", told)
    given = ["--oracle", "a.pt", "--original", "o.pt", "--client", "client-1", "--key", "k"]
    CliRunner().invoke(cli.app, ["audit", "m.pt", "--recipe", "digits", "--out", str(tmp_path), *given])
    candidate = audit_file.Candidate(
        model=Path("m.pt"), oracles=[Path("a.pt")], original=Path("o.pt"), client="client-1"
    )
    assert asked == [(candidate, Path("k"))]


def test_what_a_comparison_is_asked_for_reaches_it_and_a_failed_cell_fails_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(engines, "carry_out", lambda order: asked.append(order.compared) or {"failed": {"x": "why"}})
    for name in ("comparison_table", "comparison_notes"):
        monkeypatch.setattr(cli, name, lambda value: "")
    given = ["--methods", "ssd, scrub", "--seeds", "2", "--tune", "5", "--json", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, ["compare", "digits", *given])
    assert asked == [Plan(("ssd", "scrub"), 2, 5)]
    assert done.exit_code == 1
    assert "1 cells failed, the first: why" in done.stderr
