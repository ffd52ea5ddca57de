"""The verifier: signature, files, events, and what the dossier says."""

import ast
import json
import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from fedunlearn.errors import EvidenceError, RunError
from fedunlearn.evidence import verify
from fedunlearn.evidence.dossier import acknowledge, write_dossier
from fedunlearn.evidence.keys import make_keys, read_private_key
from fedunlearn.evidence.report import write_card, write_report
from fedunlearn.evidence.verify import problems
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.work import finished
from forgery import again, forged, told

FLIPS = 6  # in every file


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
    assert problems(tmp_path / "nowhere", key) == [f"{tmp_path / 'nowhere'}: there is no such folder: check the path"]
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


def test_links_and_names_that_write_lines_are_found(copied, tmp_path):
    folder, key = copied
    (folder / "extra").symlink_to(tmp_path)
    (folder / "a\nverified: all").write_text("")
    linked, added = problems(folder, key)
    assert linked == "extra is a link or device, not a file"
    assert added.startswith("a\\nverified: all is not in the dossier: it was put there after signing")


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


def test_what_was_forged_nowhere_verifies(copied, signed):
    folder, key = copied
    forged(folder, signed, lambda result: None)
    assert problems(folder, key) == []


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
