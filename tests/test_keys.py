"""Keys and the event log."""

import json
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fedunlearn.errors import EvidenceError, RunError
from fedunlearn.evidence.events import EventLog
from fedunlearn.evidence.keys import make_keys, read_private_key
from fedunlearn.evidence.verify import problems


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


def test_an_event_is_recorded_once_by_one_log(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.once("a")
    log.once("a")
    log.once("b")
    seen = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(own["seq"], own["event"]) for own in seen] == [(0, "a"), (1, "b")]


def test_a_key_that_lies_in_the_folder_by_a_link_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    make_keys(tmp_path / "run" / "operator")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(EvidenceError, match="the private key lies in the folder of the run"):
        read_private_key(tmp_path / "link" / "operator", outside=tmp_path / "run")
