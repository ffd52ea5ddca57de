"""Each number and word of the pages is that of the run: whose it is, and from which block."""

import json
import re

import pytest

from fedunlearn.audits.verdict import NO_VERDICT, NOT_FORGOTTEN, SUPPRESSED
from fedunlearn.errors import EvidenceError
from fedunlearn.evidence.folder import RunFolder
from fedunlearn.evidence.pictures import _classes, _confusion, _work
from fedunlearn.evidence.report import write_card, write_report
from fedunlearn.evidence.words import certainty, summary
from fedunlearn.tabular import amount, percent
from forgery import unsigned


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_models_has_u_r_size_and_verdict_of_each(copied):
    folder, _ = copied
    unsigned(folder)
    write_report(folder)
    result = json.loads((folder / "result.json").read_text())
    lines = [cells(line) for line in (folder / "report.md").read_text().splitlines() if line.startswith("| ")]
    page = (folder / "report.html").read_text()
    held = result["calibration"]["models"]
    expected = {
        "unlearned": (result["unlearned"], result["verdict"]),
        "original": (result["original"], result["controls"]["original"]["verdict"]),
        **{name: (own, held[name]["verdict"]) for name, own in result["oracles"].items()},
    }
    for name, (block, verdict) in expected.items():
        u, r = (percent(block["accuracy"][key]) for key in ("forget_row_kept", "retain"))
        assert [name, u, r, f"{block['parameters']:,}", verdict] in lines
        assert re.search(
            rf">{name}</th><td[^>]*>{u}</td><td[^>]*>{r}</td><td[^>]*>{block['parameters']:,}</td><td[^>]*>{verdict}<",
            page,
        )


def test_the_record_has_the_time_of_each_event(copied):
    folder, _ = copied
    unsigned(folder)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    times = {own["event"]: f"2026-01-0{k + 1}T00:00:00+00:00" for k, own in enumerate(lines)}
    text = "".join(json.dumps(own | {"time": times[own["event"]]}) + "\n" for own in lines)
    (folder / "events.jsonl").write_text(text)
    write_report(folder)
    page = (folder / "report.html").read_text()
    shown = {event: time.replace("T", " ").replace("+00:00", " UTC") for event, time in times.items()}
    assert f"<dt>forgotten</dt><dd>{shown['unlearned']}</dd>" in page
    assert f"<dt>audited</dt><dd>{shown['audited']}; what" in page
    assert f"(the bands) was fixed {shown['thresholds fixed']}, before" in page
    assert f"</code>, on {shown['operator named']}, valid for 365 days" in page


def test_an_audit_outside_its_band_is_marked_and_has_its_band_distance_and_the_mean_of_retrained_models(copied):
    folder, _ = copied
    unsigned(folder)
    result = json.loads((folder / "result.json").read_text())
    result["audits"]["cka"] |= {"figure": 0.4, "verdict": "below", "distance": -7.5, "band": [0.5, 1.2]}
    (folder / "result.json").write_text(json.dumps(result))
    for name, value in zip(result["oracles"], (0.6, 0.7, 0.8, 0.9)):
        path = folder / "audits" / f"{name}.json"
        audit = json.loads(path.read_text())
        audit["figures"]["cka"]["value"] = value
        path.write_text(json.dumps(audit))
    write_report(folder)
    (row,) = re.findall(r">features \(CKA\)</th>(.*?)</tr>", (folder / "report.html").read_text(), re.S)
    assert 'class="outside">40.0<' in row
    assert "50.0&nbsp;to&nbsp;100.0" in row
    assert 'data-label="sd away">\N{MINUS SIGN}7.5<' in row
    assert 'data-label="retrained">75.0<' in row
    (line,) = [
        cells(line) for line in (folder / "report.md").read_text().splitlines() if line.startswith("| features (CKA)")
    ]
    assert line[1:5] == ["40.0", "50.0 to 100.0", "\N{MINUS SIGN}7.5", "75.0"]
    assert "Outside: features (CKA)" in (folder / "report.html").read_text()


