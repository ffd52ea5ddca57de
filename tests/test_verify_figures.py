"""The verifier: figures, bands, verdict and the rest of a result, each computed again."""

import hashlib
import json
import shutil
from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedunlearn.audits import verdict
from fedunlearn.audits.base import Figure, by_class, error_by_class, share
from fedunlearn.audits.membership import membership
from fedunlearn.evidence import verify
from fedunlearn.evidence.dossier import write_dossier
from fedunlearn.evidence.keys import read_private_key
from fedunlearn.evidence.report import write_report
from fedunlearn.evidence.verify import problems
from fedunlearn.run.audit_file import Candidate, audit_model
from fedunlearn.run.recipe import load_recipe
from forgery import again, forged, in_audit, in_audits, lost, told, unsigned

values = st.floats(0, 1)


def test_figures_left_out_are_found_though_signed_by_the_operator(copied, signed):
    folder, key = copied
    path = folder / "audits" / "unlearned.json"
    value, result = (json.loads(file.read_text()) for file in (path, folder / "result.json"))
    del value["figures"]["probe"], result["audits"]["probe"]
    path.write_text(json.dumps(value))
    again(folder, signed, audits=result["audits"])
    assert "audits/unlearned.json lacks probe, which the retrained models have" in problems(folder, key)


def test_a_figure_that_the_verifier_does_not_know_is_named_in_one_line(copied, signed):
    folder, key = copied
    result = json.loads((folder / "result.json").read_text())
    for name in ("unlearned", *result["oracles"], *result["controls"]):
        path = folder / "audits" / f"{name}.json"
        value = json.loads(path.read_text())
        value["figures"]["doubt"] = {"value": 0.5, "error": 0.0}
        path.write_text(json.dumps(value))
    again(folder, signed)
    _, found = problems(folder, key)  # the first: signed again, the events tell of another result.json
    assert found.startswith("this verifier does not know the figure doubt, so it computes no verdict: take the")


def test_retrained_models_left_out_are_found_though_signed_by_the_operator(copied, signed):
    folder, key = copied
    oracles = json.loads((folder / "result.json").read_text())["oracles"]
    oracles.pop("retrained-4")
    (folder / "audits" / "retrained-4.json").unlink()
    again(folder, signed, oracles=oracles)
    found = problems(folder, key)
    assert "events.jsonl tells of other retrained models than result.json" in found
    assert "thresholds.json does not follow from the figures of the retrained models" in found


def test_a_pass_counts_for_nothing_where_a_control_passes_too(copied, signed):
    folder, key = copied
    passing = (folder / "audits" / "retrained-1.json").read_text()
    for name in ("unlearned", "head_only"):
        (folder / "audits" / f"{name}.json").write_text(passing)
    again(folder, signed, verdict="indistinguishable from retraining")
    assert (
        "the verdict 'indistinguishable from retraining' does not follow from the figures: they give 'no verdict'"
        in problems(folder, key)
    )


def test_a_dossier_dated_before_its_events_is_found(copied, signed):
    folder, key = copied
    signer = read_private_key(signed / "operator", outside=folder)
    write_dossier(folder, signer, time="2020-01-01T00:00:00+00:00")
    found = problems(folder, key, now=datetime(2020, 1, 2, tzinfo=UTC))
    assert found == ["events.jsonl: the last event is later than the dossier"]


def test_a_verdict_that_does_not_follow_from_the_figures_is_found_though_signed_by_the_operator(copied, signed):
    folder, key = copied
    honest = json.loads((folder / "result.json").read_text())["verdict"]
    again(folder, signed, verdict="indistinguishable from retraining", decided_by=[])
    found = problems(folder, key)
    assert "events.jsonl tells of another result.json" in found
    assert (
        "the verdict 'indistinguishable from retraining' does not follow from the figures: they give " + repr(honest)
        in found
    )


