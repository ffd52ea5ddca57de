"""Keys, event log, dossier and verifier: what an auditor relies on."""

import ast
import hashlib
import html
import json
import random
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedunlearn.audits import verdict
from fedunlearn.audits.base import Figure, by_class, error_by_class, share
from fedunlearn.audits.membership import membership
from fedunlearn.errors import EvidenceError, RunError
from fedunlearn.evidence import verify
from fedunlearn.evidence.dossier import acknowledge, sign, write_dossier
from fedunlearn.evidence.events import EventLog
from fedunlearn.evidence.folder import RunFolder, readable
from fedunlearn.evidence.keys import make_keys, read_private_key
from fedunlearn.evidence.maps import FeatureMaps
from fedunlearn.evidence.report import write_card, write_report
from fedunlearn.evidence.speedup import to_equal_r
from fedunlearn.evidence.verify import problems
from fedunlearn.evidence.words import in_short, unable
from fedunlearn.methods.table import METHODS
from fedunlearn.run.audit_file import Candidate, audit_model
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.work import finished
from fedunlearn.smallest import FRACTIONS, MOST
from fedunlearn.tabular import amount
from test_cli import fedunlearn

FLIPS = 6  # in every file
values = st.floats(0, 1)


@pytest.fixture
def copied(signed, tmp_path):
    """Return a copy of the signed run to do damage to, and the public key."""
    shutil.copytree(signed / "run", tmp_path / "run")
    return tmp_path / "run", signed / "operator.pub"


def again(folder, signed, **change):
    """Sign the folder again with the operator's own key, ``result.json`` changed: a forger who holds the key."""
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | change))
    write_dossier(folder, read_private_key(signed / "operator", outside=folder))


