"""The method from end to end, its files, and what happens when a run is killed."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, replace
from functools import partial as bound
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import classifier, files_of_at_most, logits, make_images, make_net, write_set
from fedunlearn.channels.plan import Cut, PruningPlan, prune
from fedunlearn.channels.scores import Ranking, contrast, random_scores
from fedunlearn.channels.stats import capped, mean_of_clients
from fedunlearn.checkpoint import load_weights, read_weights, save_checkpoint
from fedunlearn.console import describe, notes
from fedunlearn.data.images import joined
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.errors import DataError, EvidenceError, ModelError, PlanError, RecipeError, RunError
from fedunlearn.evidence.keys import make_keys
from fedunlearn.evidence.speedup import to_equal_r
from fedunlearn.evidence.verify import problems
from fedunlearn.federation import journal as journals
from fedunlearn.federation.about import asked
from fedunlearn.federation.averaging import Server
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import Reply
from fedunlearn.federation.journal import Journal, Step
from fedunlearn.federation.ledger import Cost, Entry
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import Repair, train_rounds
from fedunlearn.files import append_line
from fedunlearn.models import build_model
from fedunlearn.run.commands import evaluate_weights, run
from fedunlearn.run.compare import Plan, compare
from fedunlearn.run.experiment import new_model, prepare
from fedunlearn.run.kept import fill_kept, store, validation_unseen
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.references import Oracle, retrained_models
from fedunlearn.run.result import cost_blocks, cost_until, evaluate, knew, validation_block, whole_cost
from fedunlearn.training.sgd import Training, one_cycle
from fedunlearn.unlearn import unlearn


def without_seconds(value):
    """Drop wall-clock times, the only figures that may differ between two equal runs."""
    if isinstance(value, dict):
        return {key: without_seconds(v) for key, v in value.items() if key != "client_seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def trained():
    """A federation and a model that knows its four classes."""
    clients, validation = hold_out(partition(make_images(200, 4), by="dirichlet", clients=4, alpha=2.0), 0.2)
    engine = LocalEngine(clients, validation=validation)
    training = Training(lr=0.1, batch_size=8)
    model = train_rounds(make_net(classes=4), Federation(engine), training, rounds=8, server=Server(one_cycle))
    return model.module, engine


REPAIR = Repair(Training(lr=0.05, batch_size=8), rounds=2)


def forgotten(model, engine, *, forget=(2,), fraction=0.3, repair=REPAIR, jointly=False, seed=0, journal=None, **rank):
    """Unlearn with the settings of these tests, the changes given."""
    federation = Federation(engine, journal or Journal(), seed=seed)
    ranking = Ranking(**{"criterion": contrast, **rank})
    return unlearn(model, federation, forget=forget, cut=Cut(fraction), repair=repair, rank=ranking, jointly=jointly)


def test_unlearning_forgets_the_class_keeps_the_others_and_removes_channels_and_row(trained):
    model, engine = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = forgotten(model, engine, fraction=0.5)
    test = make_images(80, 4, seed=9)
    inputs = (test.images.float() / 255 - 0.3) / 0.25
    known = logits(model, inputs).argmax(1)
    named = torch.tensor(result.model.labels)[logits(result.model.module, inputs).argmax(1)]
    kept = test.labels != 2
    assert (known == test.labels).float().mean() > 0.95
    assert (named[kept] == test.labels[kept]).float().mean() > 0.9
    row_kept = logits(result.repaired.module, inputs).argmax(1)
    assert (row_kept[~kept] == 2).float().mean() <= 0.6  # from above 0.95; the net has 14 channels
    assert result.model.labels == (0, 1, 3)
    assert result.model.module[-1].weight.shape == (3, 4)  # half of the 8 channels, one row less
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert result.cost.rounds == 2
    assert result.cost.clients == 4


def test_the_plan_of_the_result_leads_from_the_architecture_to_the_shipped_shapes(trained):
    model, engine = trained
    result = forgotten(model, engine)
    shapes = {name: tensor.shape for name, tensor in prune(model, result.model.plan).state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in result.model.module.state_dict().items()}


def test_unlearning_repeats_bit_for_bit(trained):
    model, engine = trained
    one, two = (forgotten(model, engine, seed=5).model.module.state_dict() for _ in range(2))
    assert all(tensor.equal(two[name]) for name, tensor in one.items())


def test_several_classes_go_one_after_another_or_jointly(trained):
    model, engine = trained
    options = {"forget": [0, 2], "repair": replace(REPAIR, rounds=1)}
    in_turn, jointly = (forgotten(model, engine, jointly=own, **options).model for own in (False, True))
    assert in_turn.labels == jointly.labels == (1, 3)
    assert len(jointly.plan.pruned["0"]) <= 1  # floor(0.3 * 6)
    assert len(in_turn.plan.pruned["3"]) > len(jointly.plan.pruned["3"])  # a share of the channels for each class


def test_the_paper_s_mean_of_client_means_is_an_option(trained):
    model, engine = trained
    pooled, voted = forgotten(model, engine), forgotten(model, engine, pooling=mean_of_clients)
    assert int(pooled.stats.counts[2]) > 4 >= int(voted.stats.counts[2])


def test_repair_may_stop_at_a_target(trained):
    model, engine = trained
    result = forgotten(model, engine, repair=replace(REPAIR, rounds=9, target=0.5))
    assert result.cost.rounds < 9


def test_without_repair_the_pruned_model_keeps_its_weights(trained):
    model, engine = trained
    result = forgotten(model, engine, repair=replace(REPAIR, rounds=0, batch_norm=False))
    repaired = result.repaired.module.state_dict()
    assert all(t.equal(repaired[name]) for name, t in result.pruned.module.state_dict().items())


def test_pruning_the_right_channels_is_more_selective_than_pruning_at_random(trained):
    model, engine = trained
    test = make_images(80, 4, seed=9)
    inputs = (test.images.float() / 255 - 0.3) / 0.25
    of_class = test.labels == 2

    def retained_minus_forgotten(criterion):
        pruned = forgotten(model, engine, criterion=criterion, repair=replace(REPAIR, rounds=0)).pruned
        right = logits(pruned.module, inputs).argmax(1) == test.labels
        return float(right[~of_class].float().mean() - right[of_class].float().mean())

    chance = [retained_minus_forgotten(bound(random_scores, seed=seed)) for seed in range(5)]
    assert retained_minus_forgotten(contrast) > sum(chance) / 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"forget": [4]}, r"must lie in 0 \.\. 3, got 4"),
        ({"fraction": -0.1}, "fraction must be at least 0 and below 1, got -0.1"),
    ],
)
def test_bad_arguments_are_refused_before_a_client_is_asked(trained, change, text):
    model, engine = trained

    class Untouched:
        clients, shape, classes = engine.clients, engine.shape, engine.classes

        def run(self, job):
            raise AssertionError("a client was asked")

    with pytest.raises(PlanError, match=text):
        forgotten(model, Untouched(), **change)


def test_a_class_that_no_client_holds_cannot_be_forgotten(trained):
    model, _ = trained
    engine = LocalEngine(partition(make_images(80, 4).without([2]), by="iid", clients=2))
    with pytest.raises(PlanError, match="no client holds an image of class 2"):
        forgotten(model, engine)


def test_clients_left_with_nothing_are_not_asked_to_repair(trained):
    model, _ = trained
    engine = LocalEngine(partition(make_images(80, 4), by="bias", clients=4, bias=1.0))  # one class each
    journal = Journal()
    result = forgotten(model, engine, journal=journal)
    assert result.clients == ("client-0", "client-1", "client-3")
    for step in (*journal.steps("reestimate"), *journal.steps("repair")):
        assert step.entries[0].clients == result.clients
        assert step.entries[0].refused == {}


def test_a_run_writes_the_files_and_figures_it_promises(signed):
    out = signed / "plain"
    result = json.loads((out / "result.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "result.json",
        "original.safetensors",
        "model.safetensors",
        "stats.safetensors",
        "scores.safetensors",
        "maps.safetensors",
        "plan.json",
        "rounds.jsonl",
        "events.jsonl",
        "thresholds.json",
        "audits",
        "oracles",
        "retraining.json",
        "report.html",
        "report.md",
        "README.md",
    }
    assert {path.name for path in (signed / "run").iterdir()} - {path.name for path in out.iterdir()} == {
        "dossier.json",
        "dossier.sig",
        "verify.py",
    }
    assert set(result["controls"]) == {"original", "head_only", "pruned", "random", "finetune"}
    assert result["controls"]["random"]["cost"]["rounds"] == result["cost"]["unlearn"]["rounds"]
    assert result["recipe"]["data"]["path"] == "../set.npz"
    assert result["original"]["accuracy"]["retain"] > 0.9
    assert result["original"]["accuracy"]["forget"] > 0.9 > result["unlearned"]["accuracy"]["forget_row_kept"]
    assert result["unlearned"]["accuracy"]["retain"] > 0.9
    assert result["unlearned"]["parameters"] < result["original"]["parameters"]
    assert result["unlearned"]["macs"] < result["original"]["macs"]
    assert set(result["original"]["accuracy"]["per_class"]) == set(result["classes"])
    tuned, retrained = result["controls"]["finetune"], result["oracles"]["retrained-1"]
    assert tuned["cost"]["client_flops"] == pytest.approx(result["cost"]["unlearn"]["client_flops"], rel=0.1)
    assert retrained["accuracy"]["forget_row_kept"] == 0  # its row never saw an image of the class
    ratio = result["cost"]["retrain"]["client_flops"] / result["cost"]["unlearn"]["client_flops"]
    assert result["speedup"]["client_flops"] == ratio == result["retraining"]["retrained-1"]["speedup"]
    ratio = result["cost"]["retrain_whole"]["client_flops"] / result["cost"]["unlearn"]["client_flops"]
    assert result["speedup_whole"]["client_flops"] == ratio >= result["speedup"]["client_flops"]
    assert result["cost"]["retrain_whole"]["rounds"] == result["recipe"]["train"]["rounds"]
    for name in ("speedup", "speedup_whole"):
        assert set(result[name]) == {"client_flops", "client_samples", "rounds", "client_seconds", "bytes"}


def test_a_finished_run_is_read_back_and_another_is_refused(tmp_path):
    recipe = write_set(tmp_path)
    first = run(load_recipe(str(recipe)), tmp_path / "out", command="unlearn")
    assert run(load_recipe(str(recipe)), tmp_path / "out", command="unlearn") == first
    other = load_recipe(str(recipe), ["unlearn.fraction=0.4"])
    with pytest.raises(RunError, match=r"holds another run \(recipe.unlearn.fraction is 0.3 there, 0.4 here\)"):
        run(other, tmp_path / "out", command="unlearn")
    with pytest.raises(RunError, match=r"holds another run \(command is 'unlearn' there, 'run' here\)"):
        run(load_recipe(str(recipe)), tmp_path / "out")


def retrained(tmp_path, name, *overrides):
    """Return the first retrained model of a recipe with a shipped network, and the journal of making it."""
    recipe = load_recipe(str(write_set(tmp_path, model="small-cnn")), overrides)
    experiment = prepare(recipe)
    federation = experiment.federation(Journal(tmp_path / name))
    (oracle,) = retrained_models(experiment, federation, data="images", count=1).values()
    return experiment, oracle, (tmp_path / name / "rounds.jsonl").read_text().count(".retrain")


def test_the_retrained_model_is_kept_and_seconds_of_another_run_are_not_compared(tmp_path):
    experiment, first, trained = retrained(tmp_path, "one")
    _, second, trained_again = retrained(tmp_path, "two", "unlearn.fraction=0.2")  # on which it does not depend
    assert (first.cached, second.cached) == (False, True)
    assert (trained, trained_again) == (3, 0)
    assert second.steps == first.steps
    assert all(t.equal(first.model.module.state_dict()[n]) for n, t in second.model.module.state_dict().items())
    _, other, _ = retrained(tmp_path, "three", "train.lr=0.2")
    assert not other.cached
    unlearning = Cost.of([Entry("train", ("a",), samples=1, seconds=1.0, flops=1, bytes_up=1, bytes_down=1)])
    result = {
        "classes": list(experiment.splits.test.classes),
        "original": {"accuracy": {"forget_row_kept": 1.0}},
        "unlearned": {"validation": {"retain": 0.0}},
        "cost": {"unlearn": asdict(unlearning)},
    }
    ratios = [cost_blocks(experiment, {"retrained-1": oracle}, result)["speedup"] for oracle in (first, second)]
    assert ratios[1] == {name: ratio for name, ratio in ratios[0].items() if name != "client_seconds"}
    assert "client_seconds" in ratios[0]
    unseen = replace(first, steps=[replace(step, validation=None) for step in first.steps])  # of a folder of models
    assert cost_blocks(experiment, {"retrained-1": unseen}, result) == {}


class WithoutAnswer:
    """An engine of which one client never answers when it is asked to train."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def run(self, job):
        for reply in self.engine.run(job):
            silent = reply.client == "client-0" and job.task.kind == "train"
            yield Reply(reply.client, error="it gave no answer") if silent else reply


