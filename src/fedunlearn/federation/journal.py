"""The journal of a run: each finished step with its cost, and the state to go on from after a kill."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from fedunlearn.arguments import is_name
from fedunlearn.errors import RunError
from fedunlearn.federation.ledger import Entry
from fedunlearn.federation.lock import FolderLock
from fedunlearn.files import PART, append_line, write_tensors, write_text

STATE = "state"  # folder of the states, in that of a run
ROUNDS = "rounds.jsonl"
_BEFORE = "0.2.0"  # the last version whose steps do not say what they were done for


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        phase: ``train``, ``measure-0``, ``reestimate``, ``repair``, ``retrain``, or that of a method.
        round: number within the phase, from 0.
        entries: the jobs it took.
        validation: accuracy on the clients' validation images of the kept classes, where it was measured.
        about: what the step was done for, by name: short values as they are, of long ones a digest, see
            ``federation/about.py``.
    """

    phase: str
    round: int
    entries: tuple[Entry, ...]
    validation: float | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the step as one line of JSON."""
        value = {
            "phase": self.phase,
            "round": self.round,
            "validation": self.validation,
            "entries": [entry.to_dict() for entry in self.entries],
            "about": dict(self.about),
        }
        return json.dumps(value, sort_keys=True)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Step:
        """Return the step whose JSON was parsed to ``value``."""
        entries = tuple(Entry.from_dict(entry) for entry in value["entries"])
        return Step(value["phase"], value["round"], entries, value["validation"], value["about"])


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
        RunError: the folder holds another run or something else, another process writes there, its files cannot be
            read, or its name is not UTF-8.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        *,
        header: Mapping[str, Any] | None = None,
        observe: Callable[[str, int, int], None] = lambda phase, done, planned: None,
    ) -> None:
        if not isinstance(folder, (str, Path, type(None))) or "\0" in str(folder):
            raise RunError(f"Journal(folder) must be the path of a folder, or None, got {folder!r}")
        folder = None if folder is None else Path(folder)
        self._folder = folder
        self._prefix = ""
        self.report = observe
        self._steps: list[Step] = []
        # By phase and how many of its steps are done: one that an interrupt kept from being recorded has no number.
        self._states: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._lock: FolderLock | None = None
        if folder is not None:
            _check_name(folder)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = FolderLock(folder)
            except OSError as error:
                raise RunError(f"{folder}: cannot be made ({error.strerror}): choose another --out") from error
            try:
                self._open(folder, json.loads(json.dumps(header or {})))
            except BaseException:
                self._lock.leave()
                raise
            self._lock.take()

    @property
    def lasts(self) -> bool:
        """Whether it is in a folder, from which another process may go on."""
        return self._folder is not None

    def part(self, name: str) -> Journal:
        """Return the journal of a part of the run, whose phases are recorded here as ``NAME.PHASE``."""
        part = copy.copy(self)  # steps and states are shared
        part._prefix = f"{self._prefix}{name}."
        observe, prefix = self.report, f"{name}."
        part.report = lambda phase, done, planned: observe(prefix + phase, done, planned)
        return part

    def steps(self, phase: str) -> list[Step]:
        """Return the finished steps of ``phase`` in order."""
        return [step for step in self._steps if step.phase == self._prefix + phase]

    def finished(self, phase: str, about: Sequence[Mapping[str, str]]) -> list[Step]:
        """Return the finished steps of ``phase`` in order, after which a request goes on.

        Args:
            phase: the phase.
            about: of each step that is asked for, what it is to be about.

        Raises:
            RunError: a step was done for something else, or there are more steps than are asked for; or the phase has
                no name that a file can have.
        """
        if not is_name(phase):
            raise RunError(f"the name of a phase must be text in one line without / or \\, got {phase!r}: rename it")
        steps = self.steps(phase)
        place = "this journal" if self._folder is None else f"the journal in {self._folder}"
        another = "use another journal for it, or delete this one" if self._folder else "give each its own fu.Journal()"
        if len(steps) > len(about):
            raise RunError(
                f"{place} holds {len(steps)} steps of {self._prefix}{phase}, this request asks for {len(about)}: "
                f"{another}"
            )
        for step, wanted in zip(steps, about, strict=False):
            if step.about and step.about != wanted:  # whoever adopted a step knows that it fits
                raise RunError(
                    f"{place} holds {self._prefix}{phase}, step {step.round + 1}, of another request "
                    f"({_difference(dict(step.about), dict(wanted))}): {another}"
                )
        return steps

    def entries(self, *phases: str) -> list[Entry]:
        """Return the ledger entries of the steps whose phase starts with one of ``phases``."""
        wanted = tuple(self._prefix + phase for phase in phases)
        return [entry for step in self._steps if step.phase.startswith(wanted) for entry in step.entries]

    def state(self, phase: str) -> dict[str, Tensor]:
        """Return the tensors after the last finished step of ``phase``.

        Raises:
            RunError: they are gone, as those of a finished run are.
        """
        at = self._prefix + phase, len(self.steps(phase))
        phase = self._prefix + phase
        if at not in self._states:
            raise RunError(
                f"{self._folder}: the steps of {phase} are there and state/{phase}.safetensors is not, as after a run "
                "that had ended: choose another --out to do it again"
            )
        return dict(self._states[at])

    def finish(self, step: Step, tensors: Mapping[str, Tensor]) -> None:
        """Record ``step`` with the tensors to go on from.

        Raises:
            RunError: another journal of this process was opened on the folder since.
        """
        if self._lock is not None and not self._lock.newest:
            raise RunError(
                f"{self._folder}: another Journal of this process was opened on this folder since, or this one was "
                "left: go on with the newest, which knows all steps"
            )
        done = len(self.steps(step.phase))
        step = replace(step, phase=self._prefix + step.phase)
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        if self._folder is not None:
            state = self._folder / STATE / f"{step.phase}.safetensors"
            state.parent.mkdir(exist_ok=True)
            write_tensors(state, tensors, {"step": step.to_json()})
            append_line(self._folder / ROUNDS, step.to_json().encode())
        # Not before it is on the disk: after a full one, or an interrupt, the same request does the step again.
        self._states[step.phase, done + 1] = copies
        self._steps.append(step)
        self._states.pop((step.phase, done), None)

    def adopt(self, phase: str, other: Journal) -> None:
        """Record the last step of ``phase`` of another journal as one of this, so that it is not done again."""
        if not self.steps(phase):
            self.finish(replace(other.steps(phase)[-1], phase=phase, about={}), other.state(phase))

    def close(self) -> None:
        """Delete the states: the run is finished and its models are written."""
        if self._folder is not None:
            shutil.rmtree(self._folder / STATE, ignore_errors=True)

    def leave(self) -> None:
        """Let other processes write into the folder; nothing can be recorded any more."""
        if self._lock is not None:
            self._lock.leave()

    def _open(self, folder: Path, header: Any) -> None:
        path = folder / ROUNDS
        data = path.read_bytes() if path.exists() else b""
        complete = data[: data.rfind(b"\n") + 1]  # a kill can cut the last line short; its state brings it back
        if not complete:
            foreign = sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors"))
            if foreign or (folder / STATE).exists():
                raise RunError(f"{folder} holds files of something else ({', '.join(foreign)}): choose another --out")
            write_text(path, json.dumps(header, sort_keys=True) + "\n")
            return
        try:
            found, *values = [json.loads(line) for line in complete.splitlines()]
            if any("about" not in value for value in values):
                raise RunError(
                    f"{path}: its steps do not say what they were done for, as those of fedunlearn "
                    f"{_BEFORE}: finish the run with the version that began it, or delete {folder}"
                )
            self._steps = [Step.from_dict(value) for value in values]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: expected the rounds of a run, but {error}: choose another --out") from error
        if found != header:
            raise RunError(f"{folder} holds another run ({_difference(found, header)}): choose another --out")
        if complete != data:
            write_text(path, complete.decode())
        for state in sorted((folder / STATE).glob("*")):
            if state.suffix == PART:  # what a kill left half written
                state.unlink()
            else:
                self._go_on_from(state, path)

    def _go_on_from(self, state: Path, path: Path) -> None:
        """Read the state of a phase, and record its step where a kill came before the line was written."""
        try:
            with safetensors.safe_open(state, "pt") as file:
                line = file.metadata()["step"]
                step = Step.from_dict(json.loads(line))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{state}: expected the state of a phase, but {error}: delete {path.parent}") from error
        recorded = len(self.steps(step.phase))
        if step.round == recorded:
            append_line(path, line.encode())
            self._steps.append(step)
        elif step.round != recorded - 1:
            raise RunError(
                f"{state} is that of round {step.round}, {path.name} has {recorded} rounds of {step.phase}: "
                f"delete {path.parent}"
            )
        self._states[step.phase, step.round + 1] = tensors


def _check_name(folder: Path) -> None:
    """Refuse a name that safetensors could not open, before there is anything to lose."""
    name = os.fsencode(folder)
    try:
        name.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = name.decode("utf-8", "backslashreplace")
        raise RunError(f"{shown}: expected the name of a folder in UTF-8: choose another --out") from error


def header_of(folder: Path) -> dict[str, Any]:
    """Return what identifies the run in ``folder``; empty where there is none."""
    try:
        header: dict[str, Any] = json.loads((folder / ROUNDS).read_bytes().splitlines()[0])
        return header
    except (OSError, ValueError, IndexError):  # Journal says what is wrong with it
        return {}


def _difference(found: Any, wanted: Any, path: str = "") -> str:
    """Return the first key in which two headers differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                return _difference(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    return f"{path} is {found!r} there, {wanted!r} here"