def test_figures_costs_and_thresholds_that_do_not_follow_are_found_though_signed_by_the_operator(copied, signed):
    folder, key = copied
    result = json.loads((folder / "result.json").read_text())
    result["audits"]["probe"]["figure"] = 0.123
    result["cost"]["unlearn"]["client_samples"] = 1
    result["speedup"]["client_flops"] = 1000.0
    result["calibration"]["models"]["retrained-1"]["verdict"] = "not forgotten"
    result["controls"]["head_only"]["verdict"] = "not forgotten"
    result["cost"]["retrain"]["client_flops"] *= 2
    result["cost"]["retrain_whole"]["rounds"] -= 1
    result["retraining"]["retrained-1"]["curve"][0] = [1, 1.0]
    thresholds = json.loads((folder / "thresholds.json").read_text())
    thresholds["bands"]["probe"]["high"] = 2.0
    (folder / "thresholds.json").write_text(json.dumps(thresholds))
    again(folder, signed, **result)
    found = "\n".join(problems(folder, key))
    for text in (
        "the audit probe does not follow from audits/unlearned.json",
        "the cost of unlearning, client_samples, does not follow from rounds.jsonl",
        "the speed-up does not follow from the costs",
        "the held-out verdicts do not follow from the figures",
        "the verdict on head_only does not follow from the figures",
        "the cost of retraining, retrain, does not follow from retraining.json",
        "the cost of retraining, retrain_whole, does not follow from retraining.json",
        "the curve of retraining of retrained-1 does not follow from retraining.json",
        "thresholds.json does not follow from the figures of the retrained models",
        "events.jsonl tells of another thresholds.json",
    ):
        assert text in found