def test_a_model_that_a_client_had_no_part_in_is_not_kept_for_runs_in_which_it_has(tmp_path):
    experiment = prepare(load_recipe(str(write_set(tmp_path, model="small-cnn"))))
    lacking = replace(experiment, engine=WithoutAnswer(experiment.engine))
    seen = []
    for own in (lacking, experiment, experiment):
        (oracle,) = retrained_models(own, own.federation(Journal()), data="images", count=1).values()
        seen.append((oracle.cached, whole_cost(oracle.steps)["client_samples"]))
    assert [cached for cached, _ in seen] == [False, False, True]
    assert seen[0][1] < seen[1][1] == seen[2][1]


def test_copies_of_one_retrained_model_are_not_taken_for_several(tmp_path):
    _, oracle, _ = retrained(tmp_path, "one")
    for seed in (1, 2):
        store(tmp_path / "models" / f"retrained-{seed}.safetensors", oracle.model.module, oracle.steps)
    recipe = load_recipe(str(tmp_path / "tiny.toml"), [f'audit.models="{tmp_path / "models"}"', "model.name=small-cnn"])
    other = prepare(recipe)
    with pytest.raises(
        RunError, match=r"retrained-1 and retrained-2 are one model to the last weight, expected models"
    ):
        retrained_models(other, other.federation(Journal()), data="images", count=2)