def result_of(verdict, *, forget=(2,), decided=(), classes=4, **audits):
    band = (0.0, 0.1)
    return {
        "forget": list(forget),
        "classes": ["a", "b", "c", "d"][:classes],
        "verdict": verdict,
        "reason": "too few",
        "decided_by": list(decided),
        "audits": {name: {"figure": value, "verdict": side, "band": band} for name, (value, side) in audits.items()},
    }


def test_the_words_of_each_verdict_by_hand():
    one = result_of(SUPPRESSED, decided=["probe", "cka"], probe=(0.9, "above"), cka=(0.1, "below"))
    one["audits"]["forget"] = {"figure": 0.004, "verdict": "inside", "band": (0, 0.1)}
    assert summary(one).startswith(
        "Not passed. The model no longer answers “c”, but traces of it are left: audits find"
    )
    assert "Even with the answer (its output row) put back it names 0.4 % of the class's test images." in summary(one)
    one["audits"]["forget"] = {"figure": 0.2, "verdict": "above", "band": (0, 0.1)}
    assert "The model names “c” no more often than by chance, but" in summary(one)
    one["audits"]["forget"]["verdict"] = "inside"
    assert "The model names “c” no more often than retrained models may, but" in summary(one)
    one["audits"]["forget"]["verdict"] = None
    assert "The model names “c” in 20.0 % of its images, which no retrained model is held against, but" in summary(one)
    assert "put back it names" not in summary(one | {"model": {}})
    assert "It names 20.0 % of the class's test images." in summary(one | {"model": {}})
    two = one | {"forget": [1, 2]}
    assert "it names 20.0 % of the classes' test images on average over them." in summary(two)
    assert "One class stays" not in summary(two)
    assert summary(one | {"forget": [0, 1, 2]}).endswith(
        "One class stays, which any model names: R is 100 and says nothing."
    )
    assert "There is no verdict on “c”: too few. " in summary(one | {"verdict": NO_VERDICT})


def test_a_control_that_is_not_forgotten_has_failed_as_it_must():
    found = {
        "verdict": SUPPRESSED,
        "controls": {
            "original": {"verdict": NOT_FORGOTTEN},
            "head_only": {"verdict": SUPPRESSED},
            "random": {"verdict": NO_VERDICT},
        },
        "calibration": {"models": {"a": {"verdict": SUPPRESSED}}},
    }
    assert "Of 3 controls, which must fail, 2 did; how often" in certainty(found)


def test_what_a_plot_says_of_classes_and_of_work_is_that_of_the_run(copied):
    folder, _ = copied
    result = json.loads((folder / "result.json").read_text())
    result["original"]["accuracy"]["per_class"] = {"0": 0.9, "1": 0.9, "2": 0.9, "3": 0.9}
    result["unlearned"]["accuracy"]["per_class"] = {"0": 0.8, "1": 0.6, "2": 0.0, "3": 0.95}
    for own in result["oracles"].values():
        own["accuracy"]["per_class"] = {"0": 0.9, "1": 0.5, "2": 0.0, "3": 0.99}
    result["unlearned"]["validation"]["retain"], result["unlearned"]["accuracy"]["retain"] = 0.7, 0.6
    for k, own in enumerate(result["retraining"].values(), 1):
        own |= {"client_flops": k * 10**9, "curve": [[10**9, 0.5], [9 * 10**9, 0.9]], "reached": True}
    audits = json.loads((folder / "audits" / "unlearned.json").read_text())
    audits["details"]["confusion"][2] = [3, 9, 0, 3]
    run = RunFolder(folder, result, {"unlearned": audits})
    text = _classes(run).text
    assert "Of the classes that stay, 1 lost most: 90.0 % before, 60.0 % now." in text
    assert "Farthest below the retrained models: 0, 80.0 % (90.0 %)." in text
    assert "Test images of “2” are now named “1” (60 %), “0” (20 %), “3” (20 %)." in _confusion(run).text
    text = _work(run).text
    assert "Unlearning ends at R 70.0 % on the clients' validation images" in text
    assert "Retraining first got there after 1 GFLOP to 4 GFLOP" in text.replace(".00", "")