def test_a_signed_audit_names_the_model_and_its_figures_are_computed_again(signed, tmp_path, capsys):
    folder, key, model = tmp_path / "run", signed / "operator.pub", signed / "run" / "model.safetensors"
    recipe = load_recipe(str(signed / "tiny.toml"))
    oracles = sorted((signed / "run" / "oracles").iterdir())
    before = signed / "run" / "original.safetensors"
    result = audit_model(
        recipe, folder, Candidate(model=model, oracles=oracles, original=before), key=signed / "operator"
    )
    assert verify.main([str(folder), "--key", str(key)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(" events and figures")
    assert said[1].startswith(f"verdict: {result['verdict']} (request not named, ")
    dossier = json.loads((folder / "dossier.json").read_text())
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert dossier["models"] == {"audited": {"file": "model.safetensors", "sha256": digest}}
    page = (folder / "report.html").read_text()
    assert digest in page and dossier["key"] in page
    for change, text in (
        ({"model": result["model"] | {"sha256": "0"}}, "names another audited model than rounds.jsonl"),
        (
            {"model": result["model"], "oracles": {"retrained-1": {}, "retrained-2": {}}},
            "names other retrained models than rounds.jsonl",
        ),
        (
            {"oracles": result["oracles"], "controls": {}},
            "and rounds.jsonl differ in whether the model before was audited",
        ),
    ):
        again(folder, signed, **change)
        assert problems(folder, key)[-1] == f"result.json {text}"
    again(folder, signed, **(result | {"verdict": "not forgotten"}))
    assert problems(folder, key)[:2] == [
        "events.jsonl tells of another result.json",
        "events.jsonl tells of other data or another verdict",
    ]
    forged(folder, signed, told(result["verdict"], "verdict"))
    assert problems(folder, key) == []
    forged(folder, signed, told({"unlearn": {}}, "cost"))
    assert problems(folder, key) == ["result.json has not the blocks that audit writes: cost is too much"]


def test_what_an_audit_leaves_out_is_found_as_in_a_run(signed, tmp_path):
    folder, key, before = tmp_path / "run", signed / "operator.pub", signed / "run" / "original.safetensors"
    recipe = load_recipe(str(signed / "tiny.toml"), [f'audit.models="{signed / "run"}"'])  # for those of the recipe
    audit_model(recipe, folder, Candidate(model=before, original=before), key=signed / "operator")
    assert problems(folder, key) == []
    shutil.copytree(folder, tmp_path / "whole")

    def found(change=lambda result: None, figures=(), models=None):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "whole", folder)
        for path in (folder / "audits").glob("*.json"):
            if models in (None, path.stem):
                in_audit(folder, path.stem, lambda value: [value["figures"].pop(figure, None) for figure in figures])
        forged(folder, signed, change)
        return problems(folder, key)

    lost_ones = found(figures=("prototype_1", "cka"))
    for model in ("retrained-4", "unlearned"):
        assert f"audits/{model}.json lacks cka, prototype_1, which every run measures" in lost_ones
    rows = ("forget", "reestimated", "int8", "int4")
    assert any(
        "retrained-2.json lacks forget, int4, int8" in line for line in found(figures=rows, models="retrained-2")
    )
    assert "result.json and audits/unlearned.json differ in whether the model has its rows" in found(
        figures=rows, models="unlearned"
    )
    assert "audits/unlearned.json: classes are named whose output rows are gone" in found(
        told(None, "model", "accuracy", "forget_row_kept"), figures=rows, models="unlearned"
    )
    assert found(told("client-0", "client")) == ["result.json names another client than rounds.jsonl"]
    (tmp_path / "whole" / "audits" / "retrained-4.json").unlink()
    assert "result.json has not the retrained models that its recipe asks for" in found(lost("oracles", "retrained-4"))


def test_an_audit_of_before_there_were_controls_is_reported_and_its_pass_is_not_relied_on(signed, tmp_path):
    folder, key, model = (
        tmp_path / "run",
        signed / "operator.pub",
        signed / "run" / "oracles" / "retrained-4.safetensors",
    )
    oracles = sorted((signed / "run" / "oracles").iterdir())[:3]
    recipe = load_recipe(str(signed / "tiny.toml"))
    result = audit_model(recipe, folder, Candidate(model=model, oracles=oracles), key=signed / "operator")
    assert (result["verdict"], result["reason"]) == (verdict.NO_VERDICT, verdict.NO_CONTROL)

    def as_before(result):
        result["model"] = {name: result["model"][name] for name in ("file", "sha256")}
        result |= {"oracles": {name: {} for name in result["oracles"]}, "verdict": verdict.INDISTINGUISHABLE}
        result["decided_by"] = [name for name, own in result["audits"].items() if own["verdict"] is not None]
        result["reason"] = f"all {len(result['decided_by'])} figures lie where one more retrained model is expected"

    forged(folder, signed, as_before)
    unsigned(folder)
    write_report(folder)
    forged(folder, signed, lambda result: None)
    (found,) = problems(folder, key)
    assert found.startswith("this audit passes without a model that must fail, by an older rule: take the verifier")
    for name in ("dossier.json", "dossier.sig"):
        (folder / name).unlink()
    write_report(folder)
    assert "indistinguishable from retraining" in (folder / "report.html").read_text()


def test_blocks_that_the_command_does_not_write_turn_no_check_off(copied, signed):
    folder, key = copied
    whole = json.loads((folder / "result.json").read_text())
    for change, drop in (({"model": {"file": "m", "sha256": "0"}}, ()), ({}, ("unlearned",)), ({}, ("verdict",))):
        (folder / "result.json").write_text(json.dumps({k: v for k, v in whole.items() if k not in drop}))
        again(folder, signed, **change)
        (found,) = problems(folder, key)
        assert found.startswith("result.json has not the blocks that run writes: ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lost("controls", "head_only"), "audits has not a file for each model of result.json: head_only"),
        (
            lost("cost", "retrain_whole"),
            "result.json has costs that run does not count, or a speed-up without its cost",
        ),
        (lost("speedup"), "result.json has costs that run does not count, or a speed-up without its cost"),
        (told({}, "cost", "audit"), "result.json has costs that run does not count, or a speed-up without its cost"),
        (told(99.0, "speedup", "client_samples"), "the speed-up does not follow from the costs"),
        (told(99.0, "speedup_whole", "bytes"), "the speed-up does not follow from the costs"),
        (
            told(99.0, "retraining", "retrained-3", "speedup"),
            "the speed-up beside retrained-3 does not follow from the",
        ),
        (
            told(10**12, "retraining", "retrained-2", "client_flops"),
            "the cost of retraining of retrained-2 does not follow from retraining.json",
        ),
        (
            told(2.0, "unlearned", "validation", "retain"),
            "whether retrained-4 was ever as good does not follow from retraining.json",
        ),
        (
            told(False, "cost", "retrain", "reached"),
            "whether the first retrained model was ever as good does not follow from retraining.json",
        ),
        (
            lost("retraining"),
            "result.json has costs that run does not count, or a speed-up without its cost",
        ),
        (
            lost("retraining", "retrained-4"),
            "the retrained models of the costs, of retraining.json and of result.json are not the same",
        ),
        (
            told(0.31, "unlearned", "accuracy", "retain"),
            "the accuracy of unlearned is not that of audits/unlearned.json",
        ),
        (
            told(0.31, "controls", "finetune", "accuracy", "forget_row_kept"),
            "the accuracy of finetune is not that of audits/finetune.json",
        ),
        (told(9.5, "audits", "probe", "distance"), "result.json: the distance of probe does not follow from its band"),
        (told("erased", "controls", "original", "verdict"), "the verdict on original does not follow from the figures"),
        (told([], "controls", "original", "decided_by"), "the reason of the verdict on original does not follow from"),
        (
            told(verdict.UNLIKE, "controls", "original", "reason"),
            "the reason of the verdict on original does not follow",
        ),
        (told(1, "cost", "unlearn", "rounds"), "the cost of unlearning, rounds, does not follow from rounds.jsonl"),
        (told(99, "cost", "unlearn", "clients"), "the cost of unlearning, clients, does not follow from rounds.jsonl"),
        (told(500, "recipe", "train", "rounds"), "result.json and rounds.jsonl differ in the recipe"),
        (told(9, "recipe", "audit", "oracles"), "result.json has not the retrained models that its recipe asks for"),
        (told(9, "recipe", "evidence", "valid_days"), "result.json and rounds.jsonl differ in the recipe"),
        (told(True, "oracles", "retrained-2", "cached"), "whether retrained-2 was trained here or came from the cache"),
        (told(0.31, "original", "accuracy", "retain"), "result.json tells two accuracies of the original"),
        (
            told(0.02, "unlearned", "accuracy", "per_class", "1"),
            "the accuracy of unlearned on 1 is not that of its confusion",
        ),
    ],
)
def test_what_an_operator_writes_into_a_result_is_held_against_the_rest(copied, signed, change, text):
    folder, key = copied
    forged(folder, signed, change)
    assert any(text in line for line in problems(folder, key)), problems(folder, key)