def test_a_damaged_kept_model_is_trained_anew(tmp_path):
    _, first, _ = retrained(tmp_path, "one")
    (kept,) = Path(os.environ["FEDUNLEARN_CACHE"]).rglob("*.safetensors")
    kept.write_bytes(b"damaged")
    _, second, trained = retrained(tmp_path, "two")
    assert (second.cached, trained) == (False, 3)
    assert all(t.equal(first.model.module.state_dict()[n]) for n, t in second.model.module.state_dict().items())


def test_a_cache_that_cannot_be_written_is_said_once_and_costs_no_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDUNLEARN_CACHE", str(tmp_path / "file"))
    experiment = prepare(load_recipe(str(write_set(tmp_path, model="small-cnn")), ["train.rounds=1"]))
    made = retrained_models(experiment, experiment.federation(Journal()), data="images", count=2)
    assert list(made) == ["retrained-1", "retrained-2"]
    (said,) = [record.message for record in caplog.records if "cache" in record.message]
    assert said.startswith(f"{tmp_path / 'file'}: the cache of retrained models cannot be written (")
    assert said.endswith("): the run goes on without; set FEDUNLEARN_CACHE to a folder that can be written")


def test_a_kept_model_of_other_shapes_leaves_fresh_weights_as_they_were(tmp_path):
    _, first, _ = retrained(tmp_path, "one")
    (kept,) = Path(os.environ["FEDUNLEARN_CACHE"]).rglob("*.safetensors")
    state, steps = load_file(kept), json.dumps([json.loads(own.to_json()) for own in first.steps])
    state["linear.bias"] = torch.zeros(9)
    save_file({name: t + 1 for name, t in state.items()}, kept, {"steps": steps})
    _, second, trained = retrained(tmp_path, "two")
    assert (second.cached, trained) == (False, 3)
    assert all(t.equal(first.model.module.state_dict()[n]) for n, t in second.model.module.state_dict().items())


def without_test_images_of(label, folder):
    """Write the set without the test images of a class, and return its recipe."""
    recipe = write_set(folder)
    arrays = dict(np.load(folder / "set.npz"))
    kept = arrays["y_test"] != label
    np.savez(folder / "set.npz", **arrays | {"x_test": arrays["x_test"][kept], "y_test": arrays["y_test"][kept]})
    return str(recipe)


def test_what_a_run_has_no_images_for_is_left_out_of_its_result_and_does_not_stop_the_report(tmp_path):
    recipe = load_recipe(without_test_images_of(0, tmp_path), ["data.validation=0", "train.rounds=1"])
    asked_for = set()

    def listening(experiment):
        class Listening(LocalEngine):
            def run(self, job):
                asked_for.add(job.task.kind)
                return super().run(job)

        return Listening(experiment.clients)

    result = run(recipe, tmp_path / "out", engine=listening)
    assert "train" in asked_for
    assert "evaluate" not in asked_for  # each question costs a message to each client
    assert "speedup" not in result  # there is no validation image to measure with how good the model is
    assert "retrained-1" in result["oracles"]
    assert result["original"]["accuracy"]["per_class"]["0"] is None
    assert (tmp_path / "out" / "report.html").exists()


# Kills

KILLED = 77


def dying(work, append):
    """Do ``work`` in a forked child that ends within ``append``, the first time that a step gets its line.

    Return whether it did; otherwise the work is done.
    """
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED)
        return code == KILLED
    try:
        with pytest.MonkeyPatch.context() as patch:
            finish = Journal.finish

            def last(*arguments):
                patch.setattr(journals, "append_line", append)
                finish(*arguments)

            patch.setattr(Journal, "finish", last)
            work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def before_the_line(path, line):
    os._exit(KILLED)


def within_the_line(path, line):
    with path.open("ab") as file:
        file.write(line[: len(line) // 2])
    os._exit(KILLED)


def after_the_line(path, line, append=journals.append_line):
    append(path, line)
    os._exit(KILLED)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12 on
def test_a_run_that_is_killed_at_every_step_it_finishes_ends_with_the_same_files(tmp_path):
    short = ["train.rounds=2", "unlearn.rounds=1", "evidence.feature_maps=false"]
    recipe = load_recipe(str(write_set(tmp_path)), short)
    whole, out, kills = run(recipe, tmp_path / "whole"), tmp_path / "killed", 0
    for append in itertools.cycle((before_the_line, within_the_line, after_the_line)):
        if not dying(lambda: run(recipe, out), append):
            break
        kills += 1
        assert not (out / "result.json").exists()
    assert kills == len((out / "rounds.jsonl").read_text().splitlines()) - 1  # all but the header
    assert without_seconds(json.loads((out / "result.json").read_text())) == without_seconds(whole)
    for name in ("original.safetensors", "model.safetensors", "plan.json", "thresholds.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_process_that_is_killed_while_it_trains_goes_on_to_the_same_model(tmp_path):
    recipe = write_set(tmp_path, model="small-cnn")
    out, change = tmp_path / "killed", "train.rounds=20"
    command = ["train", "--recipe", str(recipe), "--out", str(out), "--quiet", "--set", change]
    process = subprocess.Popen([sys.executable, "-m", "fedunlearn", *command])
    deadline = time.monotonic() + 120
    while not (out / "rounds.jsonl").exists() or (out / "rounds.jsonl").read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "result.json").exists()
    for folder in (out, tmp_path / "whole"):
        run(load_recipe(str(recipe), [change]), folder, command="train")
    name = "original.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def step(round: int, phase: str = "train") -> Step:
    return Step(phase, round, (Entry("train", ("a",), samples=round),), 0.5)


def test_a_finished_folder_without_its_result_is_not_done_again_in_silence(signed, tmp_path):
    shutil.copytree(signed, tmp_path / "own")
    (tmp_path / "own" / "plain" / "result.json").unlink()
    settings = [
        f'data.path="{tmp_path / "own" / "set.npz"}"',
        'evidence.request="case 7"',
        "evidence.feature_maps=true",
    ]
    recipe = load_recipe(str(signed / "tiny.toml"), settings)
    with pytest.raises(RunError, match=r"the steps of train are there and state/train\.safetensors is not, as after"):
        run(recipe, tmp_path / "own" / "plain")


def test_a_journal_survives_a_line_cut_short_and_a_line_never_written(tmp_path):
    journal = Journal(tmp_path, header={"a": 1})
    for number in range(3):
        journal.finish(step(number), {"w": torch.tensor([float(number)])})
    lines = (tmp_path / "rounds.jsonl").read_text()
    for text in (lines[:-7], "".join(lines.splitlines(keepends=True)[:-1])):
        (tmp_path / "rounds.jsonl").write_text(text)
        again = Journal(tmp_path, header={"a": 1})
        assert again.steps("train") == [step(0), step(1), step(2)]
        assert again.state("train")["w"].tolist() == [2.0]
        assert (tmp_path / "rounds.jsonl").read_text() == lines
    assert Cost.of(again.entries("train")).client_samples == 3


def test_after_a_full_disk_the_same_journal_does_the_round_again(tmp_path):
    engine, training = LocalEngine(partition(make_images(120), by="iid", clients=2)), Training(0.1, 8)
    whole = train_rounds(make_net(), Federation(engine), training, rounds=3)
    fed = Federation(engine, Journal(tmp_path))
    train_rounds(make_net(), fed, training, rounds=1)
    with files_of_at_most(1000), pytest.raises(OSError, match=r"train\.safetensors"):
        train_rounds(make_net(), fed, training, rounds=3)
    again = train_rounds(make_net(), fed, training, rounds=3)
    assert len(fed.journal.steps("train")) == 3
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], tensor), name