def forged(folder, signed, change):
    """Let ``change`` alter the content of result.json, and make event log and dossier say the same: all but figures."""
    result = json.loads((folder / "result.json").read_text())
    change(result)
    (folder / "result.json").write_text(json.dumps(result))
    facts = {"result written": {"sha256": hashlib.sha256((folder / "result.json").read_bytes()).hexdigest()}}
    facts["audited"] = {"verdict": result.get("verdict")}
    previous, lines = "0" * 64, []
    for line in (folder / "events.jsonl").read_bytes().splitlines():
        event = json.loads(line)
        event |= {"previous": previous, "facts": event["facts"] | facts.get(event["event"], {})}
        lines.append(json.dumps(event).encode())
        previous = hashlib.sha256(lines[-1]).hexdigest()
    (folder / "events.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    again(folder, signed)


# keys


def test_a_private_key_is_for_its_owner_alone_and_is_never_overwritten(tmp_path):
    make_keys(tmp_path / "operator")
    assert stat.S_IMODE((tmp_path / "operator").stat().st_mode) == 0o600
    assert (tmp_path / "operator.pub").read_text().startswith("-----BEGIN PUBLIC KEY-----")
    before = (tmp_path / "operator").read_bytes()
    with pytest.raises(EvidenceError, match="is there already: a key is never overwritten"):
        make_keys(tmp_path / "operator")
    assert (tmp_path / "operator").read_bytes() == before
    (tmp_path / "operator").unlink()
    with pytest.raises(EvidenceError, match=r"operator\.pub is there already"):
        make_keys(tmp_path / "operator")
    assert not (tmp_path / "operator").exists()


def test_a_key_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(EvidenceError, match=r"no/operator: the key cannot be written \(No such file"):
        make_keys(tmp_path / "no" / "operator")


def test_a_key_in_the_folder_of_the_run_is_refused(tmp_path):
    make_keys(tmp_path / "operator")
    with pytest.raises(EvidenceError, match="the private key lies in the folder of the run"):
        read_private_key(tmp_path / "operator", outside=tmp_path)


def test_a_missing_key_or_one_of_another_kind_is_refused(tmp_path):
    with pytest.raises(EvidenceError, match=r"expected a private key in PEM, but .*fedunlearn keygen"):
        read_private_key(tmp_path / "none", outside=tmp_path / "run")
    other = generate_private_key(SECP256R1())
    (tmp_path / "ec").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(EvidenceError, match="expected an Ed25519 key"):
        read_private_key(tmp_path / "ec", outside=tmp_path / "run")
    public = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ec.pub").write_bytes(public)
    assert problems(tmp_path, tmp_path / "ec.pub") == [f"{tmp_path / 'ec.pub'}: expected an Ed25519 public key"]


# events


def test_events_are_chained_recorded_once_and_survive_a_cut(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, clock=lambda: "2026-01-01T00:00:00+00:00")
    log.once("a", x=1)
    log.once("b")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # a kill in the middle of a line
    log = EventLog(path, clock=lambda: "2026-01-01T00:00:00+00:00")
    log.once("a", x=2)
    log.once("b")
    assert path.read_bytes() == whole
    EventLog(path, clock=lambda: "2025-01-01T00:00:00+00:00").once("c")  # a clock that was set back
    assert json.loads(path.read_bytes().splitlines()[2])["time"] == "2026-01-01T00:00:00+00:00"
    first, second = (json.loads(line) for line in whole.splitlines())
    assert (first["facts"], second["seq"]) == ({"x": 1}, 1)


def test_a_changed_or_foreign_event_log_is_refused(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.once("a", x=1)
    log.once("b")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"x":1', b'"x":2'))
    with pytest.raises(RunError, match="line 2 does not follow from the one before"):
        EventLog(path)
    path.write_bytes(b"nothing\n")
    with pytest.raises(RunError, match="line 1 is no event"):
        EventLog(path)


# dossier


def test_a_signed_run_verifies_and_says_what_an_operator_must_show(copied):
    folder, key = copied
    assert problems(folder, key) == []
    dossier = json.loads((folder / "dossier.json").read_text())
    assert dossier["request"] == "case 7"
    assert dossier["scope"] == {"forgotten": ["2"], "labels_of_rows": [0, 1, 3]}
    assert dossier["clients"]["clients_per_class"] == [3, 3, 3, 3]
    assert dossier["models"]["after"]["sha256"] != dossier["models"]["before"]["sha256"]
    assert {step["phase"] for step in dossier["rounds"]} >= {"train", "measure-0", "repair", "retrained-1.retrain"}
    assert set(dossier) >= {
        "versions",
        "thresholds",
        "audits",
        "verdict",
        "limits",
        "purged",
        "expires",
    }
    assert dossier["acknowledged"] == []  # nobody said so yet
    assert not any("BEGIN PRIVATE" in path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file())


def test_the_verifier_in_the_folder_needs_the_standard_library_and_cryptography_alone(copied):
    folder, key = copied
    tree = ast.parse((folder / "verify.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names) | {"cryptography"}
    command = [sys.executable, "-I", str(folder / "verify.py"), str(folder), "--key", str(key)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "verified: signature" in done.stdout
    (folder / "plan.json").write_text("{}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "FAILED: plan.json was changed\n")


def test_every_flipped_byte_in_every_file_is_found(copied):
    folder, key = copied
    draw = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 20
    for path in files:
        whole = path.read_bytes()
        for _ in range(FLIPS):
            place = draw.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
            assert problems(folder, key), f"{path.name}, byte {place}"
        path.write_bytes(whole)
    assert problems(folder, key) == []


def test_a_wrong_key_is_named_by_its_fingerprint(copied, tmp_path):
    make_keys(tmp_path / "other")
    (problem,) = problems(copied[0], tmp_path / "other.pub")
    assert "or this is not the signer's key (" in problem


def test_keys_that_are_mixed_up_are_told_apart(copied, signed):
    folder, _ = copied
    private, public = signed / "operator", signed / "operator.pub"
    assert problems(folder, private) == [
        f"{private} is a private key: give the public one, operator.pub, and keep this secret"
    ]
    with pytest.raises(EvidenceError, match="is a public key: to sign, give the private one"):
        read_private_key(public, outside=folder)


def test_what_is_no_key_or_not_signed_is_said(copied, tmp_path):
    folder, key = copied
    (tmp_path / "text").write_text("no key")
    assert (
        "expected a public key in PEM: give the .pub file that keygen wrote" in problems(folder, tmp_path / "text")[0]
    )
    (tmp_path / "text").write_text("-----BEGIN PUBLIC KEY-----\nx\n-----END PUBLIC KEY-----\n")
    assert "expected a public key in PEM, but" in problems(folder, tmp_path / "text")[0]
    (folder / "dossier.sig").unlink()
    assert problems(folder, key) == [f"{folder}: there is no dossier.sig: the folder was not signed"]


def test_missing_and_added_files_are_found(copied):
    folder, key = copied
    (folder / "plan.json").unlink()
    (folder / "audits" / "more.json").write_text("{}")
    assert problems(folder, key) == [
        "audits/more.json is not in the dossier: it was put there after signing; if it is yours, move it out of the "
        "folder and verify again",
        "plan.json is missing",
    ]


@pytest.mark.parametrize("name", [".DS_Store", "audits/.DS_Store", "._model.safetensors", "Thumbs.db", "desktop.ini"])
def test_what_a_file_manager_leaves_fails_the_verification_and_is_told_as_such(copied, name):
    folder, key = copied
    (folder / name).write_bytes(b"icons")
    assert problems(folder, key) == [
        f"{name} is not in the dossier: macOS, Windows or a file manager writes such a file where a folder is looked "
        "at, delete it and verify again"
    ]
    write_dossier(folder, read_private_key(key.with_suffix(""), outside=folder))
    assert problems(folder, key) == []
    (folder / name).write_bytes(b"other icons")
    assert problems(folder, key) == [
        f"{name} was changed: macOS, Windows or a file manager writes such a file where a folder is looked at"
    ]


def test_nothing_written_after_signing_breaks_the_signature(copied):
    folder, key = copied
    write_report(folder)
    write_card(folder)
    assert problems(folder, key) == []  # the same bytes
    signer = read_private_key(key.with_suffix(""), outside=folder)
    for name, write in (("report.html", write_report), ("report.md", write_report), ("README.md", write_card)):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole + "as another version writes it")
        write_dossier(folder, signer)
        with pytest.raises(EvidenceError, match=f"is signed, and a new {name} would differ.*copy the folder without"):
            write(folder)
        assert problems(folder, key) == []
        (folder / name).write_text(whole)
    write_dossier(folder, signer)
    (folder / "dossier.json").unlink()
    (folder / "report.md").unlink()
    write_report(folder)
    assert (folder / "report.md").exists()


def test_a_signed_run_that_lost_its_result_is_not_done_again(copied):
    folder, _ = copied
    (folder / "result.json").unlink()
    with pytest.raises(EvidenceError, match=r"is signed, but result\.json is missing: choose another --out"):
        finished(SimpleNamespace(out=folder), lambda: pytest.fail("the work was done again"))
    assert not (folder / "result.json").exists()


def test_a_truncated_log_is_found(copied):
    folder, key = copied
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "events.jsonl").write_bytes(b"".join(lines[:-1]))
    assert problems(folder, key) == ["events.jsonl was changed"]


def test_an_expired_or_future_dossier_is_found(copied):
    folder, key = copied
    now = datetime.now(UTC)
    assert "expired at" in problems(folder, key, now=now + timedelta(days=366))[0]
    assert "which is in the future" in problems(folder, key, now=now - timedelta(days=1))[0]


def test_a_log_cut_before_signing_is_found(copied, signed):
    folder, key = copied
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "events.jsonl").write_bytes(b"".join(lines[:-2]))
    again(folder, signed)
    assert "expected, in this order" in problems(folder, key)[0]


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


def test_links_and_names_that_write_lines_are_found(copied, tmp_path):
    folder, key = copied
    (folder / "extra").symlink_to(tmp_path)
    (folder / "a\nverified: all").write_text("")
    linked, added = problems(folder, key)
    assert linked == "extra is a link or device, not a file"
    assert added.startswith("a\\nverified: all is not in the dossier: it was put there after signing")


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


def test_a_signed_unlearning_verifies_without_a_verdict(signed, tmp_path, capsys):
    folder, key = tmp_path / "run", signed / "operator.pub"
    recipe = load_recipe(str(signed / "tiny.toml"), ['evidence.request="case 8"'])
    run(recipe, folder, command="unlearn", key=signed / "operator")
    assert verify.main([str(folder), "--key", str(key)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("verified: signature, ") and said[0].endswith(" events and costs")
    assert said[1].startswith("not audited: no verdict (request case 8, ")
    with pytest.raises(RunError, match="this run was not audited"):
        write_report(folder)
    cost = json.loads((folder / "result.json").read_text())["cost"]
    cost["unlearn"]["client_samples"] += 1
    again(folder, signed, cost=cost)
    assert problems(folder, key) == [
        "events.jsonl tells of another result.json",
        "the cost of unlearning, client_samples, does not follow from rounds.jsonl",
    ]
    run(recipe, tmp_path / "trained", command="train", key=signed / "operator")
    assert not (tmp_path / "trained" / "dossier.json").exists()  # nothing was forgotten
    events = (tmp_path / "trained" / "events.jsonl").read_bytes()
    with pytest.raises(EvidenceError, match="nothing was forgotten or audited here, so no deletion can be confirmed"):
        acknowledge(tmp_path / "trained", ["client-0"], read_private_key(signed / "operator", outside=tmp_path))
    assert (tmp_path / "trained" / "events.jsonl").read_bytes() == events


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


def lost(*path):
    """Return a change that takes a block out of result.json."""

    def change(result):
        block = result
        for name in path[:-1]:
            block = block[name]
        del block[path[-1]]

    return change


def told(value, *path):
    """Return a change that writes ``value`` into result.json."""

    def change(result):
        block = result
        for name in path[:-1]:
            block = block[name]
        block[path[-1]] = value

    return change


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


def in_audits(folder, change):
    for path in (folder / "audits").glob("*.json"):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))


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


def in_audit(folder, name, change):
    path = folder / "audits" / f"{name}.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


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


def test_what_was_forged_nowhere_verifies(copied, signed):
    folder, key = copied
    forged(folder, signed, lambda result: None)
    assert problems(folder, key) == []


def unsigned(folder):
    for name in ("dossier.json", "dossier.sig"):
        (folder / name).unlink()


def test_page_and_text_say_the_speed_up_beside_every_retrained_model(copied):
    folder, _ = copied
    now = to_equal_r(json.loads((folder / "result.json").read_text()))
    assert now.models == 4
    for late in (0, 2, 4):
        unsigned(folder) if (folder / "dossier.json").exists() else None
        result = json.loads((folder / "result.json").read_text())
        for name in list(result["retraining"])[:late]:
            result["retraining"][name]["reached"] = False
        (folder / "result.json").write_text(json.dumps(result))
        write_report(folder)
        page, text = ((folder / name).read_text() for name in ("report.html", "report.md"))
        now = to_equal_r(result)
        shown = f"{html.escape(now.bound)}{now.mean:.1f}\N{MULTIPLICATION SIGN}"
        assert f"{shown} <small>{now.range}</small>" in page
        assert f"{'more than ' if late else ''}{now.mean:.1f} times ({now.beside}; operations of clients until" in text
        assert ("had not got there after" in page, "Retraining first got there after" in page) == (late > 0, late < 4)
        for said in (page, text):
            assert (f"{late} of 4 retrained models were never as good" in said) == (late > 0)
    assert "beside each of 4 retrained models" in text
    whole = sum(own["curve"][-1][0] for own in result["retraining"].values()) / 1e9
    assert f"4 models retrained from nothing besides, {amount(whole)} GFLOP" in page


@pytest.mark.parametrize("cached", [False, True])
def test_seconds_of_a_model_from_the_cache_are_not_divided(copied, cached):
    folder, _ = copied
    unsigned(folder)
    result = json.loads((folder / "result.json").read_text())
    result["oracles"]["retrained-1"]["cached"] = cached
    (folder / "result.json").write_text(json.dumps(result))
    write_report(folder)
    (row,) = [line for line in (folder / "report.html").read_text().splitlines() if "seconds of client time" in line]
    assert row.count("\N{MULTIPLICATION SIGN}") == (0 if cached else 2)


def test_a_class_without_test_images_and_one_that_gained_are_not_said_to_have_lost(copied):
    folder, _ = copied
    unsigned(folder)
    result = json.loads((folder / "result.json").read_text())
    kept = [name for k, name in enumerate(result["classes"]) if k not in result["forget"]]
    for block in (result["original"], result["unlearned"], *result["oracles"].values()):
        block["accuracy"]["per_class"][kept[0]] = None
    for k, name in enumerate(kept[1:]):
        result["original"]["accuracy"]["per_class"][name] = 0.5
        result["unlearned"]["accuracy"]["per_class"][name] = 0.5 + 0.1 * k
    (folder / "result.json").write_text(json.dumps(result))
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "Of the classes that stay, none lost." in page
    assert f"Farthest below the retrained models: {kept[0]}," not in page
    for block in result["oracles"].values():
        block["accuracy"]["per_class"] |= dict.fromkeys(kept, 0.4)
    (folder / "result.json").write_text(json.dumps(result))
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "none lost. None lies below the retrained models." in page
    assert "Farthest below" not in page


def test_a_result_of_another_version_is_left_to_that(copied, signed):
    folder, key = copied
    forged(folder, signed, told(1, "schema"))
    assert problems(folder, key) == [
        "result.json is of schema 1, and this verifier reads schema 2: take the verifier of the version that made the "
        "folder"
    ]
    unsigned(folder)
    with pytest.raises(RunError, match="expected a result of schema 2, got 1: read it by the version of fedunlearn"):
        write_report(folder)


def test_the_cost_of_retrained_models_from_the_cache_is_held_against_their_rounds(copied, signed):
    folder, key = copied
    lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    rounds = [line for line in lines if '"phase": "retrained-' not in line and '"phase":"retrained-' not in line]
    assert len(rounds) < len(lines)
    (folder / "rounds.jsonl").write_text("".join(rounds))
    forged(folder, signed, lambda result: None)
    assert problems(folder, key) == [
        f"whether retrained-{k} was trained here or came from the cache does not follow from rounds.jsonl"
        for k in (1, 2, 3, 4)
    ]

    def from_the_cache(result):
        for own in result["oracles"].values():
            own["cached"] = True

    forged(folder, signed, from_the_cache)
    assert problems(folder, key) == []

    def dearer(result):
        result["cost"]["retrain_whole"]["client_samples"] *= 10
        result["speedup_whole"]["client_samples"] *= 10

    forged(folder, signed, dearer)
    assert problems(folder, key) == ["the cost of retraining, retrain_whole, does not follow from retraining.json"]


def without(phase, round):
    """Return a change that leaves a step out of rounds.jsonl."""
    return lambda steps: [step for step in steps if (step["phase"], step["round"]) != (phase, round)]


def altered(name, **change):
    """Return a change of all steps of a phase."""
    return lambda steps: [step | change if step["phase"] == name else step for step in steps]


def in_rounds(folder, change):
    header, *steps = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *change(steps)]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("repair", 1), "has 1 steps of repair, which are not those that the recipe asks for"),
        (without("repair", 0), ": the steps of repair are not numbered one after another"),
        (without("measure-0", 0), "has 0 steps of measure-0, which are not those that the recipe asks for"),
        (without("reestimate", 0), "has 0 steps of reestimate, which are not those that the recipe asks for"),
        (without("train", 2), "has 2 steps of train, which are not those that the recipe asks for"),
        (without("retrained-1.retrain", 2), "has 2 steps of retrained-1.retrain, which are not those that the recipe"),
        (without("random.repair", 1), "has 1 steps of random.repair, which are not those that the recipe asks for"),
        (altered("repair", phase="mending"), " holds mending, which is no phase of this command and its recipe"),
        (altered("reestimate", phase="x\ny"), " holds x\\ny, which is no phase of this command and its recipe"),
        (altered("repair", entries=[]), ": a step of repair is not one of train"),
        (altered("repair", validation=0.5), ": a step of repair is not one of train"),
    ],
)
def test_a_round_left_out_or_under_another_name_is_found(copied, signed, change, text):
    folder, key = copied
    in_rounds(folder, change)
    forged(folder, signed, lambda result: None)
    assert any(line.startswith(f"rounds.jsonl{' ' * (text[0] == 'h')}{text}") for line in problems(folder, key))


