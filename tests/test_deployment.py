"""A real Flower deployment on loopback, HTTPS and registered keys, and Flower's simulation: the same model."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from deployment import Deployment, make_certificates, make_node_key
from safetensors.torch import load_file

from fedunlearn.errors import FederationError
from fedunlearn.flower.launch import SuperLink, run_on
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe

pytestmark = pytest.mark.timeout(900)
SETTINGS = ("federation.clients=3", "train.rounds=2", "unlearn.rounds=1")
SMALLEST = "federation.clients=3 train.rounds=1"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("deployment") / "sites")
    with deployment:
        yield deployment
    assert deployment.processes() == {}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    run(load_recipe("digits", SETTINGS), out, command="unlearn")
    return out


def command(out, *options, settings=SETTINGS):
    settings = [part for setting in settings for part in ("--set", setting)]
    program = str(Path(sys.executable).with_name("fedunlearn"))
    return [program, "unlearn", "--recipe", "digits", *settings, "--out", str(out), "--json", *options]


def start(arguments):
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def assert_same_run(out, local):
    ours, theirs = load_file(out / "model.safetensors"), load_file(local / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours) <= 1e-6
    assert (out / "plan.json").read_text() == (local / "plan.json").read_text()
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, local)]
    for name in ("original", "pruned", "unlearned"):
        assert results[0][name] == results[1][name]


@pytest.mark.sites
def test_the_simulation_makes_the_same_model_as_one_process(tmp_path, local):
    out = tmp_path / "run"
    done = subprocess.run(command(out, "--engine", "flower-simulation"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"]["name"] == "flower-simulation"
    assert_same_run(out, local)


@pytest.mark.sites
def test_secure_aggregation_in_the_simulation_prunes_the_same_channels(tmp_path, local):
    out = tmp_path / "run"
    secure = ("--engine", "flower-simulation", "--set", "privacy.secure=true")
    done = subprocess.run(command(out, *secure), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(out, local)
    assert json.loads(done.stdout)["privacy"]["secure"] is True


def phases(out):
    return [json.loads(line)["phase"] for line in (out / "rounds.jsonl").read_text().splitlines()[1:]]


def test_a_deployment_makes_the_same_model_as_one_process(tmp_path):
    # Each message starts a process that imports torch: two sites, one drawn in a round, none asked for validation.
    few = ("federation.clients=2", "federation.participation=0.5", "data.validation=0", "train.rounds=1")
    settings, local, out = (*few, "unlearn.rounds=1"), tmp_path / "local", tmp_path / "run"
    run(load_recipe("digits", settings), local, command="unlearn")
    with Deployment(tmp_path / "sites", nodes=2) as sites:
        options = ("--engine", "flower", "--superlink", sites.address, "--ca", str(sites.ca))
        done = subprocess.run(command(out, *options, settings=settings), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "training the original: done" in done.stderr
        assert_same_run(out, local)
        assert phases(out) == ["train", "measure-0", "reestimate", "repair"]
    assert sites.processes() == {}


@pytest.mark.sites
def test_a_run_whose_server_was_killed_goes_on_and_makes_the_same_model(tmp_path, sites, local):
    out = tmp_path / "run"
    options = ("--engine", "flower", "--superlink", sites.address, "--ca", str(sites.ca))
    with start(command(out, *options)) as first:
        while first.poll() is None and finished(out) < 1:
            time.sleep(0.2)
        sites.kill("superlink")
        _, said = first.communicate()
    assert first.returncode == 1
    assert "fedunlearn: flwr list on" in said
    assert not (out / "result.json").exists()
    sites.start_superlink()
    again = subprocess.run(command(out, *options), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "training the original: done" in again.stderr
    assert_same_run(out, local)
    assert phases(out) == ["train", "train", "measure-0", "reestimate", "repair"]


@pytest.mark.sites
def test_secure_aggregation_over_real_sites_prunes_the_same_channels(tmp_path, sites, local):
    out = tmp_path / "run"
    options = ("--engine", "flower", "--superlink", sites.address, "--ca", str(sites.ca))
    options += ("--set", "privacy.secure=true", "--precision", "auto")
    done = subprocess.run(command(out, *options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["compute"]["precision"] == "float32"
    assert_same_run(out, local)
    rows = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()[1:]]
    (measured,) = [row["entries"][0] for row in rows if row["phase"] == "measure-0"]
    assert (measured["clients"], measured["refused"]) == (["client-0", "client-1", "client-2"], {})


def finished(out):
    path = out / "rounds.jsonl"
    return path.read_text().count('"phase": "train"') if path.exists() else 0


@pytest.mark.sites
def test_a_simulation_whose_ray_fails_is_told_at_once(tmp_path):
    began = time.monotonic()
    done = subprocess.run(
        command(tmp_path / "run", "--engine", "flower-simulation"),
        env=os.environ | {"RAY_TMPDIR": "/proc/nowhere"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "fedunlearn: Flower's simulation failed: FileNotFoundError: " in done.stderr
    assert time.monotonic() - began < 120  # imports; the patience with Ray is 300


@pytest.mark.sites
def test_a_site_killed_in_the_middle_of_a_round_is_missed_and_comes_back(tmp_path, sites):
    out = tmp_path / "run"
    options = ("--engine", "flower", "--superlink", sites.address, "--ca", str(sites.ca))
    options += ("--set", "federation.deadline=60")
    with start(command(out, *options)) as process:
        while process.poll() is None and finished(out) < 1:
            time.sleep(0.1)
        while process.poll() is None and not sites.busy(2):
            time.sleep(0.05)
        sites.kill("node-2")
        _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    first, second = (json.loads(line)["entries"][0] for line in (out / "rounds.jsonl").read_text().splitlines()[1:3])
    assert first["refused"] == {}
    assert second["clients"] == ["client-0", "client-1"]
    assert second["refused"]["client-2"] in (
        "it is no longer connected",
        "it gave no answer before its message expired",
        "it gave no answer within 60 s",
    )
    sites.revive_node(2)


@pytest.mark.sites
def test_a_run_that_fails_on_the_server_says_why(tmp_path, sites):
    recipe = load_recipe("digits", (*SETTINGS, "federation.clients=7", "federation.engine=flower"))
    said = []
    with pytest.raises(FederationError) as error:
        run_on(
            SuperLink(sites.address, sites.ca),
            recipe,
            tmp_path / "run",
            command="train",
            patience=1.0,
            tell=said.append,
        )
    assert "ended as finished:failed: only 3 of 7 clients were there after 1 s, expected at least half" in str(
        error.value
    )
    assert any("7 clients" in line for line in said)


@pytest.mark.sites
def test_the_example_app_runs_as_its_readme_says(tmp_path, sites):
    out = tmp_path / "run"
    status, log = sites.run_app(ROOT / "examples" / "flower", out=str(out), command="train", set=SMALLEST)
    assert status == "finished:completed", log
    assert (out / "original.safetensors").exists()
    assert "training the original: done" in log


@pytest.mark.sites
def test_an_app_that_was_there_forgets_with_a_mod_and_one_call(tmp_path, sites):
    status, log = sites.run_app(ROOT / "examples" / "flower-existing-app", **{"out": str(tmp_path), "num-rounds": 2})
    assert status == "finished:completed", log
    original = torch.load(tmp_path / "original.pt", weights_only=True)
    unlearned = load_file(tmp_path / "unlearned.safetensors")
    assert unlearned["0.weight"].shape[0] < original["0.weight"].shape[0] == 16
    assert original["8.weight"].shape[0] == 10
    assert unlearned["8.weight"].shape[0] == 9


@pytest.mark.sites
def test_nodes_with_a_wrong_ca_or_a_key_nobody_registered_are_refused(tmp_path, sites):
    make_certificates(tmp_path)
    sites.start_node(3, key=sites.folder / "node-0", ca=tmp_path / "ca.crt")
    assert sites.exit_code("node-3") == 1
    assert "CERTIFICATE_VERIFY_FAILED" in sites.log("node-3")
    make_node_key(tmp_path / "stranger")
    sites.start_node(3, key=tmp_path / "stranger")
    assert sites.exit_code("node-3") == 1
    assert "Failed to activate SuperNode" in sites.log("node-3")


@pytest.mark.sites
def test_the_command_line_refuses_a_wrong_ca(tmp_path, sites):
    make_certificates(tmp_path)
    recipe = load_recipe("digits", ("federation.engine=flower",))
    with pytest.raises(
        FederationError, match=r"flwr run on .* failed: .*; check that the SuperLink runs there, and --ca"
    ):
        run_on(SuperLink(sites.address, tmp_path / "ca.crt"), recipe, tmp_path / "run", command="train")
