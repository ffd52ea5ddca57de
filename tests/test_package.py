"""The package as others get it: names, version, documentation that runs, a wheel that installs."""

import ast
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

import fedunlearn

ROOT = Path(__file__).resolve().parents[1]


def test_public_names_are_sorted_and_there():
    assert fedunlearn.__all__ == sorted(fedunlearn.__all__)
    assert all(hasattr(fedunlearn, name) for name in fedunlearn.__all__)
    namespace: dict[str, object] = {}
    exec("from fedunlearn import *", namespace)
    assert set(fedunlearn.__all__) <= set(namespace)


def test_every_public_name_has_a_docstring():
    undocumented = [name for name in fedunlearn.__all__ if not getattr(fedunlearn, name).__doc__]
    assert undocumented == []


def test_the_changelog_speaks_of_this_version_or_of_what_comes():
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "## [Unreleased]" in changelog or f"## [{fedunlearn.__version__}]" in changelog


def test_the_readme_s_first_screen_is_short_and_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "channels removed" in shown
    accuracy = ast.literal_eval(shown[shown.index("{'forget'") :])
    assert accuracy["forget"] == 0
    assert accuracy["retain"] > 0.8


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "docs/index.md", "exec"), {})
    before, after, row_kept = map(float, capsys.readouterr().out.split()[-3:])
    assert before > 0.9
    assert after > before - 0.1
    assert row_kept < 0.5


def test_documented_commands_and_options_exist(capsys):
    from fedunlearn.cli import app

    text = "\n".join((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/index.md", "docs/files.md"))
    for line in re.findall(r"^\$ fedunlearn (.*)$", text, re.M):
        command, *rest = line.split("#")[0].split()
        with pytest.raises(SystemExit) as ended:
            app([command, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in rest if word.startswith("--"))


@pytest.mark.timeout(600)
def test_the_wheel_installs_into_an_empty_environment_and_works(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    python = tmp_path / "empty" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    for wanted in ("torch", wheel):  # torch first, as in the Makefile
        subprocess.run([*pip, wanted], check=True, capture_output=True, cwd=tmp_path)
    program = tmp_path / "empty" / "bin" / "fedunlearn"
    listed = subprocess.run([program, "recipes"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "cifar100-vgg19" in listed.stdout
    quick = ("--set", "train.rounds=1", "--set", "unlearn.rounds=1", "--quiet")
    subprocess.run([program, "run", "digits", "--out", tmp_path / "out", *quick], check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()
    typed = "import fedunlearn, pathlib; print((pathlib.Path(fedunlearn.__file__).parent / 'py.typed').exists())"
    assert subprocess.run([python, "-c", typed], capture_output=True, text=True).stdout.strip() == "True"


def test_the_constraints_pin_every_dependency_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    assert {re.match(r"[\w-]+", name)[0].lower() for name in wanted} - {project["name"]} <= pinned


def test_the_tables_of_the_results_page_are_those_of_the_measured_files():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
