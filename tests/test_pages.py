"""What reports, model card and words say of a run, and of one whose files are damaged."""

import html
import json
import shutil
from pathlib import Path

import pytest

from fedunlearn.audits import verdict
from fedunlearn.errors import RunError
from fedunlearn.evidence.dossier import acknowledge, sign
from fedunlearn.evidence.folder import RunFolder, readable
from fedunlearn.evidence.keys import read_private_key
from fedunlearn.evidence.maps import FeatureMaps
from fedunlearn.evidence.report import write_card, write_report
from fedunlearn.evidence.speedup import to_equal_r
from fedunlearn.evidence.verify import problems
from fedunlearn.evidence.words import in_short, unable
from fedunlearn.tabular import amount
from forgery import forged, told, unsigned


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


def test_a_result_of_another_version_is_left_to_that(copied, signed, monkeypatch):
    folder, key = copied
    with monkeypatch.context() as before:
        before.setattr("fedunlearn.evidence.folder.SCHEMA", 1)
        forged(folder, signed, told(1, "schema"))
    assert problems(folder, key) == [
        "result.json is of schema 1, and this verifier reads schema 2: take the verifier of the version that made the "
        "folder"
    ]
    unsigned(folder)
    with pytest.raises(RunError, match="expected a result of schema 2, got 1: read it by the version of fedunlearn"):
        write_report(folder)


def test_folders_without_a_finished_or_audited_run_are_refused(copied, tmp_path):
    folder, _ = copied
    with pytest.raises(RunError, match=r"expected the folder of a finished run, but there is no result\.json"):
        RunFolder.read(tmp_path)
    (tmp_path / "result.json").write_text('{"schema": 2}')
    with pytest.raises(RunError, match="this run was not audited: use fedunlearn run"):
        RunFolder.audited(tmp_path)
    (folder / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json: expected JSON"):
        RunFolder.read(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("result.json", '{"schema": 2, "verdict": "not forgotten"}'),
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