def test_rounds_of_a_model_from_the_cache_are_those_of_the_recipe(copied, signed):
    folder, key = copied
    whole = json.loads((folder / "retraining.json").read_text())
    for change in (lambda rounds: rounds.pop(), lambda rounds: rounds[0].update(validation=None)):
        kept = json.loads(json.dumps(whole))
        change(kept["retrained-2"])
        (folder / "retraining.json").write_text(json.dumps(kept))
        forged(folder, signed, lambda result: None)
        text = "the rounds of retrained-2 in retraining.json are not those that the recipe asks for"
        assert text in problems(folder, key)


def exchanged(one, other):
    """Return a change by which two classes bear each other's names."""

    def change(result):
        names = {one: other, other: one}
        result["classes"] = [names.get(name, name) for name in result["classes"]]
        for block in (result["original"], result["unlearned"], *result["oracles"].values()):
            told = block["accuracy"]["per_class"]
            told[one], told[other] = told[other], told[one]

    return change


def test_the_dossier_names_the_classes_whose_rows_are_gone(copied, signed):
    folder, key = copied
    forged(folder, signed, exchanged("0", "2"))
    found = problems(folder, key)
    assert json.loads((folder / "dossier.json").read_text())["scope"]["forgotten"] == ["0"]
    for name in ("original", "model", "oracles/retrained-4"):
        assert f"{name}.safetensors has output rows of other classes than result.json tells" in found


