"""What every command does: open its folder, work unless that is done, write result.json and its pages, sign them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedunlearn.audits.audit import Record
from fedunlearn.errors import EvidenceError
from fedunlearn.evidence.dossier import sign
from fedunlearn.evidence.events import EVENTS, OPERATOR, EventLog
from fedunlearn.evidence.folder import REPORT, RESULT, SCHEMA, read_json, sha256, versions
from fedunlearn.evidence.verify import DOSSIER, fingerprint
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import Engine
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

    def on(self, engine: Callable[[Experiment], Engine] | None) -> Work:
        """Return the same work on the engine that ``engine`` makes; on that of this process where None."""
        if engine is None:
            return self
        experiment = replace(self.experiment, engine=engine(self.experiment))
        return replace(self, experiment=experiment, fed=replace(self.fed, engine=experiment.engine))

    def record(self) -> Record:
        """Return where an audit keeps what it finds."""

        def fixed(digest: str) -> None:
            self.events.once("thresholds fixed", sha256=digest)

        return Record(self.out, fixed, self.fed.journal.report)

    def probed(self) -> None:
        """Log what a probe of the machine found, where there was one."""
        if self.rates:
            self.events.once("machine probed", images_per_second=self.rates)


def opened(
    command: str,
    experiment: Experiment,
    out: Path,
    *,
    rates: Mapping[str, float],
    observe: Observe,
    about: Mapping[str, Any] | None = None,
) -> Work:
    """Return ``command`` at work in ``out``, a new folder or that of the same run.

    Args:
        command: its name.
        experiment: what the recipe set up, how its clients compute settled.
        out: the folder.
        about: what else identifies the run, beside command, version, recipe, images and weights to start from.
        rates: what a probe of the machine found.
        observe: told of each step.

    Raises:
        RunError: the folder holds another run, or something else.
    """
    data, recipe = experiment.fingerprint(), portable_recipe(experiment.recipe, out)
    weights = {} if experiment.weights is None else {"weights": sha256(experiment.weights.path)}
    header = run_header(command, recipe, data) | network_of(experiment) | weights | dict(about or {})
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


def concluded(work: Work, signer: Ed25519PrivateKey | None, *, pages: Callable[[Path], None] | None) -> dict[str, Any]:
    """Write the pages of a command whose result is there, sign the folder, and return the content of result.json.

    Args:
        work: the command.
        signer: the operator's key; None: nothing is signed. What is signed already is signed again, for longer.
        pages: makes the pages of a folder; None: there are none.
    """
    out, signed = work.out, (work.out / DOSSIER).exists()
    work.events.once("result written", sha256=sha256(out / RESULT))
    work.fed.journal.close()
    # Before it is signed, the page is made of the files: what lay there may be another's words.
    if pages is not None and (not (out / REPORT).exists() or (signer is not None and not signed)):
        if signer is not None:
            work.events.once(OPERATOR, key=fingerprint(signer.public_key()))
        pages(out)
    if signer is not None:
        sign(out, signer)
    work.fed.journal.leave()
    return read_json(out / RESULT)