@pytest.mark.parametrize("figure", ["prototype_1", "cka", "membership", "int4", "artefacts"])
def test_a_figure_is_not_lost_from_all_models(copied, signed, figure):
    folder, key = copied
    in_audits(folder, lambda value: value["figures"].pop(figure, None))

    def without(result):
        result["audits"].pop(figure)

    forged(folder, signed, without)
    assert any(f"lacks {figure}, which every run measures" in line for line in problems(folder, key))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda value: value["details"].update(confusion=[[3]]), "the confusion is not one of"),
        (lambda value: value["details"]["confusion"][1].__setitem__(3, 7), "R does not follow from the confusion"),
        (lambda value: value["details"]["relearn"]["forget"].append(1.0), "relearning does not follow from its curve"),
        (
            lambda value: value["details"]["membership"]["forget"].update(auc=0.5),
            "membership does not follow from its details",
        ),
        *(
            (lambda value, name=name: value["figures"].get(name, {}).update(value=0.01), f"{name} does not follow from")
            for name in ("neighbours", "cka", "procrustes", "prototype_1", "prototype_10")
        ),
        (
            lambda value: value["details"]["prototype_draws"].update({"5": [0.9, 0.5, 1.0]}),
            "prototype_5 does not follow from its draws",
        ),
    ],
)
def test_what_stands_beside_the_figures_of_a_model_is_held_against_them(copied, signed, change, text):
    folder, key = copied
    in_audits(folder, change)
    forged(folder, signed, lambda result: None)
    assert any(text in line for line in problems(folder, key)), problems(folder, key)