def asked_for(folder, signed, forget):
    """Let recipe and rounds say that ``forget`` was asked for."""
    header, *steps = (folder / "rounds.jsonl").read_text().splitlines()
    header = json.loads(header)
    header["recipe"]["unlearn"]["forget"] = forget
    (folder / "rounds.jsonl").write_text("\n".join([json.dumps(header), *steps, ""]))
    forged(folder, signed, told(forget, "recipe", "unlearn", "forget"))


def test_the_forgotten_classes_are_those_that_were_asked_for(copied, signed):
    folder, key = copied
    for wrong in ([1], ["1"], [], [2, "2"], [2, 3], ["class 2"]):
        asked_for(folder, signed, wrong)
        text = "result.json: the forgotten classes are not those that the recipe asks for"
        assert text in problems(folder, key)
    for right in ([2], ["2"]):  # by number or by name
        asked_for(folder, signed, right)
        assert problems(folder, key) == []


def test_the_rows_of_a_second_request_are_those_of_the_data(signed, tmp_path):
    folder, key = tmp_path / "run", signed / "operator.pub"
    weights = signed / "run" / "model.safetensors"
    recipe = load_recipe(str(signed / "tiny.toml"), [f'model.weights="{weights}"', "unlearn.forget=[3]"])
    run(recipe, folder, command="unlearn", key=signed / "operator")
    assert problems(folder, key) == []
    assert json.loads((folder / "dossier.json").read_text())["scope"] == {
        "earlier": ["2"],
        "forgotten": ["3"],
        "labels_of_rows": [0, 1],
    }
    forged(folder, signed, told([1, 0, 3], "numbers"))
    assert "model.safetensors has output rows of other classes than result.json tells" in problems(folder, key)


