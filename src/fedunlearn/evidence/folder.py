"""The folder of a run: what every command checks before it writes there, and a finished run read back."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fedunlearn.errors import EvidenceError, FedUnlearnError, RunError
from fedunlearn.evidence.verify import DOSSIER
from fedunlearn.files import write_text

RESULT = "result.json"
REPORT = "report.html"
MODEL = "model.safetensors"  # what is delivered
BEFORE = "original.safetensors"
PLAN = "plan.json"
STATS, SCORES, MAPS = "stats.safetensors", "scores.safetensors", "maps.safetensors"
SCHEMA = 2


def retrained_file(folder: Path, name: str) -> Path:
    """Return where a run keeps the retrained model ``name``."""
    return folder / "oracles" / f"{name}.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """A finished run.

    Attributes:
        path: its folder.
        result: content of result.json.
        models: content of audits/NAME.json by name.
    """

    path: Path
    result: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]

    @staticmethod
    def read(path: Path) -> RunFolder:
        """Return the run in ``path``.

        Raises:
            RunError: there is none, it is not finished, or another version of this program wrote it.
        """
        file = path / RESULT
        if not file.is_file():
            raise RunError(f"{path}: expected the folder of a finished run, but there is no {RESULT}: check the folder")
        result = read_json(file)
        check_schema(file, result)
        audits = sorted((path / "audits").glob("*.json"))
        return RunFolder(path, result, {audit.stem: read_json(audit) for audit in audits})

    @staticmethod
    def audited(path: Path) -> RunFolder:
        """Return the run in ``path``, which has a verdict.

        Raises:
            RunError: there is none, it is not finished, or it was not audited.
        """
        run = RunFolder.read(path)
        if "verdict" not in run.result:
            raise RunError(f"{path}: this run was not audited: use fedunlearn run, or fedunlearn audit on its model")
        return run

    def figures(self, name: str) -> dict[str, float]:
        """Return the figures of a model by name; empty where it was not audited."""
        figures = self.models.get(name, {}).get("figures", {})
        return {figure: float(entry["value"]) for figure, entry in figures.items()}

    @property
    def oracles(self) -> list[str]:
        """Names of the retrained models."""
        return list(self.result.get("oracles", {}))


def check_schema(file: Path, value: Mapping[str, Any]) -> None:
    """Refuse a result that another version of this program wrote.

    Args:
        file: where it stands.
        value: its content.

    Raises:
        RunError: it has another schema.
    """
    if value.get("schema") != SCHEMA:
        raise RunError(
            f"{file}: expected a result of schema {SCHEMA}, got {value.get('schema')!r}: read it by the version of "
            "fedunlearn that wrote it"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of what its figures depend on."""
    packages = ("fedunlearn", "torch", "numpy", "torch-pruning", "scikit-learn", "scipy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written before any work is done."""
    there = next(path for path in (out, *out.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RunError(f"{out}: expected a folder that can be written, but {there} is not one: choose another --out")


def write_unsigned(folder: Path, name: str, text: str) -> None:
    """Write a file of the run anew; in a signed folder, only what leaves the signature as it is.

    Raises:
        EvidenceError: the folder is signed, and the file would change.
    """
    path = folder / name
    if (folder / DOSSIER).exists():
        if not path.is_file() or path.read_bytes() != text.encode():
            raise EvidenceError(
                f"{folder} is signed, and a new {name} would differ from the signed one: it stays as it is; for a new "
                f"one, copy the folder without {DOSSIER}"
            )
        return
    write_text(path, text)


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Tell in one line that the files of a run are not what a run writes, whatever fails by it.

    Raises:
        RunError: a value that is expected in one of them is missing or of another kind.
    """
    try:
        yield
    except (FedUnlearnError, ImportError, MemoryError, OSError):  # which say what they are
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise RunError(
            f"{folder}: its files cannot be read as those of a finished run ({type(error).__name__}: {error}): where "
            "they were changed or lost in part, put back what was there, or do the same into another --out"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a file of a run.

    Raises:
        RunError: it cannot be read.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: expected JSON, but {error}: run the same command into another --out") from error
    return value
