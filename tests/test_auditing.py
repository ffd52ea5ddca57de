"""Auditing a model on disk: one of ours, one of another tool, by the server or by one client."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import classifier, make_images
from fedunlearn.checkpoint import read_weights, save_checkpoint
from fedunlearn.errors import DataError, EvidenceError, ModelError, RunError
from fedunlearn.models import build_model
from fedunlearn.run import audit_file
from fedunlearn.run.audit_file import Candidate, _of_client, audit_model
from fedunlearn.run.experiment import prepare
from fedunlearn.run.recipe import load_recipe
from test_cli import fedunlearn


@pytest.fixture
def recipe(signed):
    return load_recipe(str(signed / "tiny.toml"))


@pytest.fixture
def oracles(signed):
    return sorted((signed / "run" / "oracles").iterdir())


def test_the_audit_of_a_shipped_model_finds_what_the_run_found(signed, recipe, oracles, tmp_path):
    found = audit_model(
        recipe, tmp_path / "out", Candidate(model=signed / "run" / "model.safetensors", oracles=oracles)
    )
    ran = json.loads((signed / "run" / "result.json").read_text())
    for name in ("retain", "probe", "prototype_5", "relearn", "membership", "neighbours", "cka"):
        assert found["audits"][name] == ran["audits"][name]
    missing = {"forget", "reestimated", "int8", "int4", "artefacts"}  # they need the row, or the original
    assert not missing & set(found["audits"])
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
    again = audit_model(
        recipe, tmp_path / "out", Candidate(model=signed / "run" / "model.safetensors", oracles=oracles)
    )
    assert again == found


def test_weights_of_another_tool_are_audited_with_their_row_or_without(signed, recipe, oracles, tmp_path):
    state = dict(read_weights(signed / "run" / "original.safetensors").state)
    torch.save(state, tmp_path / "whole.pt")
    found = audit_model(recipe, tmp_path / "a", Candidate(model=tmp_path / "whole.pt", oracles=oracles[:3]))
    assert found["audits"]["forget"]["figure"] > 0.5
    assert found["verdict"] == "not forgotten"
    for name in ("linear.weight", "linear.bias"):
        state[name] = state[name][[0, 1, 3]]
    torch.save({"state_dict": state}, tmp_path / "rowless.pt")
    found = audit_model(recipe, tmp_path / "b", Candidate(model=tmp_path / "rowless.pt", oracles=oracles[:1]))
    assert not {"forget", "int8"} & set(found["audits"])
    assert "It has no output row for the class" in (tmp_path / "b" / "report.md").read_text()


def test_a_model_with_rows_for_some_of_the_classes_to_forget_is_refused_before_any_is_retrained(signed, tmp_path):
    model = classifier(build_model("nets:tiny", classes=4, colours=1)).without_rows([2])
    names = {"name": "nets:tiny", "shortcut": "A"}
    images = replace(make_images(8, 4), classes=("0", "1", "2", "3"))
    save_checkpoint(tmp_path / "some.safetensors", model, images=images, architecture=names)
    asked = load_recipe(str(signed / "tiny.toml"), ["unlearn.forget=[2, 3]"])
    with pytest.raises(ModelError, match=r"some.safetensors: its output rows are of the classes \[0, 1, 3\], \[3\] of"):
        audit_model(asked, tmp_path / "out", Candidate(model=tmp_path / "some.safetensors"))
    assert not (tmp_path / "out").exists()


def test_the_model_before_is_two_controls_that_must_fail(signed, recipe, oracles, tmp_path):
    before, model = signed / "run" / "original.safetensors", signed / "run" / "model.safetensors"
    found = audit_model(recipe, tmp_path / "a", Candidate(model=model, oracles=oracles[:3], original=before))
    ran = json.loads((signed / "run" / "result.json").read_text())
    assert list(found["controls"]) == ["original", "head_only"]
    for name, control in found["controls"].items():
        assert control["accuracy"] == ran["controls"][name]["accuracy"]
    assert found["model"]["accuracy"]["retain"] == ran["unlearned"]["accuracy"]["retain"]
    assert found["oracles"]["retrained-1"]["accuracy"] == ran["oracles"]["retrained-1"]["accuracy"]
    page = (tmp_path / "a" / "report.html").read_text()
    assert '<th scope="row" role="rowheader">head only</th>' in page
    with pytest.raises(
        EvidenceError, match=r"model\.safetensors has no output row for the classes to forget, so it is"
    ):
        audit_model(recipe, tmp_path / "b", Candidate(model=model, oracles=oracles, original=model))


def test_retrained_models_are_made_where_none_are_given(signed, tmp_path):
    asked = ("audit.oracles=2", "train.rounds=1")
    recipe, model = load_recipe(str(signed / "tiny.toml"), asked), signed / "run" / "model.safetensors"
    given = [part for setting in asked for part in ("--set", setting)]
    done = fedunlearn("audit", model, "--recipe", signed / "tiny.toml", "--out", tmp_path / "out", *given)
    assert "training takes less than a minute from the start on this machine" in " ".join(done.stderr.split())
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(found["oracles"]) == ["retrained-1", "retrained-2"]
    assert [path.stem for path in sorted((tmp_path / "out" / "oracles").iterdir())] == list(found["oracles"])
    assert found["verdict"] == "no verdict"
    assert all(audit["band"] is None for audit in found["audits"].values())
    (tmp_path / "out" / "report.html").unlink()
    assert audit_model(recipe, tmp_path / "out", Candidate(model=model)) == found
    assert (tmp_path / "out" / "report.html").exists()


def test_a_client_audits_with_its_own_images_alone(signed, recipe, oracles, tmp_path):
    model = signed / "run" / "model.safetensors"
    found = audit_model(recipe, tmp_path / "out", Candidate(model=model, oracles=oracles[:1], client="client-1"))
    assert found["client"] == "client-1"
    counts = json.loads((tmp_path / "out" / "audits" / "unlearned.json").read_text())["details"]["confusion"]
    assert sum(map(sum, counts)) == 8  # its validation images
    for page in ("report.html", "report.md"):
        said = (tmp_path / "out" / page).read_text("utf-8")
        assert "Audited by client-1 alone: with its own training images, and its validation images" in said
        assert "on test images, " not in said and "others; test images" not in said


def test_what_a_client_cannot_do_is_said(signed, recipe, oracles, tmp_path):
    model, out = signed / "run" / "model.safetensors", tmp_path / "out"
    with pytest.raises(EvidenceError, match="client-1 alone cannot retrain: give retrained models with --oracle"):
        audit_model(recipe, out, Candidate(model=model, client="client-1"))
    with pytest.raises(EvidenceError, match="there is no client 'client-9'; the clients are client-0, client-1"):
        audit_model(recipe, out, Candidate(model=model, oracles=oracles, client="client-9"))
    without = load_recipe(str(signed / "tiny.toml"), ["data.validation=0"])
    with pytest.raises(EvidenceError, match="client-1 holds no validation images to test with"):
        audit_model(without, out, Candidate(model=model, oracles=oracles, client="client-1"))
    skewed = ['federation.partition="bias"', "federation.bias=1.0", "federation.clients=4"]
    with pytest.raises(DataError, match=r"the training images hold none of class 2 \(2\)"):
        audit_model(
            load_recipe(str(signed / "tiny.toml"), skewed),
            out,
            Candidate(model=model, oracles=oracles, client="client-1"),
        )


def test_retrained_models_that_are_not_several_or_not_comparable_are_refused(signed, recipe, oracles, tmp_path):
    def audited(*paths):
        audit_model(recipe, tmp_path / "out", Candidate(model=signed / "run" / "model.safetensors", oracles=paths))

    with safe_open(oracles[0], "pt") as file:
        save_file(load_file(oracles[0]), tmp_path / "copy.safetensors", file.metadata() | {"saved": "again"})
    assert (tmp_path / "copy.safetensors").read_bytes() != oracles[0].read_bytes()
    with pytest.raises(EvidenceError, match=r"copy\.safetensors and .*retrained-1\.safetensors are the same model"):
        audited(*oracles, tmp_path / "copy.safetensors")
    state = dict(read_weights(oracles[0]).state)
    for name in ("retrained-2", "head_only"):
        save_file({key: tensor + 1e-3 for key, tensor in state.items()}, tmp_path / f"{name}.safetensors")
        with pytest.raises(EvidenceError, match=f"the name '{name}' is taken by another model"):
            audited(*oracles, tmp_path / f"{name}.safetensors")
    meta = np.frombuffer(b'{"normalise": {"mean": [0.5], "std": [0.5]}}', dtype=np.uint8)
    np.savez(tmp_path / "other.npz", meta=meta, **{key: tensor.numpy() for key, tensor in state.items()})
    with pytest.raises(EvidenceError, match=r"was trained on images normalised by \(0\.5,\) and \(0\.5,\)"):
        audited(tmp_path / "other.npz")


def test_a_model_that_knows_the_class_is_no_retrained_one(signed, recipe, oracles, tmp_path):
    before, model = signed / "run" / "original.safetensors", signed / "run" / "model.safetensors"
    other = dict(read_weights(before).state)
    other["linear.bias"] = other["linear.bias"] + 1e-3
    save_file(other, tmp_path / "knows.safetensors")
    with pytest.raises(EvidenceError, match=r"knows names a class to forget in 100\.0 % of its test images, so it was"):
        audit_model(recipe, tmp_path / "a", Candidate(model=model, oracles=[*oracles, tmp_path / "knows.safetensors"]))
    shutil.copy(before, tmp_path / "copy.safetensors")
    given = Candidate(model=model, oracles=[*oracles, tmp_path / "copy.safetensors"], original=before)
    with pytest.raises(EvidenceError, match=r"copy\.safetensors and .*original\.safetensors are the same model"):
        audit_model(recipe, tmp_path / "b", given)


def test_a_retrained_model_of_other_classes_is_refused(signed, oracles, tmp_path):
    other = load_recipe(str(signed / "tiny.toml"), ["unlearn.forget=[3]"])  # and 2 was forgotten before, by the model
    model = signed / "run" / "model.safetensors"
    with pytest.raises(ModelError, match="has an output row for the class '2', which the data does not have"):
        audit_model(other, tmp_path / "out", Candidate(model=model, oracles=oracles))
    with safe_open(oracles[0], "pt") as file:
        about, state = json.loads(file.metadata()["fedunlearn"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del about["classes"]
    save_file(state, tmp_path / "nameless.safetensors", {"fedunlearn": json.dumps(about)})
    with pytest.raises(
        ModelError, match=r"has output rows for the classes \[0, 1, 2, 3\], without \[2\] it needs \[0, 1\]: check unl"
    ):
        audit_model(other, tmp_path / "out", Candidate(model=model, oracles=[tmp_path / "nameless.safetensors"]))


def test_a_finished_audit_is_not_given_for_another_question(signed, recipe, oracles, tmp_path):
    model, before = signed / "run" / "model.safetensors", signed / "run" / "original.safetensors"
    first = Candidate(model=model, oracles=oracles[:1])
    audit_model(recipe, tmp_path / "out", first)
    for other in ({"client": "client-1"}, {"oracles": oracles[1:2]}, {"original": before}):
        with pytest.raises(RunError, match="holds another run"):  # not the result of another question
            audit_model(recipe, tmp_path / "out", replace(first, **other))


def test_the_audited_model_is_no_retrained_model_of_its_own(recipe, oracles, tmp_path):
    with pytest.raises(EvidenceError, match="are the same model"):
        audit_model(recipe, tmp_path / "out", Candidate(model=oracles[0], oracles=oracles))


def test_a_client_audits_by_its_own_images(signed, recipe, oracles, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        audit_file, "evaluate", lambda model, images, **how: given.append(len(images)) or {"accuracy": {}}
    )
    monkeypatch.setattr(audit_file, "_page", lambda out: None)
    model = signed / "run" / "model.safetensors"
    audit_model(recipe, tmp_path / "out", Candidate(model=model, oracles=oracles[:1], client="client-1"))
    assert given == [8, 8]  # its validation images


def test_a_copy_of_the_audited_model_is_no_retrained_model(signed, recipe, oracles, tmp_path):
    shutil.copy(oracles[0], tmp_path / "candidate.safetensors")
    with pytest.raises(
        EvidenceError, match=r"retrained-1\.safetensors and .*candidate\.safetensors are the same model"
    ):
        audit_model(recipe, tmp_path / "out", Candidate(model=tmp_path / "candidate.safetensors", oracles=oracles))


def test_models_of_other_deviations_are_not_compared(signed, recipe, oracles, tmp_path):
    weights = read_weights(signed / "run" / "model.safetensors")
    about = json.dumps({"normalise": {"mean": weights.mean, "std": [0.5]}})
    state = {key: tensor.numpy() for key, tensor in read_weights(oracles[0]).state.items()}
    np.savez(tmp_path / "other.npz", meta=np.frombuffer(about.encode(), dtype=np.uint8), **state)
    with pytest.raises(EvidenceError, match="models that see images differently cannot be compared"):
        audit_model(recipe, tmp_path / "out", Candidate(model=weights.path, oracles=[tmp_path / "other.npz"]))


def test_an_audit_of_a_client_has_the_settings_of_its_recipe(signed):
    asked = ["audit.images=10", "audit.lr=0.07", "federation.seed=3", "federation.clients=2"]
    images = _of_client(prepare(load_recipe(str(signed / "tiny.toml"), asked)), "client-1")
    assert int(images.known.counts().max()) == 10
    assert images.lr == 0.07
    assert images.seed == 3