@pytest.mark.parametrize(
    ("model", "figure", "error"),
    [
        *(("retrained-1", figure, 0.3) for figure in verdict.KINDS if figure != "artefacts"),
        ("unlearned", "artefacts", 0.3),
        ("head_only", "probe", -0.1),
        ("retrained-2", "cka", float("nan")),
    ],
)
def test_no_band_is_widened_by_the_standard_error_of_a_figure(copied, signed, model, figure, error):
    folder, key = copied
    in_audit(folder, model, lambda value: value["figures"][figure].update(error=error))
    forged(folder, signed, lambda result: None)
    text = f"audits/{model}.json: the standard error of {figure} does not follow from its images"
    assert text in problems(folder, key)


@pytest.mark.parametrize("change", [{"members": 1}, {"others": 1}, {"others": 16}, {"auc": 0.5}])
def test_membership_is_a_share_of_the_pairs_that_there_are(copied, signed, change):
    folder, key = copied
    in_audit(folder, "retrained-1", lambda value: value["details"]["membership"]["forget"].update(change))
    forged(folder, signed, lambda result: None)
    assert "audits/retrained-1.json: membership does not follow from its details" in problems(folder, key)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=4), st.floats(0, 1))
def test_the_verifier_knows_the_standard_errors_of_the_tool(rows, mean):
    truth = torch.tensor([label for label, row in enumerate(rows) for _ in row])
    right = torch.tensor([found for row in rows for found in row])
    counts = [[sum(row) if label == k else 0 for k in range(len(rows))] for label, row in enumerate(rows)]
    for label, row in enumerate(rows):  # those that are wrong go to a class that stays
        counts[label].append(len(row) - sum(row))
    counts.append([0] * len(rows) + [9])
    details, forget = {"confusion": counts}, range(len(rows))
    for name, figure in (
        ("int8", by_class(right, truth)),
        ("probe", by_class(right, truth)),
        ("relearn", Figure(mean, error_by_class(mean, truth))),
        ("prototype_5", Figure(mean, error_by_class(mean, truth))),
        ("retain", share(9, 9)),
        ("cka", Figure(mean)),
    ):
        least, most = verify._errors(name, figure.value, details, forget)
        assert least - 1e-12 <= figure.error <= most + 1e-12
        assert least == most or (name in ("int8", "probe") and len(rows) > 1)


@given(*[st.lists(st.integers(0, 5).map(float), min_size=1, max_size=20)] * 2)
def test_the_verifier_knows_the_standard_error_of_an_auc(members, others):
    told = membership(torch.tensor(members), torch.tensor(others))
    assert verify._error_of_auc(told.auc, len(members), len(others)) == pytest.approx(told.auc_error)
    details = {"membership": {"duplicates_left_out": 0, "forget": told.to_dict()}, "confusion": [[len(others)]]}
    assert verify._counted(told.auc, details, [0])