def test_of_a_line_that_cannot_be_written_nothing_stays(tmp_path):
    path = tmp_path / "lines"
    append_line(path, b"one")
    with files_of_at_most(6), pytest.raises(OSError, match="lines"):
        append_line(path, b"two")
    assert path.read_bytes() == b"one\n"
    append_line(path, b"two")
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_journal_refuses_what_is_not_its_own(tmp_path):
    (tmp_path / "rounds.jsonl").write_text("something else\n")
    with pytest.raises(RunError, match=r"rounds.jsonl: expected the rounds of a run, but .*choose another --out"):
        Journal(tmp_path)
    (tmp_path / "rounds.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(RunError, match=r"rounds.jsonl: expected the rounds of a run"):
        Journal(tmp_path)
    (tmp_path / "rounds.jsonl").unlink()
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "film.part").write_text("half")
    with pytest.raises(RunError, match=r"holds files of something else \(notes.json\): choose another --out"):
        Journal(tmp_path)
    assert (tmp_path / "film.part").exists()


OTHER = """
import sys, time
from pathlib import Path
from fedunlearn.federation.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(100)
"""


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_folder_in_which_another_process_writes_is_refused_until_that_ends_in_whatever_way(tmp_path):
    Journal(tmp_path).finish(step(0), {"w": torch.zeros(1)})
    before = (tmp_path / "rounds.jsonl").read_bytes()
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open\n"
    with pytest.raises(RunError, match=rf"is being written by process {process.pid}: wait until it has ended, or cho"):
        Journal(tmp_path)
    assert (tmp_path / "rounds.jsonl").read_bytes() == before
    process.kill()
    process.wait()
    process.stdout.close()
    assert (tmp_path / "lock").read_text() == str(process.pid)  # what a kill leaves keeps nobody out
    journal = Journal(tmp_path)
    journal.finish(step(1), {"w": torch.zeros(1)})
    journal.leave()
    assert not (tmp_path / "lock").exists()


def test_of_two_journals_of_one_process_on_one_folder_the_newest_writes(tmp_path):
    one, two = Journal(tmp_path), Journal(tmp_path)
    with pytest.raises(RunError, match="another Journal of this process was opened on this folder since"):
        one.part("random").finish(step(0), {"w": torch.zeros(1)})
    two.finish(step(0), {"w": torch.zeros(1)})
    with pytest.raises(RunError, match="holds another run"):
        Journal(tmp_path, header={"a": 1})
    two.finish(step(1), {"w": torch.zeros(1)})  # the one that was refused took nothing
    del one
    assert (tmp_path / "lock").exists()
    del two
    assert not (tmp_path / "lock").exists()
    assert len(Journal(tmp_path).steps("train")) == 2


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / os.fsdecode(b"bad\xff name")
    with pytest.raises(
        RunError, match=r"bad\\xff name/run: expected the name of a folder in UTF-8: choose another --out"
    ):
        Journal(folder / "run")
    assert not folder.exists()


def test_a_damaged_state_is_named(tmp_path):
    journal = Journal(tmp_path)
    for number in range(3):
        journal.finish(step(number), {"w": torch.zeros(1)})
    state = tmp_path / "state" / "train.safetensors"
    old = state.read_bytes()
    state.write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"train.safetensors: expected the state of a phase, but"):
        Journal(tmp_path)
    state.write_bytes(old)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rounds.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(RunError, match=r"train.safetensors is that of round 2, rounds.jsonl has 1 rounds of train"):
        Journal(tmp_path)


def test_a_journal_in_memory_goes_on_too(trained):
    _, engine = trained
    training, federation = Training(lr=0.1, batch_size=8), Federation(engine)
    for rounds in (2, 4):
        parts = train_rounds(make_net(classes=4), federation, training, rounds=rounds)
    again = train_rounds(make_net(classes=4), federation, training, rounds=4)
    whole = train_rounds(make_net(classes=4), Federation(engine), training, rounds=4)
    assert len(federation.journal.steps("train")) == 4
    for model in (again, whole):
        assert all(t.equal(parts.module.state_dict()[name]) for name, t in model.module.state_dict().items())


@pytest.mark.parametrize("kept_in", ["memory", "folder"])
def test_a_journal_does_not_answer_another_request(trained, tmp_path, kept_in):
    model, engine = trained
    memory, asked = Journal(), []

    class Counting:
        clients, shape, classes = engine.clients, engine.shape, engine.classes

        def run(self, job):
            asked.append(job.task.kind)
            return engine.run(job)

    def journal():
        return memory if kept_in == "memory" else Journal(tmp_path / "runs")

    counting = Counting()
    first = forgotten(model, counting, journal=journal())
    again = forgotten(model, counting, journal=journal())
    assert asked == ["measure", "reestimate", "train", "train"]
    assert all(t.equal(first.model.module.state_dict()[name]) for name, t in again.model.module.state_dict().items())
    for change, differs in (
        ({"forget": (1,)}, r"forget is '\[2\]' there, '\[1\]' here"),
        ({"forget": (1, 2)}, r"forget is '\[2\]' there, '\[1, 2\]' here"),
        ({"fraction": 0.5}, r"cut is 'sha256 \w{16}' there, 'sha256 \w{16}' here"),
        ({"repair": replace(REPAIR, training=Training(lr=0.01, batch_size=8))}, "repair is"),
        ({"repair": replace(REPAIR, rounds=1)}, "repair is"),
        ({"repair": replace(REPAIR, batch_norm=False)}, "repair is"),
        ({"criterion": random_scores}, "criterion is"),
        ({"criterion": bound(random_scores, seed=1)}, "criterion is"),
        ({"hook": "convolution"}, "hook is"),
        ({"pooling": mean_of_clients}, "pooling is"),
        ({"sample": 5}, "sample is 'null' there, '5' here"),
        ({"jointly": True}, "jointly is 'false' there, 'true' here"),
        ({"seed": 3}, "seed is '0' there, '3' here"),
    ):
        expected = rf"holds measure-0, step 1, of another request \({differs}.*\): (use another|give each its own)"
        with pytest.raises(RunError, match=expected):
            forgotten(model, counting, journal=journal(), **change)
    with pytest.raises(RunError, match=r"measure-0, step 1, of another request \(weights is"):
        forgotten(make_net(classes=4, seed=9), counting, journal=journal())
    assert len(asked) == 4  # nobody was asked, nothing was lost
    assert len(journal().steps("repair")) == 2