@pytest.mark.parametrize(
    ("settings", "phases", "change", "text"),
    [
        (
            ["unlearn.target=0.01", "unlearn.rounds=3"],
            {"repair": 1},
            altered("repair", validation=0.0),
            "rounds.jsonl has 1 steps of repair, which are not those that the recipe asks for",
        ),
        (
            ["unlearn.target=0.01", "unlearn.rounds=3"],
            {"repair": 1},
            lambda steps: [*steps, *(step | {"round": 1} for step in steps if step["phase"] == "repair")],
            "rounds.jsonl has 2 steps of repair, which are not those that the recipe asks for",
        ),
        (
            ['unlearn.fraction="auto"'],
            {"attempt-30.check": 1},
            without("attempt-30.check", 0),
            "rounds.jsonl has 0 steps of attempt-30.check, which are not those that the recipe asks for",
        ),
        (
            ['unlearn.method="salun"'],
            {"method.salun-gradients": 1, "method.salun": 2},
            without("method.salun-gradients", 0),
            "rounds.jsonl has 0 steps of method.salun-gradients, which are not those that the recipe asks for",
        ),
        (
            ["unlearn.forget=[1, 2]"],
            {"measure-0": 1, "measure-1": 1},
            without("measure-1", 0),
            "rounds.jsonl has 0 steps of measure-1, which are not those that the recipe asks for",
        ),
        (['unlearn.repair="none"'], {"measure-0": 1}, altered("measure-0", round=1), "are not numbered one after"),
    ],
)
def test_rounds_of_other_recipes_are_held_against_them(signed, tmp_path, settings, phases, change, text):
    folder, key = tmp_path / "run", signed / "operator.pub"
    run(load_recipe(str(signed / "tiny.toml"), settings), folder, command="unlearn", key=signed / "operator")
    assert problems(folder, key) == []
    steps = json.loads((folder / "dossier.json").read_text())["rounds"]
    for phase, number in phases.items():
        assert sum(step["phase"] == phase for step in steps) == number
    in_rounds(folder, change)
    forged(folder, signed, lambda result: None)
    assert any(text in line for line in problems(folder, key)), problems(folder, key)


def test_the_cuts_that_were_tried_are_those_of_the_choice(signed, tmp_path):
    folder, key = tmp_path / "run", signed / "operator.pub"
    recipe = load_recipe(str(signed / "tiny.toml"), ['unlearn.fraction="auto"'])
    run(recipe, folder, command="unlearn", key=signed / "operator")
    in_rounds(folder, lambda steps: [step for step in steps if not step["phase"].startswith("attempt-50.")])

    def shorter(result):
        result["fraction"]["attempts"] = [own for own in result["fraction"]["attempts"] if own["fraction"] != 0.5]

    forged(folder, signed, shorter)
    text = "result.json: the cuts that were tried are not those by which the smallest is chosen"
    assert text in problems(folder, key)


@given(st.lists(values, min_size=7, max_size=7), st.integers(0, 6))
def test_the_verifier_knows_which_cuts_are_tried(probabilities, narrowest):
    assert (list(FRACTIONS), MOST) == (verify._FRACTIONS, verify._FORGOTTEN)
    left, attempts = list(zip(FRACTIONS, probabilities))[narrowest:], []
    while left:
        middle = len(left) // 2
        fraction, probability = left[middle]
        attempts.append({"fraction": fraction, "probability": probability})
        left = left[:middle] if probability <= MOST else left[middle + 1 :]
    assert verify._bisected(attempts)
    assert not verify._bisected([])
    assert not verify._bisected([*attempts, attempts[-1]])


def test_the_verifier_knows_the_phases_of_every_method():
    pruning = {name for name, method in METHODS.items() if method.measures}
    assert verify._OF_METHOD.keys() == METHODS.keys() - pruning


def test_costs_of_retraining_without_a_retrained_model_are_refused(copied, signed):
    folder, key = copied
    for path in (folder / "audits").glob("retrained-*.json"):
        path.unlink()
    forged(folder, signed, told({}, "oracles"))
    text = "the retrained models of the costs, of retraining.json and of result.json are not the same"
    assert text in problems(folder, key)


def test_retraining_json_is_held_against_the_rounds_of_the_models_trained_here(copied, signed):
    folder, key = copied
    kept = json.loads((folder / "retraining.json").read_text())
    kept["retrained-2"][0]["entries"][0]["samples"] += 1
    (folder / "retraining.json").write_text(json.dumps(kept))
    forged(folder, signed, lambda result: None)
    assert "the rounds of retrained-2 in retraining.json are not those of rounds.jsonl" in problems(folder, key)