@pytest.mark.parametrize(
    ("model", "change", "text"),
    [
        ("original", lambda value: value["details"]["confusion"].__setitem__(2, [15, 0, 0, 0]), ": U does not follow"),
        (
            "retrained-1",
            lambda value: value["details"]["confusion"].__setitem__(2, [0, 0, 15, 0]),
            ": classes are named whose output rows are gone",
        ),
        ("unlearned", lambda value: value.update(images="0" * 64), "the audits of the models tell of other images, or"),
        (
            "unlearned",
            lambda value: value["details"]["membership"]["retain"].update(members=3),
            "the audits of the models tell of other images for membership",
        ),
        ("pruned", lambda value: value["references"].pop(), "audits/pruned.json was made beside other retrained"),
        ("retrained-2", lambda value: value["references"].reverse(), "audits/retrained-2.json was made beside other"),
        (
            "random",
            lambda value: value["details"]["neighbours"]["retrained"][0].reverse(),
            "audits/random.json: neighbours tells of other outputs than those of the retrained models",
        ),
    ],
)
def test_the_audit_of_a_model_is_held_against_those_of_the_others(copied, signed, model, change, text):
    folder, key = copied
    in_audit(folder, model, change)
    forged(folder, signed, lambda result: None)
    assert any(text in line for line in problems(folder, key)), problems(folder, key)


@pytest.mark.parametrize(
    ("change", "impossible"),
    [
        ({"duplicates_left_out": 15}, False),  # and was told
        ({"forget": None, "duplicates_left_out": 1}, False),
        ({"forget": None, "duplicates_left_out": 15}, True),  # each test image of the class is a training image
        ({"forget": None, "retain": None, "duplicates_left_out": 1}, True),  # each training image is that test image
        ({"forget": None, "retain": None}, False),
    ],
)
def test_membership_is_left_out_only_where_no_image_is_left_to_tell_it_by(copied, signed, change, impossible):
    folder, key = copied

    def untold(value):
        value["figures"].pop("membership", None)
        details = value["details"]["membership"] | change
        value["details"]["membership"] = {name: own for name, own in details.items() if own is not None}

    in_audits(folder, untold)
    forged(folder, signed, lost("audits", "membership"))
    missing = [line for line in problems(folder, key) if "lacks membership, which every run measures" in line]
    assert len(missing) == (0 if impossible else 5)  # the retrained models and the unlearned one


def test_one_model_does_not_stand_for_two_retrained_ones(copied, signed):
    folder, key = copied
    shutil.copy(folder / "audits" / "retrained-1.json", folder / "audits" / "retrained-3.json")
    forged(folder, signed, lambda result: None)
    assert "audits/retrained-3.json is of the same model as another" in problems(folder, key)


@given(st.lists(values, min_size=50, max_size=50))
def test_the_verifier_knows_which_means_draws_with_these_quantiles_can_have(draws):
    shares = torch.tensor(draws, dtype=torch.float64)
    quantiles = [float(shares.quantile(q)) for q in (0.05, 0.5, 0.95)]
    assert verify._can_be_mean(float(shares.mean()), *quantiles)
    assert not verify._can_be_mean(max(0.0, quantiles[0] - 0.5) - 0.1, *quantiles)


def test_all_models_are_audited_on_the_same_images(copied, signed):
    folder, key = copied
    path = folder / "audits" / "finetune.json"
    value = json.loads(path.read_text())
    forgotten = json.loads((folder / "result.json").read_text())["forget"][0]
    value["details"]["confusion"][forgotten][0] += 7
    path.write_text(json.dumps(value))
    forged(folder, signed, lambda result: None)
    assert "the audits of the models were not made on the same test images" in problems(folder, key)


def test_a_dossier_expires_when_its_recipe_says(copied, signed):
    folder, key = copied
    value = json.loads((folder / "dossier.json").read_text())
    value["expires"] = (datetime.fromisoformat(value["expires"]) + timedelta(days=1)).isoformat()
    data = json.dumps(value).encode()
    (folder / "dossier.json").write_bytes(data)
    (folder / "dossier.sig").write_bytes(read_private_key(signed / "operator", outside=folder).sign(data))
    assert problems(folder, key) == ["dossier.json does not expire when the recipe says"]


