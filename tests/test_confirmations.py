"""Clients that confirm a deletion, and folders that are signed again."""

import json
import shutil
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from fedunlearn.errors import EvidenceError, RunError
from fedunlearn.evidence import verify
from fedunlearn.evidence.dossier import acknowledge, sign, write_dossier
from fedunlearn.evidence.events import EventLog
from fedunlearn.evidence.keys import make_keys, read_private_key
from fedunlearn.evidence.verify import fingerprint, problems
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe
from test_cli import fedunlearn


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


def test_no_other_key_signs_with_a_confirmation_what_names_one(signed, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(signed / "plain", folder)
    make_keys(tmp_path / "other")
    own, other = (read_private_key(path, outside=folder) for path in (signed / "operator", tmp_path / "other"))
    EventLog(folder / "events.jsonl").once("operator named", key=fingerprint(own.public_key()))
    for signs in (lambda: acknowledge(folder, ["client-0"], other), lambda: write_dossier(folder, other)):
        with pytest.raises(EvidenceError, match="its report names the key"):
            signs()
    assert not (folder / "dossier.json").exists()


def test_no_client_confirms_where_one_of_them_took_no_part(copied, signed):
    folder, _ = copied
    with pytest.raises(EvidenceError, match="no client 'client-7' took part"):
        acknowledge(folder, ["client-0", "client-7"], read_private_key(signed / "operator", outside=folder))
    assert "client-0" not in (folder / "events.jsonl").read_text()


def test_a_file_that_went_since_it_was_signed_keeps_it_from_being_signed_again(copied, signed):
    folder, _ = copied
    (folder / "plan.json").unlink()
    with pytest.raises(EvidenceError, match=r"since it was signed plan\.json changed, came or went"):
        sign(folder, read_private_key(signed / "operator", outside=folder))


def test_a_folder_signed_with_an_older_verifier_is_signed_again(copied, signed):
    folder, key = copied
    (folder / "verify.py").write_text("# of an earlier version\n")
    sign(folder, read_private_key(signed / "operator", outside=folder))
    assert problems(folder, key) == []