def test_a_journal_goes_on_for_more_rounds_but_not_with_other_starting_weights_or_clients(trained):
    _, engine = trained
    training, federation = Training(lr=0.1, batch_size=8), Federation(engine)
    train_rounds(make_net(classes=4), federation, training, rounds=2, server=Server(one_cycle))
    for fed, seed, text in (
        (federation, 3, "weights is"),
        (federation.keeping(exclude=(1,)), 0, r"exclude is '\[\]' there, '\[1\]' here"),
        (federation.keeping(exclude=(), clients=("client-0",)), 0, "clients is"),
        (replace(federation, participation=0.5), 0, "participation is '1.0' there, '0.5' here"),
    ):
        with pytest.raises(RunError, match=f"this journal holds train, step 1, of another request.*{text}"):
            train_rounds(make_net(classes=4, seed=seed), fed, training, rounds=2, server=Server(one_cycle))
    with pytest.raises(RunError, match=r"step 1, of another request \(lr is"):  # the cycle of four rounds is another
        train_rounds(make_net(classes=4), federation, training, rounds=4, server=Server(one_cycle))
    with pytest.raises(RunError, match=r"this journal holds 2 steps of train, this request asks for 1: give each its"):
        train_rounds(make_net(classes=4), federation, training, rounds=1)


def test_a_journal_whose_steps_do_not_say_what_they_were_done_for_is_refused(tmp_path):
    Journal(tmp_path).finish(step(0), {"w": torch.zeros(1)})
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    del lines[1]["about"]
    old = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "rounds.jsonl").write_text(old)
    with pytest.raises(RunError, match=r"rounds.jsonl: its steps do not say .* 0.2.0: finish the run with the version"):
        Journal(tmp_path)
    assert (tmp_path / "rounds.jsonl").read_text() == old


def test_what_a_step_is_about_tells_models_and_functions_apart_and_is_the_same_in_every_process():
    assert asked(rounds=2, exclude=(1,), lr=0.1) == {"rounds": "2", "exclude": "[1]", "lr": "0.1"}
    assert asked(pooling=capped(2.0)) == asked(pooling=capped(2.0)) != asked(pooling=capped(3.0))
    assert asked(pooling=lambda parts: 1) != asked(pooling=lambda parts: 2)
    one, same, other = (asked(weights=classifier(make_net(seed=seed))) for seed in (0, 0, 1))
    assert one == same != other
    relu, gelu = classifier(make_net()), classifier(make_net())
    gelu.module[2] = torch.nn.GELU()
    assert asked(weights=relu) != asked(weights=gelu)
    half = classifier(make_net().to(torch.bfloat16))
    assert asked(weights=half) == asked(weights=half.copy()) != one


def test_the_model_before_can_be_pruned_again(tmp_path):
    recipe = str(write_set(tmp_path))
    first = run(load_recipe(recipe), tmp_path / "one", command="unlearn")
    original = f'model.weights="{tmp_path / "one" / "original.safetensors"}"'
    again = run(load_recipe(recipe, [original]), tmp_path / "three", command="unlearn")
    assert again["unlearned"] == first["unlearned"]


def test_a_model_with_other_rows_than_the_data_has_classes_is_refused(trained):
    _, engine = trained
    with pytest.raises(ModelError, match="the model has 3 output rows, the data 4 classes: say which class"):
        forgotten(make_net(classes=3), engine)


def checkpoint_of(model, path, *, colours=1, shortcut="A"):
    """Write ``model`` as one of grey images, or of others, and read the file."""
    kind = replace(make_images(4, 4, colours=colours), mean=(0.3,) * colours, std=(0.2,) * colours)
    save_checkpoint(path, model, images=kind, architecture={"name": "mine", "shortcut": shortcut})
    return read_weights(path)


def test_a_checkpoint_holds_weights_plan_label_map_and_normalisation(trained, tmp_path):
    model, engine = trained
    result = forgotten(model, engine)
    weights = checkpoint_of(result.model, tmp_path / "m.safetensors")
    assert weights.labels == (0, 1, 3)
    assert (weights.mean, weights.std, weights.shortcut) == ((0.3,), (0.2,), "A")
    again = load_weights(classifier(make_net(classes=4, seed=7)), weights)
    assert (again.labels, again.plan) == (result.model.labels, result.model.plan)
    example = torch.randn(3, 1, 8, 8)
    assert logits(again.module, example).equal(logits(result.model.module, example))


def test_weights_from_elsewhere_are_read(net, tmp_path):
    state = net.state_dict()
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}, "epoch": 3}, tmp_path / "w.pt")
    torch.save(state, tmp_path / "w.th")
    no_counters = {name: t.numpy() for name, t in state.items() if "num_batches" not in name}
    meta = np.frombuffer(b'{"normalise": {"mean": [0.1], "std": [0.2]}, "shortcut": "B"}', np.uint8)
    np.savez(tmp_path / "w.npz", meta=meta, **no_counters)
    for name in ("w.pt", "w.th", "w.npz"):
        weights = read_weights(tmp_path / name)
        loaded = load_weights(classifier(make_net(seed=4)), weights).module
        assert logits(loaded, torch.ones(1, 1, 8, 8)).equal(logits(net, torch.ones(1, 1, 8, 8)))
    assert (weights.mean, weights.std, weights.shortcut) == ((0.1,), (0.2,), "B")


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_weights_that_cannot_be_used_are_refused(net, tmp_path):
    with pytest.raises(ModelError, match=r"ending in .safetensors, .npz, .pt, .pth, .th, got '.onnx'"):
        read_weights(tmp_path / "w.onnx")
    with pytest.raises(ModelError, match="expected a file of weights, found none; check the path"):
        read_weights(tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="the weights cannot be read"):
        read_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.npz").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"expected an .npz of plain arrays"):
        read_weights(tmp_path / "w.npz")
    torch.save({"w": Planted(tmp_path / "planted")}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="the weights cannot be read"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "planted").exists()
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    with pytest.raises(ModelError, match="expected tensors by name, or a dictionary with them under one of its keys"):
        read_weights(tmp_path / "w.pt")