def test_the_key_that_the_report_shows_is_the_one_that_signs(copied, signed, monkeypatch):
    folder, key = copied
    events = folder / "events.jsonl"
    events.write_text(events.read_text().replace(json.loads((folder / "dossier.json").read_text())["key"], "0" * 64))
    monkeypatch.setattr("fedunlearn.evidence.dossier._check_named", lambda folder, key: None)
    forged(folder, signed, lambda result: None)
    assert problems(folder, key) == ["events.jsonl names another key than the one that signed, which the report shows"]


def test_a_control_is_not_lost_with_its_figures(copied, signed):
    folder, key = copied
    (folder / "audits" / "head_only.json").unlink()
    forged(folder, signed, lost("controls", "head_only"))
    assert "result.json lacks one of the controls that must fail: head_only, original" in problems(folder, key)


models = st.fixed_dictionaries(
    {"forget": values, "retain": values},
    optional={name: values for name in verdict.KINDS if name not in ("forget", "retain")},
)


@given(st.lists(models, max_size=6), models, st.floats(0, 0.1))
def test_the_verifier_judges_as_the_tool_does(oracles, candidate, error):
    own = [{name: Figure(value, error) for name, value in figures.items()} for figures in oracles]
    bands = verdict.calibrate(own)
    plain = [{name: (value, error) for name, value in figures.items()} for figures in oracles]
    others = verify._bands(plain)
    assert bands.keys() == others.keys()
    for name, band in bands.items():
        assert others[name] == pytest.approx((band.mean, band.sd, band.low, band.high), rel=1e-4, abs=1e-4)
    figures = {name: Figure(value, error) for name, value in candidate.items()}
    tool = verdict.judge(figures, bands, oracles=len(oracles), chance=0.1)
    exact = {name: (band.mean, band.sd, band.low, band.high) for name, band in bands.items()}
    found = verify._judged({name: (f.value, f.error) for name, f in figures.items()}, exact, len(oracles), 0.1)
    assert found[:2] == (tool["verdict"], tool["decided_by"])
    assert verify._reason(*found) == (None if tool["verdict"] == verdict.NO_VERDICT else tool["reason"])
    assert found[2] == {name: audit["verdict"] for name, audit in tool["audits"].items()}


@given(st.lists(models, min_size=3, max_size=4), models, st.dictionaries(st.sampled_from(verdict.MUST_FAIL), models))
def test_the_verifier_asks_for_the_controls_that_the_tool_asks_for(oracles, candidate, controls):
    own, beside = (
        {name: {figure: Figure(value) for figure, value in figures.items()} for name, figures in group.items()}
        for group in (dict(enumerate(oracles)), controls)
    )
    bands = verdict.calibrate(list(own.values()))
    # Whatever the candidate's own verdict is: it is asked of a pass.
    judgement = {"verdict": verdict.INDISTINGUISHABLE, "audits": candidate, "decided_by": []}
    tool = verdict.controlled(judgement, beside, bands, oracles=len(oracles), chance=0.1)
    plain = {name: {figure: (value, 0.0) for figure, value in own.items()} for name, own in controls.items()}
    found = verify._controlled(
        verify._shown_by(plain, {name: (value, 0.0) for name, value in candidate.items()}),
        {name: (band.mean, band.sd, band.low, band.high) for name, band in bands.items()},
        len(oracles),
        0.1,
    )
    assert found == (tool["verdict"] == verdict.INDISTINGUISHABLE)


@pytest.mark.parametrize("df", [*range(1, 40), 100, 1000])
@pytest.mark.parametrize("figures", [1, 5, 14])
def test_the_verifier_knows_the_quantiles_of_student(df, figures):
    assert verify._t(df, 0.05 / figures) == pytest.approx(stats.t.ppf(1 - 0.025 / figures, df), rel=1e-9)


