"""The journal of a run: each finished step with its cost, and the state to go on from after a kill."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from fedunlearn.errors import RunError
from fedunlearn.federation.ledger import Entry
from fedunlearn.files import write_tensors, write_text

_ROUNDS = "rounds.jsonl"
_STATE = "state"


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        phase: ``train``, ``measure-0``, ``reestimate``, ``repair``, ``finetune`` or ``retrain``.
        round: number within the phase, from 0.
        entries: the jobs it took.
        validation: accuracy on the clients' validation images of the kept classes, where it was measured.
        adopted: it was finished in another run and taken from the cache.
    """

    phase: str
    round: int
    entries: tuple[Entry, ...]
    validation: float | None = None
    adopted: bool = False

    def to_json(self) -> str:
        """Return the step as one line of JSON."""
        value = {
            "phase": self.phase,
            "round": self.round,
            "validation": self.validation,
            "adopted": self.adopted,
            "entries": [entry.to_dict() for entry in self.entries],
        }
        return json.dumps(value, sort_keys=True)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Step:
        """Return the step whose JSON was parsed to ``value``."""
        entries = tuple(Entry.from_dict(entry) for entry in value["entries"])
        return Step(value["phase"], value["round"], entries, value["validation"], value["adopted"])


class Journal:
    """Finished steps in order; kept in memory only, or also in a folder from which a killed run goes on.

    In a folder, ``rounds.jsonl`` starts with the header and gets a line per step; ``state/PHASE.safetensors`` holds
    the tensors after the last step of a phase. The state is written first and carries its own line, so a kill between
    the two writes loses nothing; both are synced to disk.

    Args:
        folder: where the files go; memory only where None.
        header: what identifies the run; a folder with another header is refused.
        observe: called with phase, steps done and steps planned when a phase starts and after each step.

    Raises:
        RunError: the folder holds another run, or its files cannot be read.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        header: Mapping[str, Any] | None = None,
        observe: Callable[[str, int, int], None] = lambda phase, done, planned: None,
    ) -> None:
        self._folder = folder
        self.report = observe
        self._steps: list[Step] = []
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._open(folder, dict(header or {}))

    def steps(self, phase: str) -> list[Step]:
        """Return the finished steps of ``phase`` in order."""
        return [step for step in self._steps if step.phase == phase]

    def entries(self, *phases: str) -> list[Entry]:
        """Return the ledger entries of the steps whose phase starts with one of ``phases``."""
        return [entry for step in self._steps if step.phase.startswith(phases) for entry in step.entries]

    def state(self, phase: str) -> dict[str, Tensor]:
        """Return the tensors after the last finished step of ``phase``.

        Raises:
            RunError: the file is missing or damaged.
        """
        path = self._state_path(phase)
        try:
            return load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise RunError(
                f"{path}: expected the state of the phase {phase} as safetensors, but {error}: "
                "delete the folder and run again"
            ) from error

    def finish(self, step: Step, tensors: Mapping[str, Tensor]) -> None:
        """Record ``step`` with the tensors to go on from."""
        if self._folder is not None:
            path = self._state_path(step.phase)
            path.parent.mkdir(exist_ok=True)
            write_tensors(path, tensors, {"step": step.to_json()})
            self._append(step.to_json())
        self._steps.append(step)

    def adopt(self, steps: list[Step], tensors: Mapping[str, Tensor]) -> None:
        """Record steps of one phase that were finished elsewhere, with the tensors after the last.

        A kill can leave some of them unrecorded; the same call again records the rest.
        """
        for step in steps[len(self.steps(steps[0].phase)) :]:
            self.finish(replace(step, adopted=True), tensors)

    def adopted(self, phase: str) -> bool:
        """Say whether the steps of ``phase`` were finished elsewhere."""
        return any(step.adopted for step in self.steps(phase))

    def close(self) -> None:
        """Delete the states: the run is finished and its models are written."""
        if self._folder is not None:
            shutil.rmtree(self._folder / _STATE, ignore_errors=True)

    def _state_path(self, phase: str) -> Path:
        assert self._folder is not None  # only a journal in a folder has states
        return self._folder / _STATE / f"{phase}.safetensors"

    def _open(self, folder: Path, header: dict[str, Any]) -> None:
        for part in folder.rglob("*.part"):  # what a kill left half written
            part.unlink()
        path = folder / _ROUNDS
        text = path.read_text("utf-8") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]  # a kill can cut the last line short; its state brings it back
        if not complete:
            write_text(path, json.dumps(header, sort_keys=True) + "\n")
            return
        if complete != text:
            write_text(path, complete)
        first, *lines = complete.splitlines()
        try:
            found = json.loads(first)
            self._steps = [Step.from_dict(json.loads(line)) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: expected the rounds of a run, but {error}: choose another --out") from error
        if found != json.loads(json.dumps(header)):
            raise RunError(
                f"{folder} holds another run ({_difference(found, header)}): choose another --out, or delete it"
            )
        recorded = {(step.phase, step.round) for step in self._steps}
        for state in sorted((folder / _STATE).glob("*.safetensors")):
            with safetensors.safe_open(state, "pt") as file:
                line = (file.metadata() or {}).get("step", "")
            step = Step.from_dict(json.loads(line))
            if (step.phase, step.round) not in recorded:
                self._append(line)
                self._steps.append(step)

    def _append(self, line: str) -> None:
        assert self._folder is not None  # only a journal in a folder has a file
        with (self._folder / _ROUNDS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def _difference(found: Any, wanted: Any, path: str = "") -> str:
    """Return the first key in which two headers differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    return f"{path} is {found!r} there, {wanted!r} here"