def test_a_page_says_whether_validation_images_may_have_been_seen(copied):
    folder, _ = copied
    unsigned(folder)
    result = json.loads((folder / "result.json").read_text())
    for unseen in (True, False):
        result["cost"]["retrain"]["validation_unseen"] = unseen
        (folder / "result.json").write_text(json.dumps(result))
        write_report(folder)
        for name in ("report.html", "report.md"):
            assert ("may have seen the validation images" in (folder / name).read_text()) == (not unseen)


def test_the_first_screen_has_size_colour_and_use_of_the_model(copied):
    folder, _ = copied
    unsigned(folder)
    result = json.loads((folder / "result.json").read_text())
    result["unlearned"]["parameters"] = result["original"]["parameters"] // 4
    for verdict, colour in (
        ("indistinguishable from retraining", "good"),
        ("not forgotten", "bad"),
        ("no verdict", ""),
    ):
        (folder / "result.json").write_text(json.dumps(result | {"verdict": verdict}))
        write_report(folder)
        page = (folder / "report.html").read_text()
        assert f'<div class="verdict {colour}">' in page
        assert ("if it may be used at all, since it did not pass" in page) == (colour != "good")
        assert "<dt>size of the model</dt><dd>\N{MINUS SIGN}75 %</dd>" in page


def test_the_card_has_the_classes_the_r_and_the_sizes_of_the_model(copied):
    folder, _ = copied
    unsigned(folder)
    result = json.loads((folder / "result.json").read_text())
    result["unlearned"]["accuracy"]["retain"], result["original"]["accuracy"]["retain"] = 0.75, 0.85
    (folder / "result.json").write_text(json.dumps(result))
    write_card(folder)
    text = (folder / "README.md").read_text()
    assert "* Output rows, in order: 0, 1, 3.\n" in text
    assert "* Accuracy on test images of the kept classes: 75.00 %." in text
    assert "      value: 0.7500\n" in text
    assert f"{result['unlearned']['parameters']:,} parameters ({result['original']['parameters']:,} before)" in text


def test_details_of_the_page_are_those_of_the_unlearned_model(copied):
    folder, _ = copied
    unsigned(folder)
    result = json.loads((folder / "result.json").read_text())
    path = folder / "audits" / "unlearned.json"
    audit = json.loads(path.read_text())
    audit["details"]["membership"]["forget"] |= {"members": 321, "others": 123}
    layer = next(iter(audit["details"]["representation"]))
    audit["details"]["representation"][layer] = {"cka": 0.111, "procrustes": 0.222}
    audit["details"]["confusion"][2] = [3, 9, 0, 3]
    path.write_text(json.dumps(audit))
    for name in result["oracles"]:
        other = json.loads((folder / "audits" / f"{name}.json").read_text())
        other["details"]["representation"][layer] = {"cka": 0.333, "procrustes": 0.444}
        (folder / "audits" / f"{name}.json").write_text(json.dumps(other))
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "<td>321 / 123</td>" in page
    assert f"{layer}</th><td>11.1</td><td>33.3</td><td>22.2</td><td>44.4</td>" in page
    assert "of 4 classes. Test images of “2” are now named “1” (60 %)" in page
    assert "in % on test images, 15 of them of the forgotten class" in page


def test_the_cost_table_has_both_costs_of_retraining(copied):
    folder, _ = copied
    unsigned(folder)
    write_report(folder)
    page = (folder / "report.html").read_text()
    cost = json.loads((folder / "result.json").read_text())["cost"]
    (row,) = re.findall(r">images processed</th>(.*?)</tr>", page)
    assert re.findall(r">([\d.,]+)<", row) == [
        amount(cost[key]["client_samples"]) for key in ("unlearn", "retrain", "retrain_whole")
    ]


def test_a_page_that_a_signed_folder_lost_is_not_written_in_its_place(copied):
    folder, _ = copied
    (folder / "report.md").unlink()
    with pytest.raises(EvidenceError, match=r"is signed, and a new report\.md would differ"):
        write_report(folder)
    assert not (folder / "report.md").exists()
