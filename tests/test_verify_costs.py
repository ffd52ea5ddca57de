"""The verifier: rounds, costs, classes and the choice of a cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.evidence import verify
from fedunlearn.evidence.verify import problems
from fedunlearn.methods.table import METHODS
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe
from fedunlearn.smallest import FRACTIONS, MOST
from forgery import altered, asked_for, exchanged, forged, in_rounds, told, without

values = st.floats(0, 1)


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


def test_the_dossier_names_the_classes_whose_rows_are_gone(copied, signed):
    folder, key = copied
    forged(folder, signed, exchanged("0", "2"))
    found = problems(folder, key)
    assert json.loads((folder / "dossier.json").read_text())["scope"]["forgotten"] == ["0"]
    for name in ("original", "model", "oracles/retrained-4"):
        assert f"{name}.safetensors has output rows of other classes than result.json tells" in found


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


@pytest.mark.parametrize("unit", ["client_samples", "client_flops", "bytes_up", "bytes_down"])
def test_each_cost_of_unlearning_is_added_up(copied, signed, unit):
    folder, key = copied
    forged(folder, signed, told(7, "cost", "unlearn", unit))
    assert f"the cost of unlearning, {unit}, does not follow from rounds.jsonl" in problems(folder, key)


def test_images_of_a_retrained_model_are_those_of_retraining_json(copied, signed):
    folder, key = copied
    forged(folder, signed, told(10**6, "retraining", "retrained-2", "client_samples"))
    assert problems(folder, key) == ["the cost of retraining of retrained-2 does not follow from retraining.json"]


@pytest.mark.parametrize("unit", ["flops", "bytes_up", "bytes_down"])
def test_every_count_of_a_retrained_model_is_that_of_its_rounds(copied, signed, unit):
    folder, key = copied
    kept = json.loads((folder / "retraining.json").read_text())
    kept["retrained-2"][0]["entries"][0][unit] += 1
    (folder / "retraining.json").write_text(json.dumps(kept))
    forged(folder, signed, lambda result: None)
    assert "the rounds of retrained-2 in retraining.json are not those of rounds.jsonl" in problems(folder, key)


def test_what_was_measured_of_a_retrained_model_is_that_of_its_rounds(copied, signed):
    folder, key = copied
    kept = json.loads((folder / "retraining.json").read_text())
    kept["retrained-2"][1]["validation"] = 0.5
    (folder / "retraining.json").write_text(json.dumps(kept))
    forged(folder, signed, lambda result: None)
    assert "the rounds of retrained-2 in retraining.json are not those of rounds.jsonl" in problems(folder, key)


def test_steps_in_another_order_are_found(copied, signed):
    folder, key = copied

    def turned(steps):
        places = [place for place, step in enumerate(steps) if step["phase"] == "repair"]
        steps[places[0]], steps[places[1]] = steps[places[1]], steps[places[0]]
        return steps

    in_rounds(folder, turned)
    forged(folder, signed, lambda result: None)
    assert "rounds.jsonl: the steps of repair are not numbered one after another" in problems(folder, key)


def test_a_speed_up_is_that_of_the_costs_to_four_digits(copied, signed):
    folder, key = copied
    own = json.loads((folder / "result.json").read_text())["retraining"]["retrained-3"]["speedup"]
    forged(folder, signed, told(1.005 * own, "retraining", "retrained-3", "speedup"))
    assert problems(folder, key) == ["the speed-up beside retrained-3 does not follow from the costs"]


def test_a_dossier_counts_clients_refusals_and_bytes_of_a_step_by_hand():
    entry = {"clients": ["a", "b"], "refused": ["c"], "bytes_up": 5, "bytes_down": 7}
    other = {"clients": ["b"], "refused": ["c", "d"], "bytes_up": 10, "bytes_down": 20}
    assert verify.rounds([{"phase": "repair", "round": 3, "entries": [entry, other]}]) == [
        {"phase": "repair", "round": 3, "clients": 2, "refused": 3, "bytes_up": 15, "bytes_down": 27}
    ]
    files = {"original.safetensors": "0", "model.safetensors": "1"}
    assert verify.models({}, files) == {"before": "0", "after": "1"}
