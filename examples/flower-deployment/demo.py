"""Three sites on this machine train, forget and repair over Flower; one is killed half-way. make demo-flower runs it.

SuperLink and SuperNodes speak HTTPS with certificates of a CA made here, and the SuperLink admits registered nodes
only. The same recipe is then run inside one process, where the killed site is absent from the same rounds: both
must make the same model.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from deployment import Deployment
from rich.console import Console
from safetensors.torch import load_file

from fedunlearn.console import notes, result_table
from fedunlearn.federation.jobs import Job, Reply
from fedunlearn.federation.local import LocalEngine
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe
from fedunlearn.training.compute import one_torch_thread

SITES, ROUNDS, VICTIM = 3, 4, 2
MODELS = ("original", "pruned", "unlearned")
SETTINGS = (f"federation.clients={SITES}", f"train.rounds={ROUNDS}", "federation.deadline=60")
TOLERANCE = 1e-6


class Attendance(LocalEngine):
    """Clients inside this process, of whom some are absent from some rounds."""

    absent: dict[tuple[str, int, str], set[str]]

    def run(self, job: Job) -> Iterator[Reply]:
        """Run ``job``; those absent from it give no answer."""
        away = self.absent.get((job.phase, job.round, job.task.kind), set())
        for reply in super().run(job):
            yield Reply(reply.client, error="it was absent") if reply.client in away else reply


def main(folder: Path) -> int:
    """Run the demo in ``folder`` and return 0 if both runs agree and no process is left."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    print(f"starting a SuperLink and {SITES} SuperNodes on this machine", flush=True)
    deployment = Deployment(folder / "deployment", SITES)
    with deployment:
        print(f"SuperLink on {deployment.address} and {SITES} SuperNodes are up: HTTPS, registered keys", flush=True)
        flower, lost = over_flower(deployment, folder / "flower")
    left = deployment.processes()
    local = inside_this_process(folder / "local", lost)
    console = Console()
    for name, result in (("over Flower", flower), ("inside one process", local)):
        console.print(f"\n{name}:")
        console.print(result_table(result))
    console.print(notes(local), highlight=False)
    print()
    for (phase, number, _), names in lost.items():
        print(f"    lost on the way: {', '.join(sorted(names))} in {phase}, round {number + 1}")
    final = steps(folder / "flower")[-1]["entries"]
    difference = largest_difference(folder / "flower" / "model.safetensors", folder / "local" / "model.safetensors")
    plans = [(folder / name / "plan.json").read_text() for name in ("flower", "local")]
    agreed = {
        "a site was lost on the way": bool(lost),
        "and came back": all(names <= set(last["clients"]) for names in lost.values() for last in final),
        "same channels pruned": plans[0] == plans[1],
        f"same weights within {TOLERANCE:g} (largest difference {difference:g})": difference <= TOLERANCE,
        "same table": all(figures(flower, name) == figures(local, name) for name in MODELS),
        "no process left behind": not left,
    }
    for what, holds in agreed.items():
        print(f"{'yes' if holds else 'NO':4}{what}")
    passed = all(agreed.values())
    print(f"{'The demo passed' if passed else 'THE DEMO FAILED'}, {time.monotonic() - began:.0f} s")
    return 0 if passed else 1


def over_flower(deployment: Deployment, out: Path) -> tuple[dict, dict[tuple[str, int, str], set[str]]]:
    """Run the recipe on the deployment, kill a site half-way, and return the result and who was lost where."""
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [str(Path(sys.executable).with_name("fedunlearn")), "unlearn", "--recipe", "digits", *options]
    command += ["--engine", "flower", "--superlink", deployment.address, "--ca", str(deployment.ca)]
    process = subprocess.Popen([*command, "--out", str(out), "--json"], stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and finished(out) < ROUNDS // 2:
            time.sleep(0.1)
        while process.poll() is None and not deployment.busy(VICTIM):
            time.sleep(0.05)
        deployment.kill(f"node-{VICTIM}")
        print(f"killed the SuperNode of site {VICTIM} in training round {finished(out) + 1}", flush=True)
        reviver = threading.Thread(target=deployment.revive_node, args=(VICTIM,), daemon=True)
        reviver.start()
        if process.wait() != 0:
            raise SystemExit("the run over Flower failed")
        reviver.join(120)
    finally:
        process.kill()
    lost: dict[tuple[str, int, str], set[str]] = {}
    for step in steps(out):
        for entry in step["entries"]:
            if entry["refused"]:
                lost[step["phase"], step["round"], entry["job"]] = set(entry["refused"])
    return json.loads((out / "result.json").read_text()), lost


def inside_this_process(out: Path, lost: dict[tuple[str, int, str], set[str]]) -> dict:
    """Run the recipe with clients in this process, the same of them absent from the same rounds."""

    def engine(experiment):
        clients = Attendance(experiment.clients, validation=experiment.validation)
        clients.absent = lost
        return clients

    with one_torch_thread():
        return run(load_recipe("digits", SETTINGS), out, command="unlearn", engine=engine)


def figures(result: dict, name: str) -> dict:
    """Return the figures of a model that are in the table."""
    return {key: value for key, value in result[name].items() if key != "validation"}


def finished(out: Path) -> int:
    """Return how many training rounds are finished."""
    return sum(step["phase"] == "train" for step in steps(out))


def steps(out: Path) -> list[dict]:
    """Return the finished steps of a run, of which the last line may be half written."""
    path = out / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def largest_difference(one: Path, other: Path) -> float:
    """Return by how much the weights of two models differ at most."""
    ours, theirs = load_file(one), load_file(other)
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return float("inf")
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path("runs/demo-flower")))