def test_weights_whose_names_or_shapes_differ_are_named(net, tmp_path):
    torch.save(make_net(classes=5).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"8.bias: the model has \(3,\), the file \(5,\): check model.name"):
        load_weights(classifier(net), read_weights(tmp_path / "w.pt"))
    torch.save(make_net(colours=3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        ModelError, match=r"0.weight: .*: the images have 1 colours and the weights are for 3 \(a folder"
    ):
        load_weights(classifier(net), read_weights(tmp_path / "w.pt"))
    torch.save({name: t for name, t in net.state_dict().items() if name != "3.bias"}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"3.bias: the model has \(8,\), the file no such tensor"):
        load_weights(classifier(net), read_weights(tmp_path / "w.pt"))
    torch.save(net.state_dict() | {"extra": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"extra: the model has no such tensor, the file \(1,\)"):
        load_weights(classifier(net), read_weights(tmp_path / "w.pt"))
    plan = PruningPlan({"0.weight": (9, 1, 3, 3)}, {"0.weight": {0: (1,)}})
    with pytest.raises(ModelError, match=r"m.safetensors: the plan is for 0.weight"):
        load_weights(
            classifier(net), checkpoint_of(classifier(net, plan=plan, labels=(0, 1, 2)), tmp_path / "m.safetensors")
        )


def test_weights_of_another_shortcut_or_colours_are_refused(tmp_path):
    recipe = str(write_set(tmp_path))
    net = build_model("nets:tiny", classes=4, colours=1)
    for change, text in (
        ({"shortcut": "B"}, "trained with shortcut B, the recipe has A: use --set model.shortcut=B"),
        ({"colours": 3}, "trained on images of 3 colours, the data has 1"),
    ):
        checkpoint_of(classifier(net), tmp_path / "m.safetensors", **change)
        weights = f'model.weights="{tmp_path / "m.safetensors"}"'
        with pytest.raises((RecipeError, ModelError), match=text):
            run(load_recipe(recipe, [weights]), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("alexnet", "model.name must be one of small-cnn, .* got 'alexnet'"),
        ("no.such:thing", "model.name 'no.such:thing': No module named 'no'; expected package.module:function"),
        ("json:loads", "model.name 'json:loads': .*called with classes= and colours="),
        ("json:dumps_", "model.name 'json:dumps_': module 'json' has no attribute 'dumps_'"),
        ("builtins:dict", "model.name 'builtins:dict': expected a torch.nn.Module, got dict"),
    ],
)
def test_models_that_cannot_be_built_are_refused(name, text):
    with pytest.raises(ModelError, match=text):
        build_model(name, classes=3, colours=1)
    with pytest.raises(ModelError, match=r"model.shortcut must be A or B, got 'C'"):
        build_model("resnet20", classes=3, colours=1, shortcut="C")


def test_a_model_that_still_names_the_class_is_said_not_to_have_forgotten(tmp_path):
    recipe = load_recipe(str(write_set(tmp_path)), ["unlearn.criterion=random", "unlearn.fraction=0.05"])
    result = run(recipe, tmp_path / "out", command="unlearn")
    kept = result["unlearned"]["accuracy"]["forget_row_kept"]
    assert kept > 0.1
    assert f"NOT FORGOTTEN: with its row kept, {100 * kept:.0f} % are named" in notes(result)
    result["unlearned"]["accuracy"]["forget_row_kept"] = 0.05
    assert "NOT FORGOTTEN" not in notes(result)


def test_that_the_original_never_knew_the_class_is_said_and_gives_no_speed_up(signed):
    result = json.loads((signed / "plain" / "result.json").read_text())
    assert knew(result["original"]["accuracy"], 4)
    result["original"]["accuracy"]["forget_row_kept"] = 0.25  # chance, of four classes
    assert not knew(result["original"]["accuracy"], 4)
    assert cost_blocks(None, result["oracles"], result) == {}
    del result["verdict"]  # as of the commands that audit nothing
    assert "THE ORIGINAL NEVER KNEW IT: it names 25 % of the class, no more than by chance." in notes(result)


def test_weights_that_were_trained_on_other_normalisation_are_measured_by_it(tmp_path):
    """A checkpoint of another tool says nothing of it, and by the statistics of the images here is another model."""
    path = str(write_set(tmp_path))
    train, test = make_images(120, 4), make_images(60, 4, seed=1)
    plain = replace(train, mean=(0.0,), std=(1.0,))
    fed = Federation(LocalEngine(partition(plain, by="iid", clients=3)))
    known = train_rounds(build_model("nets:tiny", classes=4, colours=1), fed, Training(0.1, 8), rounds=6)
    torch.save(known.module.state_dict(), tmp_path / "plain.pt")
    settings = [f'model.weights="{tmp_path / "plain.pt"}"', "data.mean=[0]", "data.std=[1]"]
    right = evaluate(known, replace(test, mean=(0.0,), std=(1.0,)), forget=2)["accuracy"]
    assert evaluate_weights(load_recipe(path, settings))["accuracy"]["retain"] == right["retain"]
    other = [settings[0], "data.mean=[1]", "data.std=[0.01]"]
    assert right["retain"] > evaluate_weights(load_recipe(path, other))["accuracy"]["retain"]
    said = [" ".join(describe(prepare(load_recipe(path, given))).split()) for given in (settings, settings[:1], [])]
    assert "pixels are normalised by mean 0 and deviation 1, as data.mean and data.std say" in said[0]
    assert "as the weights name none: where they were trained on others, set data.mean and data.std" in said[1]
    assert ", of the training images 3 clients" in said[2]
    with pytest.raises(RecipeError, match=r"data.mean and data.std, a number per colour of each: .*mean"):
        prepare(load_recipe(path, ["data.mean=[0.5, 0.5]", "data.std=[1]"]))
    save_checkpoint(tmp_path / "told.safetensors", known, images=plain, architecture={"name": "nets:tiny"})
    told = [f'model.weights="{tmp_path / "told.safetensors"}"', "data.mean=[0.5]", "data.std=[1]"]
    with pytest.raises(
        RecipeError, match=r"normalised by \(0.0,\) and \(1.0,\), and data.mean and data.std are \(0.5,\)"
    ):
        prepare(load_recipe(path, told))
    assert "as the file of the weights says" in describe(prepare(load_recipe(path, told[:1])))


def test_u_of_several_classes_on_validation_images_is_the_mean_over_them(tmp_path):
    """As on test images: a rare class does not vanish among the images of a frequent one."""
    experiment = prepare(load_recipe(str(write_set(tmp_path)), ["unlearn.forget=[2, 3]", "data.validation=0.2"]))
    few = {
        name: images.take(((images.labels != 3) | (torch.arange(len(images)) % 3 == 0)).nonzero().flatten())
        for name, images in experiment.validation.items()
    }
    engine = LocalEngine(experiment.clients, validation=few, rules=experiment.recipe.rules())
    experiment = replace(experiment, validation=few, engine=engine)
    held = joined(few.values())
    counts = held.counts()
    assert 0 < counts[3] < counts[2]
    model = experiment.model.copy()
    head = [layer for layer in model.module.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.eye(4)[3])  # everything is of class 3
    assert validation_block(experiment, model, model)["forget_row_kept"] == 0.5
    without = validation_block(experiment, model, None)
    assert without == {"forget_row_kept": None, "retain": 0.0}


def test_what_settings_are_chosen_by_is_counted_on_validation_images_alone(tmp_path):
    experiment = prepare(load_recipe(str(write_set(tmp_path))))
    model = experiment.model  # fresh: it names some images right and others wrong
    held = joined(experiment.validation.values())
    inputs = (held.images.float() / 255 - held.mean[0]) / held.std[0]
    right = logits(model.module, inputs).argmax(1) == held.labels
    of_class = held.labels == 2
    whole = validation_block(experiment, model, model)
    assert whole["forget_row_kept"] == pytest.approx(float(right[of_class].double().mean()))
    without = validation_block(experiment, model.without_rows((2,)), model)
    rows = logits(model.module, inputs)[:, [0, 1, 3]].argmax(1)
    slow = (torch.tensor([0, 1, 3])[rows] == held.labels)[~of_class].double().mean()
    assert without["retain"] == pytest.approx(float(slow))
    on_test = evaluate(model.without_rows((2,)), experiment.splits.test, forget=2)["accuracy"]["retain"]
    assert without["retain"] != on_test


def test_the_speed_up_is_that_beside_every_retrained_model():
    """By hand: 30 operations, where one model is at R .8 after 60 of 120, one after 90, and one never is."""
    result = {
        "classes": ["cat", "dog"],
        "original": {"accuracy": {"forget_row_kept": 1.0}},
        "unlearned": {"validation": {"retain": 0.8}},
        "cost": {"unlearn": asdict(Cost(rounds=1, client_flops=30, client_samples=1))},
        "recipe": {"train": {"rounds": 4}},
    }
    rights = {"retrained-1": (0.1, 0.8, 0.7, 0.9), "retrained-2": (0.0, 0.0, 0.85, 0.2), "retrained-3": (0.79,) * 4}
    oracles = {
        name: Oracle(
            None, [Step("retrain", k, (Entry("train", ("a",), flops=30),), r) for k, r in enumerate(own)], True
        )
        for name, own in rights.items()
    }
    experiment = SimpleNamespace(weights=None)
    result |= cost_blocks(experiment, oracles, result)
    assert {name: own["client_flops"] for name, own in result["retraining"].items()} == dict(zip(rights, (60, 90, 120)))
    assert [own["speedup"] for own in result["retraining"].values()] == [2, 3, 4]
    assert [own["reached"] for own in result["retraining"].values()] == [True, True, False]
    assert result["retraining"]["retrained-2"]["curve"] == [(30, 0.0), (60, 0.0), (90, 0.85), (120, 0.2)]
    found = to_equal_r(result)
    assert (found.mean, found.lowest, found.highest, found.models, found.late) == (3, 2, 4, 3, 1)
    assert (found.bound, found.beside) == ("> ", "2.0 to more than 4.0 beside each of 3 retrained models")
    said = " ".join(notes(result | {"forget": [1]}).split())
    assert "ratio of GFLOP, 2.0 to more than 4.0 beside each of 3 retrained models; with all rounds 4.0x." in said
    assert "1 of 3 retrained models was never as good as the unlearned model in 4 rounds: > is a lower bound." in said
    assert (found.whole, found.never) == (4, "1 of 3 retrained models was never")
    assert cost_blocks(experiment, oracles, result | {"cost": {"unlearn": asdict(Cost())}}) == {}
    assert to_equal_r({"classes": []}) is None
    of_one = to_equal_r(result | {"retraining": {"retrained-3": result["retraining"]["retrained-3"]}})
    assert (of_one.bound, of_one.range, of_one.beside) == ("> ", "", "beside one retrained model")
    assert of_one.never == "Retraining was never"
    alike = to_equal_r(result | {"retraining": dict.fromkeys("abc", result["retraining"]["retrained-1"])})
    assert (alike.range, alike.beside, alike.never) == ("", "beside each of 3 retrained models", "")


def test_a_round_that_nobody_looked_at_is_as_good_as_nothing():
    steps = [Step("retrain", k, (Entry("train", ("a",), flops=30),), r) for k, r in enumerate((None, 0.0, None, 0.5))]
    assert cost_until(steps, 0.0)["client_flops"] == 60
    assert cost_until(steps, 0.1)["client_flops"] == 120
    assert cost_until(steps, 0.6) == whole_cost(steps) | {"reached": False}


def test_a_speed_up_that_is_a_bound_is_said_to_be_one(signed):
    result = json.loads((signed / "plain" / "result.json").read_text())
    assert "lower bound" not in notes(result)
    result["retraining"]["retrained-1"]["reached"] = result["cost"]["retrain"]["validation_unseen"] = False
    assert "> is a lower bound" in notes(result)
    assert "may have seen the validation images" in notes(result)
    result["privacy"] |= {"epsilon": 6.571, "delta": 1e-5}
    assert "Noise: epsilon 6.57 at delta 1e-05, of one image in what was measured." in notes(result)
    assert "fedunlearn run, with the same" in notes({name: own for name, own in result.items() if name not in LATER})
    assert "To compare with retraining: audit.oracles = 5." in notes(
        {name: own for name, own in result.items() if name not in LATER} | {"oracles": {}}
    )


LATER = ("cost", "oracles", "speedup", "speedup_whole", "verdict")


def test_several_classes_are_forgotten_audited_signed_and_verified(tmp_path):
    make_keys(tmp_path / "operator")
    recipe = load_recipe(str(write_set(tmp_path, oracles=3)), ["unlearn.forget=[1,2]", "train.rounds=2"])
    result = run(recipe, tmp_path / "out", key=tmp_path / "operator")
    assert problems(tmp_path / "out", tmp_path / "operator.pub") == []
    outputs = json.loads((tmp_path / "out" / "audits" / "unlearned.json").read_text())["details"]["neighbours"][
        "output"
    ]
    assert [len(own) for own in outputs] == [2, 2]  # of each forgotten class, over the kept ones
    assert not (tmp_path / "out" / "scores.safetensors").exists()  # they would be those of the last class alone
    assert read_weights(tmp_path / "out" / "model.safetensors").labels == (0, 3)
    assert set(result["controls"]) == {"original", "head_only", "pruned", "random", "finetune"}
    other = tmp_path / "other"
    make_keys(other)
    with pytest.raises(EvidenceError, match=r"its report names the key .* as the one that signs it, got the key"):
        run(recipe, tmp_path / "out", key=other)
    run(recipe, tmp_path / "out", key=tmp_path / "operator")  # a finished run is signed again
    assert problems(tmp_path / "out", tmp_path / "operator.pub") == []


def test_a_run_that_cannot_be_audited_is_refused_before_any_work(tmp_path):
    recipe = load_recipe(without_test_images_of(2, tmp_path))
    with pytest.raises(DataError, match=r"the test images hold none of class 2"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / "original.safetensors").exists()


@pytest.mark.parametrize("engine", ["flower", "flwoer"])
def test_a_run_in_python_needs_the_engine_that_its_recipe_names(tmp_path, engine):
    recipe = load_recipe(str(write_set(tmp_path)), [f"federation.engine={engine}"])
    with pytest.raises(RecipeError, match=rf"federation.engine is '{engine}': give run\(\) the engine"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_models_of_a_run_give_it_again_and_are_not_trained_again(signed, tmp_path):
    path, whole = str(signed / "tiny.toml"), signed / "plain"
    first = json.loads((whole / "result.json").read_text())
    models = [f'audit.models="{whole}"', f'model.weights="{whole / "original.safetensors"}"']
    again = run(load_recipe(path, models), tmp_path / "again")
    for name in ("original", "pruned", "unlearned", "audits", "verdict", "controls"):
        assert without_seconds(again[name]) == without_seconds(first[name])
    assert again["speedup"]["client_flops"] == first["speedup"]["client_flops"]
    assert again["cost"]["retrain"]["validation_unseen"]
    assert again["cost"]["retrain"]["clients"] == 3
    assert ".retrain" not in (tmp_path / "again" / "rounds.jsonl").read_text()
    other = run(load_recipe(path, [*models, "unlearn.seed=5"]), tmp_path / "other", command="unlearn")
    assert other["original"] == first["original"]
    assert run(load_recipe(path, models), tmp_path / "third", command="unlearn")["pruned"] == first["pruned"]
    again, other = (tmp_path / name / "model.safetensors" for name in ("again", "other"))
    assert again.read_bytes() != other.read_bytes()


def test_a_folder_of_models_gives_what_that_of_a_run_gives(signed, tmp_path):
    recipe, run_folder = str(signed / "tiny.toml"), signed / "plain"
    found = []
    for folder in (run_folder, tmp_path):
        experiment = prepare(load_recipe(recipe, [f'audit.models="{folder}"']))
        model = new_model(experiment.recipe, experiment.splits.train, seed=1)
        steps = fill_kept(model, experiment, seed=1)
        found.append((steps, model.module.state_dict()))
        store(tmp_path / "retrained-1.safetensors", model.module, steps)
    (steps, state), (same_steps, same_state) = found
    assert len(steps) == 3
    # A version that counted otherwise made no network cost more.
    old = [replace(step, entries=tuple(replace(own, flops=4 * own.flops) for own in step.entries)) for step in steps]
    store(tmp_path / "retrained-1.safetensors", model.module, old)
    assert cost_until(fill_kept(model, experiment, seed=1), 2.0) == cost_until(steps, 2.0)
    assert steps == same_steps
    assert all(tensor.equal(same_state[key]) for key, tensor in state.items())
    # The retrained models are handed out: nothing in them tells of the clients.
    assert b"client-0" not in (run_folder / "oracles" / "retrained-1.safetensors").read_bytes()


def test_whether_an_original_may_have_seen_validation_images_is_what_the_run_said_that_had_it(signed, tmp_path):
    recipe, folder = str(signed / "tiny.toml"), tmp_path / "run"
    shutil.copytree(signed / "plain", folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.copy(folder / "original.safetensors", tmp_path)

    def unseen(weights, models=folder):
        settings = [f'audit.models="{models}"'] if models else []
        settings += [f'model.weights="{weights}"'] if weights else []
        return validation_unseen(prepare(load_recipe(recipe, settings)))

    assert unseen(None)
    assert unseen(folder / "original.safetensors")
    assert not unseen(folder / "original.safetensors", models=None)
    assert not unseen(tmp_path / "elsewhere" / "original.safetensors")
    assert unseen(tmp_path / "original.safetensors", models=tmp_path)  # a folder of models
    result = json.loads((folder / "result.json").read_text())
    result["cost"]["retrain"]["validation_unseen"] = False
    (folder / "result.json").write_text(json.dumps(result))
    assert not unseen(folder / "original.safetensors")


def test_retrained_models_of_a_network_that_was_edited_are_refused(signed, tmp_path):
    recipe, folder = str(signed / "tiny.toml"), tmp_path / "run"
    shutil.copytree(signed / "plain", folder)
    lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    assert list(header["network"]) == ["nets:tiny"]
    header["network"]["nets:tiny"] = "0" * 64  # another activation, say: the weights fit
    (folder / "rounds.jsonl").write_text(json.dumps(header) + "\n" + "".join(lines[1:]))
    with pytest.raises(RunError, match=r"its models were retrained by another recipe \(model differ\)"):
        run(load_recipe(recipe, [f'audit.models="{folder}"']), tmp_path / "out")


def test_a_retrained_model_that_was_not_kept_is_asked_for_by_name(tmp_path):
    recipe = load_recipe(str(write_set(tmp_path)), [f'audit.models="{tmp_path}"', "train.rounds=1"])
    with pytest.raises(RunError, match=r"retrained-1.safetensors: expected a retrained model with its rounds"):
        run(recipe, tmp_path / "out")


def test_retrained_models_of_another_request_or_recipe_are_refused_before_any_work(signed, tmp_path):
    recipe, folder, out = str(signed / "tiny.toml"), signed / "plain", tmp_path / "out"
    models = [f'audit.models="{folder}"', f'model.weights="{folder / "original.safetensors"}"']
    arrays = dict(np.load(signed / "set.npz"))
    np.savez(tmp_path / "set.npz", **arrays | {"x_test": arrays["x_test"][::-1]})
    for change, name in (
        ("unlearn.forget=1", "unlearn.forget"),
        ("train.rounds=4", "train"),
        ("data.validation=0.4", "data"),
        ("federation.seed=5", "federation"),
        (f'data.path="{tmp_path / "set.npz"}"', "data"),
        ("model.shortcut=B", "model"),
    ):
        given = models[:1] if name == "model" else models  # weights say what their network is
        with pytest.raises(RunError, match=rf"its models were retrained by another recipe \({name} differ\)"):
            run(load_recipe(recipe, [*given, change]), out)
    text = (
        r"plain: its models were retrained in float32, and this run computes in bfloat16: ask for --precision float32"
    )
    with pytest.raises(RunError, match=text):
        run(load_recipe(recipe, [*models, "compute.precision=bfloat16"]), out)
    with pytest.raises(RunError, match=r"its models were retrained by another recipe \(train differ\)"):
        compare(load_recipe(recipe, [*models, "train.rounds=4"]), out, Plan(("finetune",), 1))
    known = tmp_path / "models"
    known.mkdir()
    experiment = prepare(load_recipe(recipe, models))
    model = new_model(experiment.recipe, experiment.splits.train, seed=1)
    store(known / "retrained-1.safetensors", model.module, fill_kept(model, experiment, seed=1))
    models[0] = f'audit.models="{known}"'
    text = r"retrained-1.safetensors names a class to forget in .* % of its test images, so it was not retrained"
    with pytest.raises(RunError, match=text):
        run(load_recipe(recipe, [*models, "unlearn.forget=1"]), out)
    assert not out.exists()


def test_a_run_that_is_not_finished_or_of_another_version_gives_no_models(signed, tmp_path):
    recipe = load_recipe(str(signed / "tiny.toml"), [f'audit.models="{tmp_path / "run"}"'])
    shutil.copytree(signed / "plain", tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"recipe": {"of": "another version"}}))
    with pytest.raises(RunError, match=r"result.json is that of another version of fedunlearn: leave audit"):
        run(recipe, tmp_path / "out")
    path.unlink()
    with pytest.raises(RunError, match=r"expected the folder of a finished run, but there is no result.json"):
        run(recipe, tmp_path / "out")


def test_a_model_has_so_many_multiply_adds_an_image_and_parameters():
    """A convolution of 3 x 3 from 1 to 4 channels on 8 x 8 pixels, and a layer of 256 inputs and 3 outputs."""
    layers = [torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 3)]
    found = evaluate(torch.nn.Sequential(*layers), make_images(30), forget=2)
    assert (found["macs"], found["parameters"]) == (9 * 4 * 64 + 256 * 3, 9 * 4 + 4 + 256 * 3 + 3)