@pytest.mark.parametrize(
    ("value", "key_of_audit"), [(0.3, "error"), ([0.0, 1.0], "band"), ("above", "verdict"), (0.123, "figure")]
)
def test_each_part_of_an_audit_is_held_against_its_file(copied, signed, value, key_of_audit):
    folder, key = copied
    forged(folder, signed, told(value, "audits", "probe", key_of_audit))
    assert problems(folder, key) == ["result.json: the audit probe does not follow from audits/unlearned.json"]


def test_an_audit_is_not_left_out_of_a_result(copied, signed):
    folder, key = copied
    forged(folder, signed, lost("audits", "probe"))
    assert problems(folder, key) == ["result.json: the audit probe does not follow from audits/unlearned.json"]


def test_figures_said_to_decide_where_none_does_are_found(copied, signed):
    folder, key = copied
    forged(folder, signed, told(["probe"], "decided_by"))
    assert any("the verdict 'no verdict' does not follow from the figures" in line for line in problems(folder, key))


def test_a_standard_error_is_that_of_its_images_to_the_last_digits(copied, signed):
    folder, key = copied
    in_audit(
        folder,
        "retrained-1",
        lambda value: value["figures"]["probe"].update(error=value["figures"]["probe"]["error"] + 0.005),
    )
    forged(folder, signed, lambda result: None)
    assert "audits/retrained-1.json: the standard error of probe does not follow from its images" in problems(
        folder, key
    )


def test_no_image_of_any_class_is_named_as_one_whose_row_is_gone(copied, signed):
    folder, key = copied
    for name in ("pruned", "retrained-1"):
        in_audit(folder, name, lambda value: value["details"]["confusion"].__setitem__(0, [14, 0, 1, 0]))
    forged(folder, signed, lambda result: None)
    found = problems(folder, key)
    for name in ("pruned", "retrained-1"):
        assert f"audits/{name}.json: classes are named whose output rows are gone" in found


def test_the_confusion_has_a_column_for_each_class(copied, signed):
    folder, key = copied
    in_audits(folder, lambda value: [row.append(0) for row in value["details"]["confusion"]])
    forged(folder, signed, lambda result: None)
    assert "audits/unlearned.json: the confusion is not one of 4 classes" in problems(folder, key)


@pytest.mark.parametrize(
    ("change", "follows"),
    [({}, True), ({"others": 10}, False), ({"others": 14}, False), ({"others": 16}, False)],
)
def test_no_test_image_of_the_class_is_left_out_of_membership_untold(change, follows):
    forget = {"auc": 0.5, "members": 20, "others": 15} | change
    details = {
        "confusion": [[15, 0], [0, 45]],
        "membership": {"duplicates_left_out": 0, "forget": forget, "retain": {"others": 60 - forget["others"]}},
    }
    assert verify._counted(0.5, details, [0]) == follows


def test_an_auc_is_a_share_of_the_pairs():
    forget = {"auc": 0.5003, "members": 20, "others": 15}
    details = {
        "confusion": [[15, 0], [0, 45]],
        "membership": {"duplicates_left_out": 0, "forget": forget, "retain": {"others": 45}},
    }
    assert not verify._counted(0.5003, details, [0])


def test_a_retrained_model_is_not_audited_as_the_unlearned_one(copied, signed):
    folder, key = copied
    shutil.copy(folder / "audits" / "retrained-1.json", folder / "audits" / "unlearned.json")
    forged(folder, signed, lambda result: None)
    assert "audits/retrained-1.json is of the same model as another" in problems(folder, key)


def test_a_result_tells_of_no_figure_that_its_file_lacks(copied, signed):
    folder, key = copied
    in_audit(folder, "unlearned", lambda value: value["figures"].pop("artefacts"))
    forged(folder, signed, lambda result: None)
    assert "result.json: the audit artefacts does not follow from audits/unlearned.json" in problems(folder, key)