def test_a_folder_of_the_rule_by_which_each_band_had_its_own_level_asks_for_its_own_verifier(copied, signed):
    folder, key = copied
    thresholds = json.loads((folder / "thresholds.json").read_text())
    del thresholds["figures"]
    (folder / "thresholds.json").write_text(json.dumps(thresholds))
    again(folder, signed, **json.loads((folder / "result.json").read_text()))
    found = "\n".join(problems(folder, key))
    assert "thresholds.json follows an older rule, by which each band has a level of its own" in found
    assert "does not follow from the figures" not in found


def test_a_dossier_that_says_something_else_than_its_files_is_found(copied, signed):
    folder, key = copied
    signer = read_private_key(signed / "operator", outside=folder)
    dossier = json.loads((folder / "dossier.json").read_text())
    dossier |= {"verdict": "not forgotten?", "thresholds": {}, "rounds": [], "scope": {"forgotten": ["cat"]}}
    data = json.dumps(dossier).encode()
    (folder / "dossier.json").write_bytes(data)
    (folder / "dossier.sig").write_bytes(signer.sign(data))
    assert problems(folder, key) == [
        "dossier.json and the files differ in scope",
        "dossier.json and the files differ in thresholds",
        "dossier.json and result.json differ in verdict",
        "events.jsonl tells of other data or another verdict",
        "dossier.json and rounds.jsonl differ in the rounds",
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"kind": "exact unlearning"},
            ": kind is not what this verifier knows: it was changed, or is of another version",
        ),
        ({"limits": []}, ": limits is not what this verifier knows: it was changed, or is of another version"),
        (
            {"purged": ["all images of the class"]},
            ": purged is not what this verifier knows: it was changed, or is of another version",
        ),
        ({"proof\n": "x", "seal": 1}, r" says what is held against nothing: proof\n, seal"),
    ],
)
def test_a_dossier_states_what_every_dossier_states(copied, signed, change, text):
    folder, key = copied
    data = json.dumps(json.loads((folder / "dossier.json").read_text()) | change).encode()
    (folder / "dossier.json").write_bytes(data)
    (folder / "dossier.sig").write_bytes(read_private_key(signed / "operator", outside=folder).sign(data))
    assert problems(folder, key) == [f"dossier.json{text}"]


@pytest.mark.parametrize("change", [told(4.0, "privacy", "noise"), told(0.5, "privacy", "epsilon")])
def test_the_privacy_of_a_result_is_that_of_its_recipe(copied, signed, change):
    folder, key = copied
    forged(folder, signed, change)
    assert problems(folder, key) == ["result.json tells of another privacy than its recipe"]


def test_the_method_of_a_result_is_that_of_its_recipe(copied, signed):
    folder, key = copied
    forged(folder, signed, told({"name": "retrain"}, "method"))
    assert problems(folder, key) == ["result.json tells of another method than its recipe"]


def test_nothing_is_said_of_a_file_or_of_the_events_that_is_held_against_nothing(copied, signed):
    folder, key = copied
    whole = json.loads((folder / "dossier.json").read_text())
    for block, text in (
        (whole["files"]["plan.json"], "plan.json was changed"),
        (whole["events"], "events.jsonl ends elsewhere than the dossier says"),
    ):
        block["witness"] = "a notary"
        data = json.dumps(whole).encode()
        (folder / "dossier.json").write_bytes(data)
        (folder / "dossier.sig").write_bytes(read_private_key(signed / "operator", outside=folder).sign(data))
        assert problems(folder, key) == [text]
        del block["witness"]


@pytest.mark.parametrize("name", ["report.html", "report.md", "README.md"])
def test_a_page_shows_the_verdict_of_the_dossier(copied, signed, name):
    folder, key = copied
    honest = json.loads((folder / "result.json").read_text())["verdict"]
    whole = (folder / name).read_text()
    (folder / name).write_text(whole.replace(honest, "indistinguishable from retraining"))
    forged(folder, signed, lambda result: None)
    assert problems(folder, key) == [f"{name} does not show the verdict of result.json"]


def test_a_dossier_that_names_another_key_or_cannot_be_followed_is_found(copied, signed):
    folder, key = copied
    signer = read_private_key(signed / "operator", outside=folder)
    for data, text in ((b'{"key": "00"}', "names the key 00"), (b"[]", "the dossier cannot be followed: TypeError")):
        (folder / "dossier.json").write_bytes(data)
        (folder / "dossier.sig").write_bytes(signer.sign(data))
        assert text in problems(folder, key)[0]


def test_events_out_of_order_are_found_though_signed_by_the_operator(copied, signed):
    folder, key = copied
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    names = [line["event"] for line in lines]
    lines[names.index("audited")]["event"], lines[names.index("thresholds fixed")]["event"] = (
        "thresholds fixed",
        "audited",
    )
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again(folder, signed)
    found = "\n".join(problems(folder, key))
    assert "does not follow from the one before" in found
    lines[0]["time"], lines[1]["event"] = "2999-01-01T00:00:00+00:00", "run started"
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    again(folder, signed)
    later = "\n".join(problems(folder, key))
    assert "line 2 is earlier than the one before" in later
    assert "line 2 repeats an event" in later
    assert (
        "expected, in this order, run started, original ready, unlearned, retrained models ready, thresholds fixed"
        in found
    )


# the verifier computes what the tool computes

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


# the folder