@pytest.mark.parametrize(
    ("settings", "controls"),
    [
        (["unlearn.forget=[1, 2]"], ["original", "head_only", "pruned", "random", "finetune", "erase_only"]),
        (["unlearn.fraction=0"], ["original", "head_only", "finetune"]),
    ],
)
def test_a_run_that_erases_has_the_controls_that_differ_and_is_verified(tmp_path, settings, controls):
    from fedunlearn.evidence.keys import make_keys
    from fedunlearn.evidence.verify import problems

    erasing = ["erase.complement=1", "erase.separation=0.05", "erase.until=0.5", "unlearn.rounds=2", "audit.oracles=2"]
    recipe = load_recipe(str(write_set(tmp_path)), [*erasing, *settings, "evidence.feature_maps=false"])
    make_keys(tmp_path / "operator")
    result = run(recipe, tmp_path / "out", key=tmp_path / "operator")
    assert list(result["controls"]) == controls
    assert problems(tmp_path / "out", tmp_path / "operator.pub") == []
    if "erase_only" in controls:
        assert result["controls"]["erase_only"]["parameters"] > result["unlearned"]["parameters"]
        assert (result["controls"]["erase_only"]["cost"]["rounds"]) == 2
    text = (tmp_path / "out" / "report.md").read_text()
    assert ("erase step, nothing pruned" in text) == ("erase_only" in controls)
