"""What a dossier states is held against the files of its folder, and each event against the file that it speaks of."""

from datetime import datetime, timedelta

import pytest

from fedunlearn.evidence import verify
from fedunlearn.evidence.verify import problems
from forgery import dossier_of, forged, in_events, resigned, told


def test_clocks_may_be_five_minutes_apart_and_no_more(copied):
    folder, key = copied
    created = datetime.fromisoformat(dossier_of(folder)["created"])
    assert problems(folder, key, now=created - timedelta(minutes=4)) == []
    assert "which is in the future" in problems(folder, key, now=created - timedelta(minutes=6))[0]


@pytest.mark.parametrize("name", ["models", "clients", "request", "data"])
def test_each_statement_of_a_dossier_is_held_against_the_files(copied, signed, name):
    folder, key = copied
    resigned(folder, signed, **{name: "another"})
    assert f"dossier.json and the files differ in {name}" in problems(folder, key)


@pytest.mark.parametrize("name", [name for name in verify._REPEATED if name not in ("cost", "retraining")])
def test_each_block_of_a_dossier_that_repeats_the_result_is_held_against_it(copied, signed, name):
    folder, key = copied
    resigned(folder, signed, **{name: {}})
    assert f"dossier.json and result.json differ in {name}" in problems(folder, key)


def test_the_schema_of_a_dossier_is_looked_at(copied, signed):
    folder, key = copied
    resigned(folder, signed, schema=3)
    (found,) = problems(folder, key)
    assert found.startswith("dossier.json is of schema 3, and this verifier reads schema 2")


def test_a_run_in_parts_may_have_had_other_numbers_of_workers(copied, signed):
    folder, key = copied
    forged(folder, signed, told(7, "recipe", "compute", "workers"))
    assert problems(folder, key) == []


def test_privacy_of_another_clip_than_the_recipe_says_is_found(copied, signed):
    folder, key = copied
    forged(folder, signed, told(3.0, "privacy", "clip"))
    assert problems(folder, key) == ["result.json tells of another privacy than its recipe"]


def test_a_page_shows_no_second_verdict(copied, signed):
    folder, key = copied
    with (folder / "README.md").open("a") as page:
        page.write("\n**Verdict: indistinguishable from retraining.**\n")
    forged(folder, signed, lambda result: None)
    assert problems(folder, key) == ["README.md does not show the verdict of result.json"]


@pytest.mark.parametrize(
    ("event", "fact", "text"),
    [
        ("original ready", "sha256", "events.jsonl tells of another original.safetensors"),
        ("unlearned", "sha256", "events.jsonl tells of another model.safetensors"),
        ("unlearned", "plan", "events.jsonl tells of another plan.json"),
        ("thresholds fixed", "sha256", "events.jsonl tells of another thresholds.json"),
        ("run started", "data", "events.jsonl tells of other data or another verdict"),
    ],
)
def test_the_events_speak_of_the_files_that_are_there(copied, signed, event, fact, text):
    folder, key = copied
    in_events(folder, signed, lambda own: own["facts"].update({fact: "0"}) if own["event"] == event else None)
    assert problems(folder, key) == [text]


def test_the_events_speak_of_the_retrained_models_that_are_there(copied, signed):
    folder, key = copied
    in_events(
        folder,
        signed,
        lambda own: (
            own["facts"]["sha256"].update({"retrained-2": "0"}) if own["event"] == "retrained models ready" else None
        ),
    )
    assert problems(folder, key) == ["events.jsonl tells of another oracles/retrained-2.safetensors"]


def test_the_events_are_numbered(copied, signed):
    folder, key = copied
    in_events(folder, signed, lambda own: own.update(seq=own["seq"] + 1))
    assert "events.jsonl: line 1 does not follow from the one before" in problems(folder, key)


@pytest.mark.parametrize(
    "change",
    [told(None, "original", "accuracy", "forget_row_kept"), told(0.4, "original", "accuracy", "forget_row_kept")],
)
def test_u_of_the_original_is_told_once(copied, signed, change):
    folder, key = copied
    forged(folder, signed, change)
    assert problems(folder, key) == ["result.json tells two accuracies of the original"]
