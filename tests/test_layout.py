"""The rooms of the package, as CONTRIBUTING draws them: imports go down, and no function takes many arguments."""

import ast
from pathlib import Path

import fedunlearn

SRC = Path(fedunlearn.__file__).parent
FLOORS = (
    ("errors", "seeding", "files", "version", "arguments"),
    ("data", "models", "channels", "tabular"),
    ("training", "checkpoint", "export"),
    ("federation", "audits"),
    ("unlearn",),
    ("methods", "smallest"),
    ("evidence",),
    ("run",),
    ("console",),
    ("__init__",),
    ("flower",),
    ("engines",),
    ("options",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MOST_ARGUMENTS = 7


def trees():
    for path in sorted(SRC.rglob("*.py")):
        yield path.relative_to(SRC), ast.parse(path.read_text("utf-8"))


def imported(tree):
    """Return the rooms that a file imports, at its top or within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedunlearn."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "fedunlearn":
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("fedunlearn."))


def test_every_room_imports_rooms_of_the_floors_below_only():
    up = {
        (str(path), room)
        for path, tree in trees()
        for room in imported(tree)
        for here in [path.parts[0].removesuffix(".py")]
        if room != here and FLOOR[room] >= FLOOR[here]
    }
    assert not up


def test_no_function_takes_more_than_seven_arguments():
    many = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [own.arg for own in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > MOST_ARGUMENTS:
                    many.append(f"{path}: {node.name}")
    assert many == []
