"""What every command does: open its folder, work unless that is done, write result.json, close the journal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedunlearn.errors import EvidenceError
from fedunlearn.evidence.events import EVENTS, EventLog
from fedunlearn.evidence.folder import RESULT, SCHEMA, read_json, versions
from fedunlearn.evidence.verify import DOSSIER
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.journal import Journal
from fedunlearn.files import write_text
from fedunlearn.run.experiment import Experiment, network_of
from fedunlearn.run.recipe import portable_recipe, run_header
from fedunlearn.version import __version__

Observe = Callable[[str, int, int], None]  # phase, steps done, steps planned


@dataclass(frozen=True, eq=False)
class Work:
    """A command at work in its folder.

    Attributes:
        out: the folder.
        experiment: what the recipe set up.
        fed: its clients, with the journal of the folder.
        events: the log of the folder.
        data: fingerprint of the images.
        recipe: as JSON values, its paths relative to the folder.
        rates: images per second of what a probe of the machine tried.
    """

    out: Path
    experiment: Experiment
    fed: Federation
    events: EventLog
    data: str
    recipe: Mapping[str, Any]
    rates: Mapping[str, float]

    def on(self, experiment: Experiment) -> Work:
        """Return the same work with other clients."""
        return replace(self, experiment=experiment, fed=replace(self.fed, engine=experiment.engine))

    def probed(self) -> None:
        """Log what a probe of the machine found, where there was one."""
        if self.rates:
            self.events.once("machine probed", images_per_second=self.rates)


def opened(
    command: str,
    experiment: Experiment,
    out: Path,
    *,
    about: Mapping[str, Any],
    rates: Mapping[str, float],
    observe: Observe,
) -> Work:
    """Return ``command`` at work in ``out``, a new folder or that of the same run.

    Args:
        command: its name.
        experiment: what the recipe set up, how its clients compute settled.
        out: the folder.
        about: what else identifies the run, beside command, version, recipe and images.
        rates: what a probe of the machine found.
        observe: told of each step.

    Raises:
        RunError: the folder holds another run, or something else.
    """
    data, recipe = experiment.fingerprint(), portable_recipe(experiment.recipe, out)
    header = run_header(command, recipe, data) | network_of(experiment) | dict(about)
    journal = Journal(out, header=header, observe=observe)
    return Work(out, experiment, experiment.federation(journal), EventLog(out / EVENTS), data, recipe, rates)


def finished(work: Work, blocks: Callable[[], Mapping[str, Any]]) -> None:
    """Write result.json with the ``blocks`` of a command, which are made only where it is not there yet.

    Raises:
        EvidenceError: the folder was signed and has lost its result: a new one would break the signature.
    """
    if not (work.out / RESULT).exists():
        if (work.out / DOSSIER).exists():
            raise EvidenceError(f"{work.out} is signed, but {RESULT} is missing: choose another --out")
        about = {"schema": SCHEMA, "version": __version__, "versions": versions(), "recipe": work.recipe}
        write_text(work.out / RESULT, json.dumps({**about, **blocks()}, indent=2) + "\n")


def read_result(out: Path) -> dict[str, Any]:
    """Return the content of result.json."""
    return read_json(out / RESULT)
