"""The command line as a person meets it: its output and exit codes, in this process where no other is needed."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from conftest import write_set
from fedunlearn.cli import main
from fedunlearn.console import print_table
from fedunlearn.data.npz import load_npz
from fedunlearn.errors import ModelError, PlanError, RecipeError
from fedunlearn.evidence.keys import make_keys
from fedunlearn.models import build_model
from fedunlearn.options import Options
from fedunlearn.version import __version__

UNPRUNABLE = """
from torch import nn

def grouped(classes, colours):
    return nn.Sequential(nn.Conv2d(colours, 4, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, classes))
"""
MINE = """
from fedunlearn.models import SmallCNN

def net(classes, colours):
    return SmallCNN(classes, colours)
"""
PROGRAM = Path(sys.executable).with_name("fedunlearn")  # the entry point that an installation makes


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def fedunlearn(*arguments) -> Done:
    """Run the command line as the program does, ``main`` and all, and return what a shell would see."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fedunlearn", *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "excepthook", sys.excepthook)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
    return Done(ended.value.code, out.getvalue(), err.getvalue())


@pytest.fixture
def recipe(tmp_path):
    return write_set(tmp_path)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder with a recipe and ``out``: a run with three retrained models, and what the command line said of it."""
    folder = tmp_path_factory.mktemp("told")
    done = fedunlearn("run", write_set(folder, oracles=3), "--out", folder / "out", "--set", "train.rounds=2")
    return folder, done


def test_weights_that_are_named_are_those_that_are_taken(tmp_path):
    given = Options(recipe="digits", weights="mine.pt", models=tmp_path).loaded_recipe()
    assert (given.model.weights, given.audit.models) == ("mine.pt", str(tmp_path))
    with pytest.raises(RecipeError, match=r"--models .*: expected a folder with original.safetensors"):
        Options(recipe="digits", models=tmp_path).loaded_recipe()
    (tmp_path / "original.safetensors").touch()
    original = str(tmp_path / "original.safetensors")
    assert Options(recipe="digits", models=tmp_path).loaded_recipe().model.weights == original
    set_by_key = Options(recipe="digits", models=tmp_path, overrides=["model.weights=mine.pt"]).loaded_recipe()
    assert (set_by_key.model.weights, set_by_key.audit.models) == ("mine.pt", str(tmp_path))


def test_a_folder_may_have_brackets_in_its_name(recipe, tmp_path):
    out = tmp_path / "o[/old]"
    done = fedunlearn("train", "--recipe", recipe, "--set", "train.rounds=1", "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"files: {out}" in done.stderr


def test_a_run_prints_its_table_its_verdict_and_where_the_files_are(told):
    folder, done = told
    assert done.returncode == 0
    for row in ("original", "pruned", "unlearned", "fine-tuning only", "retrained"):
        assert row in done.stdout
    assert "3 clients: 96 images to train on, 24 held out" in done.stderr
    assert "Verdict: " in done.stdout
    assert f"report: {folder / 'out' / 'report.html'}" in done.stderr
    assert f"files: {folder / 'out'}" in done.stderr
    phases = ("training the original", "retraining (retrained-1)", "auditing, a model a step")
    for phase in (*phases, "measuring on the test images"):
        assert f"{phase}: done" in done.stderr.splitlines()  # a log gets a line when a phase ends


def test_json_is_all_that_json_prints_and_quiet_prints_nothing(recipe, tmp_path):
    done = fedunlearn("train", "--recipe", recipe, "--out", tmp_path / "out", "--json", "--quiet")
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "result.json").read_text())
    assert done.stderr == ""
    again = fedunlearn("train", "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_the_single_steps_lead_from_data_to_an_unlearned_model(recipe, tmp_path):
    assert fedunlearn("train", "--recipe", recipe, "--out", tmp_path / "a").returncode == 0
    weights = tmp_path / "a" / "original.safetensors"
    done = fedunlearn("unlearn", "--recipe", recipe, "--weights", weights, "--out", tmp_path / "b", "--json")
    assert done.returncode == 0, done.stderr
    unlearned = json.loads(done.stdout)["unlearned"]
    shipped = tmp_path / "b" / "model.safetensors"
    done = fedunlearn("evaluate", "--recipe", recipe, "--weights", shipped, "--json")
    measured = json.loads(done.stdout)
    assert measured["accuracy"]["retain"] == unlearned["accuracy"]["retain"]
    assert measured["accuracy"]["forget_row_kept"] is None
    assert measured["parameters"] == unlearned["parameters"]


def test_precision_is_one_flag_for_a_whole_run(recipe, tmp_path):
    short = ("--set", "train.rounds=1", "--set", "unlearn.rounds=1", "--json")
    for precision in ("bfloat16", "float32"):
        done = fedunlearn(
            "unlearn", "--recipe", recipe, "--precision", precision, "--out", tmp_path / precision, *short
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["recipe"]["compute"]["precision"] == precision
        assert f"they compute in {precision}" in done.stderr
    models = [(tmp_path / precision / "model.safetensors").read_bytes() for precision in ("bfloat16", "float32")]
    assert models[0] != models[1]


def test_weights_trained_elsewhere_and_a_path_with_spaces_and_letters_beyond_ascii(recipe, tmp_path):
    place = tmp_path / "Möhren und Rüben"
    place.mkdir()
    torch.save(build_model("small-cnn", classes=4, colours=1).state_dict(), place / "wéights.pt")
    done = fedunlearn(
        "unlearn", "--recipe", recipe, "--weights", place / "wéights.pt", "--out", place / "öut", "--data",
        tmp_path / "set.npz", "--set", "model.name=small-cnn",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (place / "öut" / "model.safetensors").exists()


def test_the_program_builds_a_model_of_the_user_s_own_from_the_working_directory(recipe, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    command = [PROGRAM, "train", "--recipe", recipe, "--out", "out", "--set", "model.name=mine:net"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["recipe"]["model"]["name"] == "mine:net"


def test_plain_weights_are_measured_and_exported_and_what_images_are_normalised_by_is_said(recipe, tmp_path):
    torch.save(build_model("small-cnn", classes=4, colours=1).state_dict(), tmp_path / "plain.pt")
    given = ("--recipe", recipe, "--weights", tmp_path / "plain.pt", "--set", "model.name=small-cnn")
    for command in (("evaluate",), ("export", "--out", tmp_path / "plain.onnx")):
        done = fedunlearn(command[0], *given, *command[1:])
        assert done.returncode == 0, done.stderr
        assert "as the weights name none: where they were trained on others, set data.mean" in " ".join(
            done.stderr.split()
        )
    assert (tmp_path / "plain.onnx").exists()


def test_a_network_that_was_edited_is_no_answer_to_the_same_command(recipe, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    command = [PROGRAM, "train", "--recipe", recipe, "--out", "out", "--set", "model.name=mine:net"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).returncode == 0
    before = (tmp_path / "out" / "result.json").read_text()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    (tmp_path / "mine.py").write_text(MINE + "\n# another activation, of the same shapes\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "out holds another run (network.mine:net is '" in done.stderr
    assert (tmp_path / "out" / "result.json").read_text() == before


def test_a_received_folder_runs_none_of_its_files(signed, tmp_path):
    folder = tmp_path / "received"
    shutil.copytree(signed / "plain", folder)
    for name in ("jinja2", "matplotlib", "numpy", "torch", "fedunlearn", "typing_extensions", "colorsys"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)")
    done = subprocess.run([PROGRAM, "report", "."], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "report.html\n"), done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_model_by_import_path_may_lie_in_the_working_directory_which_is_looked_at_last_and_then_left(
    tmp_path, monkeypatch
):
    (tmp_path / "mine_too.py").write_text("import json, helper_of_mine\n" + MINE)
    (tmp_path / "helper_of_mine.py").write_text("")
    (tmp_path / "colorsys.py").write_text("raise SystemExit('a file of the folder ran')")
    (tmp_path / "statistics_of_mine.py").write_text("import colorsys\n" + MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    before = list(sys.path)
    assert isinstance(build_model("mine_too:net", classes=4, colours=1), torch.nn.Module)
    assert isinstance(build_model("statistics_of_mine:net", classes=4, colours=1), torch.nn.Module)
    assert sys.path == before
    with pytest.raises(ModelError, match=r"No module named 'nowhere'.*on Python's path or in the working directory"):
        build_model("nowhere:net", classes=4, colours=1)
    assert sys.path == before


def test_ctrl_c_while_the_program_starts_is_one_line():
    stopped = "import builtins, sys\nwhole = builtins.__import__\ndef stop(name, *rest):\n"
    stopped += "    if name == 'torch': raise KeyboardInterrupt\n    return whole(name, *rest)\n"
    stopped += "builtins.__import__ = stop\nimport fedunlearn_program\nfedunlearn_program.main()\n"
    done = subprocess.run([sys.executable, "-c", stopped], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "fedunlearn: interrupted while it started: nothing was done\n"


def test_a_second_run_into_one_folder_is_refused_and_the_first_is_signed_and_verified(recipe, tmp_path):
    key, out = tmp_path / "operator", tmp_path / "out"
    make_keys(key)
    command = ["unlearn", "--recipe", recipe, "--out", out, "--key", key, "--set", "train.rounds=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the recipe names a network of the tests
    process = [sys.executable, "-m", "fedunlearn", *map(str, command), "--quiet"]
    with subprocess.Popen(process, env=environment) as first:
        deadline = time.monotonic() + 100
        while not (out / "events.jsonl").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        done = fedunlearn(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{out} is being written by process {first.pid}: wait until it has ended, or choose" in done.stderr
    assert first.wait() == 0
    assert not (out / "lock").exists()
    assert fedunlearn("verify", out, "--key", tmp_path / "operator.pub").returncode == 0


@pytest.mark.parametrize("width", [120, 80, 40, 20])
def test_a_narrow_screen_costs_columns_and_no_digit(width):
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("model", "U, row\nkept", "R", "para-\nmeters", "client\nsamples", "client\nGFLOP", "speed-\nup"):
        table.add_column(name, no_wrap=True)
    row = ("fine-tuning only", "12.34", "98.76", "1,234,567", "12,345,678", "123,456.8", "> 12.3x")
    table.add_row(*row)
    shown = io.StringIO()
    print_table(Console(file=shown, width=width), table)
    text = shown.getvalue()
    assert "…" not in text
    assert all(value in text for value in row[:3])
    assert ("1,234,567" in text) == (width == 120)
    assert ("Not shown on" in text) == (width < 120)


def test_recipes_are_listed():
    done = fedunlearn("recipes")
    assert done.stdout.split()[:3] == ["digits", "mnist-writers", "cifar10-resnet20"]
    assert len(done.stdout.split()) == 18


def test_help_and_version_name_the_commands():
    shown = fedunlearn("--help").stdout
    assert all(
        name in shown
        for name in (
            "run",
            "train",
            "unlearn",
            "evaluate",
            "export",
            "audit",
            "init",
            "report",
            "keygen",
            "verify",
            "recipes",
        )
    )
    assert fedunlearn("--version").stdout.strip() == __version__


BAD = [
    (("run", "{recipe}", "--set", "unlearn.forget=7"), 2, "must lie in 0 .. 3, got 7: check unlearn.forget"),
    (("run", "{recipe}", "--set", "unlearn.fraction=1"), 2, "unlearn.fraction: Input should be at least 0 and below 1"),
    (("train", "--recipe", "{recipe}", "--precision", "half"), 2, "recipe key compute.precision: Input should be"),
    (("run", "{recipe}", "--set", "federation.clients=1"), 1, "a federation needs at least two clients, got 1"),
    (("run", "{recipe}", "--set", "federation.clients=999"), 1, "120 images cannot go to 999 clients"),
    (("run", "{recipe}", "--set", "unlearn.forget=owl"), 2, "no class is named 'owl'; the classes are 0, 1, 2, 3"),
    (("run", "{recipe}", "--set", "unlearn.forget=1,2"), 2, "several as in unlearn.forget=[9, 8]"),
    (("run", "{recipe}", "--ca", "{tmp}/ca.crt"), 2, "--ca is the authority of a SuperLink, and this engine has none"),
    (
        ("run", "{recipe}", "--method", "erase_only", "--set", "erase.every=2"),
        2,
        "or what erase_only has of its own by unlearn.settings={every = 2}",
    ),
    (("run", "{recipe}", "--out", "/proc/fedunlearn/out"), 1, "choose another --out"),
    (("run", "cifar10-resnet20"), 2, "the source cifar10 is read from disk: give its place with --data"),
    (("run", "cifar10-resnet20", "--data", "{tmp}"), 1, "expected the folder cifar-10-batches-py"),
    (("run", "{recipe}", "--data", "{tmp}/truncated.npz"), 1, "truncated.npz: expected an .npz of plain arrays"),
    (("run", "{recipe}", "--data", "{tmp}/absent.npz"), 2, "no client holds an image of class 2 (c)"),
    (("run", "{recipe}", "--weights", "{tmp}/other.pt"), 1, "linear.bias: the model has (4,), the file (9,)"),
    (
        ("run", "{recipe}", "--set", "model.name=unprunable:grouped"),
        1,
        "1 is a grouped convolution with 4 inputs and 8 outputs",
    ),
    (("run", "{recipe}", "--out", "{tmp}/set.npz/out"), 1, "expected a folder that can be written, but"),
    (("run", "digits", "--key", "{tmp}/none"), 1, "none: expected a private key in PEM"),
    (("audit", "{tmp}/none.pt", "--recipe", "digits"), 1, "none.pt: expected a file of weights, found none"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), BAD)
def test_bad_input_gets_one_clear_line_and_an_exit_code(recipe, tmp_path, monkeypatch, arguments, code, text):
    whole = (tmp_path / "set.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    arrays = dict(load_npz(tmp_path / "set.npz"))
    keep = arrays["y_train"] != 2
    np.savez(
        tmp_path / "absent.npz",
        classes=np.array(["a", "b", "c", "d"]),
        **(arrays | {"x_train": arrays["x_train"][keep], "y_train": arrays["y_train"][keep]}),
    )
    torch.save(build_model("nets:tiny", classes=9, colours=1).state_dict(), tmp_path / "other.pt")
    (tmp_path / "unprunable.py").write_text(UNPRUNABLE)
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(recipe=recipe, tmp=tmp_path) for argument in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    done = fedunlearn(*arguments, *out)
    assert done.returncode == code
    assert done.stderr.startswith("fedunlearn: ")
    assert done.stderr.count("\n") == 1
    assert text in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "{tmp}"), "fedunlearn: {tmp}: expected the folder of a finished run"),
        (("verify", "{tmp}", "--key", "{tmp}/none.pub"), "FAILED: {tmp}/none.pub: expected a public key in PEM"),
    ],
)
def test_commands_on_a_folder_fail_with_one_line(arguments, message, tmp_path):
    done = fedunlearn(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(message.format(tmp=tmp_path))
    assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(recipe, tmp_path):
    with pytest.raises(PlanError):  # python prints what is not caught
        fedunlearn("run", recipe, "--out", tmp_path / "out", "--set", "unlearn.forget=7", "--debug")


def test_usage_errors_exit_with_two():
    done = fedunlearn("run")
    assert done.returncode == 2
    assert "Missing argument" in done.stderr


def test_a_folder_of_another_run_is_left_alone(recipe, tmp_path):
    fedunlearn("train", "--recipe", recipe, "--out", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "result.json" in before
    done = fedunlearn("train", "--recipe", recipe, "--out", tmp_path / "out", "--set", "train.lr=0.2")
    assert done.returncode == 1
    assert "holds another run (recipe.train.lr is 0.1 there, 0.2 here)" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(recipe, tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # as if the disk were full at 60 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    arguments = ["train", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--set", "model.name=small-cnn"]
    command = [sys.executable, "-m", "fedunlearn", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 1
    assert f"fedunlearn: {tmp_path / 'out' / 'state' / 'train.safetensors'}: File too large: what was" in done.stderr
    assert "what was finished is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "result.json").exists()
    assert fedunlearn(*arguments).returncode == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    write_set(tmp_path)
    done = fedunlearn("init", tmp_path / "set.npz", "--forget", "1", "--out", "/proc/nowhere")
    assert done.returncode == 1
    assert done.stderr.endswith("No such file or directory: give a place that is there and can be written\n")


def test_ctrl_c_ends_with_a_word_and_the_run_goes_on(recipe, tmp_path):
    arguments = ["train", "--recipe", str(recipe), "--out", str(tmp_path / "out"), "--set", "train.rounds=25"]
    arguments += ["--set", "model.name=small-cnn"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedunlearn", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 (background shells ignore it)
    )
    rounds = tmp_path / "out" / "rounds.jsonl"
    deadline = time.monotonic() + 100
    while not (rounds.exists() and rounds.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: the same command goes on from the last finished round" in shown
    finished = rounds.read_text().splitlines()
    assert len(finished) >= 4
    done = fedunlearn(*arguments, "--quiet")
    assert done.returncode == 0, done.stderr
    assert rounds.read_text().splitlines()[: len(finished)] == finished
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_of_pictures_runs_from_end_to_end(recipe, tmp_path):
    draw = np.random.default_rng(0)
    for label, name in enumerate(("cats", "dogs", "owls")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(20):
            pixels = draw.integers(0, 90, (12, 12, 3), dtype=np.uint8)
            pixels[..., label] += 150
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{k}.png")
    done = fedunlearn(
        "run", recipe, "--data", tmp_path / "pictures", "--out", tmp_path / "out", "--set", "data.source=folder",
        "--set", "data.size=8", "--set", "unlearn.forget=dogs", "--set", "audit.oracles=0", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["classes"] == ["cats", "dogs", "owls"]
    assert json.loads(done.stdout)["forget"] == [1]


def test_a_finished_run_is_signed_verified_audited_and_reported_from_the_command_line(told, tmp_path):
    folder, _ = told
    key, out, recipe = tmp_path / "operator", tmp_path / "out", write_set(tmp_path, oracles=3)
    shutil.copytree(folder / "out", out)
    made = fedunlearn("keygen", "--out", key).stdout
    assert "give it to those who verify" in made
    public = tmp_path / "operator.pub"
    unsigned = fedunlearn("verify", out, "--key", public)
    assert (unsigned.returncode, unsigned.stderr) == (
        1,
        f"FAILED: {out}: there is no dossier.json: the folder was not signed\n",
    )
    signed = fedunlearn("run", recipe, "--out", out, "--set", "train.rounds=2", "--key", key, "--quiet")
    assert signed.returncode == 0, signed.stderr  # a finished run is signed later
    seen = fedunlearn("verify", out, "--key", public).stdout
    assert "verified: signature" in seen
    assert f"operator not named, signed by the key {made.split()[-1]}: is that" in seen
    done = fedunlearn("report", out)
    assert (done.returncode, done.stdout) == (0, f"{out / 'report.html'}\n")
    assert fedunlearn("verify", out, "--key", public).returncode == 0  # the same bytes
    oracles = [part for path in sorted((out / "oracles").iterdir()) for part in ("--oracle", path)]
    model = out / "model.safetensors"
    done = fedunlearn("audit", model, "--recipe", recipe, "--out", tmp_path / "audit", *oracles)
    assert "no model that must fail was audited" in " ".join(done.stdout.split()).lower()
    assert done.returncode == 0, done.stderr
    assert "the verdict holds the model against 3 retrained ones: a figure fails" in done.stderr
    assert "training takes" not in done.stderr
    assert "linear probe" in done.stdout
    assert "Verdict: " in done.stdout