def test_folders_without_a_finished_or_audited_run_are_refused(copied, tmp_path):
    folder, _ = copied
    with pytest.raises(RunError, match=r"expected the folder of a finished run, but there is no result\.json"):
        RunFolder.read(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(RunError, match="this run was not audited: use fedunlearn run"):
        RunFolder.audited(tmp_path)
    (folder / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json: expected JSON"):
        RunFolder.read(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("result.json", '{"verdict": "not forgotten"}'),
        ("plan.json", '{"schema": 1}'),
        ("plan.json", "["),
        ("audits/unlearned.json", "{}"),
        ("events.jsonl", "[]\n"),
        ("scores.safetensors", "0"),
    ],
)
def test_a_report_of_damaged_files_says_so_in_one_line_and_stays(copied, name, text):
    folder, _ = copied
    before = (folder / "report.html").read_bytes()
    (folder / name).write_text(text)
    with pytest.raises(RunError, match="its files cannot be read as those of a finished run"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_confirmations_in_a_folder_of_damaged_files_are_refused(copied, signed):
    folder, _ = copied
    key = read_private_key(signed / "operator", outside=folder)
    (folder / "rounds.jsonl").write_text('{"header": 1}\n{}\n')
    with pytest.raises(RunError, match=r"its files cannot be read as those of a finished run \(KeyError: 'entries'\)"):
        acknowledge(folder, ["client-0"], key)
    shutil.copytree(signed / "plain", folder.parent / "plain")
    (folder.parent / "plain" / "events.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"plain: its files cannot be read .* \(KeyError: 'event'\)"):
        sign(folder.parent / "plain", key)
    assert not (folder.parent / "plain" / "dossier.json").exists()


def test_no_other_key_signs_a_folder_whose_report_names_one(signed, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(signed / "plain", folder)
    make_keys(tmp_path / "other")
    own, other = (read_private_key(path, outside=folder) for path in (signed / "operator", tmp_path / "other"))
    named = verify.fingerprint(own.public_key())
    EventLog(folder / "events.jsonl").once("operator named", key=named)  # as a run with --key, before its report
    with pytest.raises(
        EvidenceError, match=rf"its report names the key {named[:16]}\.\.\. as the one that signs it, got"
    ):
        sign(folder, other)
    assert not (folder / "dossier.json").exists()
    sign(folder, own)
    sign(folder, own)
    assert problems(folder, signed / "operator.pub") == []


def test_no_other_key_takes_the_place_of_the_one_that_signed(signed, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(signed / "plain", folder)  # done without a key, so that its report names none
    make_keys(tmp_path / "other")
    own, other = (read_private_key(path, outside=folder) for path in (signed / "operator", tmp_path / "other"))
    sign(folder, own)
    with pytest.raises(EvidenceError, match="is signed by another key, or was changed since: give the key that signed"):
        sign(folder, other)
    assert problems(folder, signed / "operator.pub") == []
    with pytest.MonkeyPatch.context() as patch:  # a disk that is full when the new dossier is written
        whole = Path.write_bytes
        patch.setattr(Path, "write_bytes", lambda path, data: whole(path, data) if "json" not in path.name else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sign(folder, own)
    assert problems(folder, signed / "operator.pub") == []  # by the signature that was there
    (folder / "dossier.sig").unlink()  # as a kill between the dossier and its signature leaves it
    with pytest.raises(EvidenceError, match="is signed by another key"):
        sign(folder, other)
    sign(folder, own)
    assert problems(folder, signed / "operator.pub") == []


def test_a_folder_that_is_being_written_takes_no_confirmation(copied, signed):
    folder, _ = copied
    code = (
        "import sys; from pathlib import Path; from fedunlearn.federation.lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with Popen([sys.executable, "-c", code, str(folder)], stdin=PIPE, stdout=PIPE, text=True) as writer:
        assert writer.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="is being written by process"):
            acknowledge(folder, ["client-0"], read_private_key(signed / "operator", outside=folder))
        writer.stdin.close()


def test_what_is_no_fault_of_the_files_is_told_as_what_it_is(tmp_path):
    for error in (OSError(28, "No space left on device"), MemoryError(), ImportError("matplotlib"), RunError("other")):
        with pytest.raises(type(error)) as raised, readable(tmp_path):
            raise error
        assert raised.value is error


def test_damaged_feature_maps_are_named(tmp_path):
    (tmp_path / "maps.safetensors").write_bytes(b"0")
    with pytest.raises(RunError, match="expected feature maps, but"):
        FeatureMaps.load(tmp_path / "maps.safetensors")


def test_the_model_card_loads_the_model_it_describes(copied, monkeypatch):
    folder, _ = copied
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: fedunlearn\n")
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec"), names)
    assert names["weights"].labels == (0, 1, 3)
    parameters = json.loads((folder / "result.json").read_text())["unlearned"]["parameters"]
    assert sum(own.numel() for own in names["model"].parameters()) == parameters


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {},
            "Trained by federated averaging; 2 forgotten over 3 clients by pruning the channels that rank highest for",
        ),
        ({"criterion": "random", "end": "lowest"}, "by pruning the channels that rank LOWEST for it by random, and"),
        (
            {"fraction": 0, "complement": 1.0},
            "by training on its images once more, to erase it, and repair on the",
        ),
        ({"weights": "../mine.pt", "repair": "none"}, "The weights before were given to the run; 2 forgotten over 3"),
        ({"method": {"label": "FUCRT relabelling"}}, "by FUCRT relabelling."),
    ],
)
def test_the_model_card_says_by_what_a_run_forgot(signed, tmp_path, change, text):
    folder = tmp_path / "plain"
    shutil.copytree(signed / "plain", folder)
    result = json.loads((folder / "result.json").read_text())
    tables = dict.fromkeys(("fraction", "repair", "criterion", "end"), "unlearn")
    tables |= {"complement": "erase", "weights": "model"}
    for key, value in change.items():
        (result["recipe"][tables[key]] if key in tables else result)[key] = value
    (folder / "result.json").write_text(json.dumps(result))
    write_card(folder)
    assert text in (folder / "README.md").read_text()


def test_nothing_claims_more_than_evidence():
    root = Path(__file__).parents[1]
    words = ("certif" + "ied", "guaran" + "teed")
    texts = [path for folder in ("src", "docs") for path in (root / folder).rglob("*") if path.suffix in TEXTS]
    for path in [*texts, *root.glob("*.md")]:
        assert not any(word in path.read_text("utf-8").lower() for word in words), path


TEXTS = {".py", ".md", ".html", ".toml"}


def test_audits_in_whose_band_the_original_lies_are_said_to_tell_nothing():
    audits = {"probe": {"band": [0.4, 0.6]}, "int8": {"band": [-0.2, 1.3]}, "relearn": {"band": [0.1, 0.2]}}
    assert unable(audits, {"probe": 0.5, "relearn": 0.9}) == ["probe", "int8"]
    assert unable(audits, {"probe": 0.3, "relearn": 0.9}) == ["probe", "int8"]  # below a band is not above it
    assert unable(audits, {}) == ["int8"]
    assert unable({"cka": {"band": [0.4, 0.6]}, "int4": {"band": None}}, {"cka": 0.5}) == []


def test_a_table_tells_suppression_with_traces_from_a_model_that_is_merely_unlike():
    assert in_short(verdict.SUPPRESSED, verdict.UNLIKE).endswith("(unlike retrained models)")
    assert in_short(verdict.SUPPRESSED, "it knows more").endswith("(traces of the class)")
    assert in_short(verdict.NOT_FORGOTTEN, "it names it") == verdict.NOT_FORGOTTEN


def test_a_confirmed_deletion_is_an_event_and_signed_again(signed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(signed / "run", folder)
    done = fedunlearn(
        "acknowledge", folder, "--client", "client-1", "--client", "client-0", "--key", signed / "operator"
    )
    assert (done.returncode, done.stdout) == (0, f"{folder}: recorded and signed again\n")
    assert json.loads((folder / "dossier.json").read_text())["acknowledged"] == ["client-0", "client-1"]
    again = fedunlearn("acknowledge", folder, "--client", "client-1", "--key", signed / "operator")
    assert again.returncode == 0
    shutil.copytree(signed / "plain", tmp_path / "plain")
    first = fedunlearn("acknowledge", tmp_path / "plain", "--client", "client-1", "--key", signed / "operator")
    assert first.stdout == f"{tmp_path / 'plain'}: recorded and signed, which it was not before\n"
    seen = fedunlearn("verify", folder, "--key", signed / "operator.pub")
    assert seen.returncode == 0
    assert "deletion confirmed, as the operator says, by 2 of 3 clients: client-0, client-1" in seen.stdout
    make_keys(tmp_path / "other")
    stranger = fedunlearn("acknowledge", folder, "--client", "client-2", "--key", tmp_path / "other")
    assert "is signed by another key, or was changed since: give the key that signed it" in stranger.stderr
    assert json.loads((folder / "dossier.json").read_text())["acknowledged"] == ["client-0", "client-1"]
    refused = fedunlearn("acknowledge", folder, "--client", "client-7", "--key", signed / "operator")
    assert refused.returncode == 1
    assert "no client 'client-7' took part in the run" in refused.stderr


def test_what_was_changed_since_it_was_signed_is_not_signed_again(signed, tmp_path):
    shutil.copytree(signed, tmp_path / "own")
    folder = tmp_path / "own" / "run"
    settings = [f'data.path="{folder.with_name("set.npz")}"', 'evidence.request="case 7"', "evidence.feature_maps=true"]
    recipe = load_recipe(str(signed / "tiny.toml"), settings)
    key = read_private_key(signed / "operator", outside=folder)
    (folder / "report.md").write_text("indistinguishable from retraining")
    (folder / "extra.txt").touch()
    text = r"since it was signed extra\.txt, report\.md changed, came or went, and signing again would hide it: see"
    before = (folder / "dossier.sig").read_bytes()
    with pytest.raises(EvidenceError, match=text):
        acknowledge(folder, ["client-0"], key)
    with pytest.raises(EvidenceError, match=text):
        run(recipe, folder, key=signed / "operator")
    assert (folder / "dossier.sig").read_bytes() == before
    assert "client-0" not in (folder / "events.jsonl").read_text()
    shutil.rmtree(folder)
    shutil.copytree(signed / "run", folder)
    EventLog(folder / "events.jsonl").once("deletion confirmed by client-1")  # and killed before it was signed
    with pytest.raises(EvidenceError, match=r"since it was signed events\.jsonl changed"):
        acknowledge(folder, ["client-0"], key)  # who signs this says nothing of another client
    acknowledge(folder, ["client-1"], key)
    assert problems(folder, signed / "operator.pub") == []
    EventLog(folder / "events.jsonl").once("something else")
    with pytest.raises(EvidenceError, match=r"since it was signed events\.jsonl changed"):
        acknowledge(folder, ["client-0"], key)
    (folder / "dossier.json").write_text("{}")
    with pytest.raises(EvidenceError, match=r"dossier\.json cannot be read: see what fedunlearn verify says"):
        run(recipe, folder, key=signed / "operator")


def test_who_confirmed_is_held_against_the_events(signed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(signed / "run", folder)
    value = json.loads((folder / "dossier.json").read_text()) | {"acknowledged": ["client-0"]}
    data = json.dumps(value).encode()
    (folder / "dossier.json").write_bytes(data)
    (folder / "dossier.sig").write_bytes(read_private_key(signed / "operator", outside=folder).sign(data))
    assert "dossier.json and events.jsonl differ in who confirmed a deletion" in problems(
        folder, signed / "operator.pub"
    )
