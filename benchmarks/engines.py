"""What a round costs on each engine: python -m benchmarks.engines ENGINE CLIENTS writes it to benchmarks/engines.json.

Digits in the shares of CLIENTS clients, the small CNN, one local epoch; no validation images, so that Evaluate is an
empty round: weights out, two rows of zeros back. Memory is the proportional set size of all processes, sampled twice a
second, at its highest.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine_app.engine_app import time_rounds
from fedunlearn.data.partition import partition
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.privacy import Privacy
from fedunlearn.flower.engine import FlowerEngine
from fedunlearn.flower.launch import simulation
from fedunlearn.run.inputs import read_data
from fedunlearn.run.recipe import Recipe, load_recipe
from fedunlearn.training.compute import one_torch_thread

_ROOT = Path(__file__).parent
_OUT = _ROOT / "engines.json"


def main(engine: str, clients: int) -> None:
    """Measure and print one line."""
    settings = (f"federation.clients={clients}", "data.validation=0", "train.local_epochs=1")
    recipe = load_recipe("digits", settings)
    timed = _ENGINES[engine]
    with one_torch_thread():
        began = time.monotonic()
        times, memory = timed(recipe, clients)
    line = {
        "engine": engine,
        "clients": clients,
        **times,
        "memory_mb": round(memory),
        "total_seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(line), flush=True)
    rows = json.loads(_OUT.read_text()) if _OUT.exists() else []
    rows = [row for row in rows if (row["engine"], row["clients"]) != (engine, clients)]
    order = list(_ENGINES)
    rows = sorted([*rows, line], key=lambda row: (order.index(row["engine"]), row["clients"]))
    _OUT.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def _local(recipe: Recipe, clients: int) -> tuple[dict[str, Any], float]:
    # Of a thousand clients each holds an image or two of the digits.
    shares = partition(read_data(recipe).train, by="iid", clients=clients, seed=0)
    engine = LocalEngine(shares, rules=Privacy(min_images=1))
    with _memory(_below_this) as memory:
        times = time_rounds(engine, recipe, 5)
    return times, max(memory)


def _simulation(recipe: Recipe, clients: int) -> tuple[dict[str, Any], float]:
    with _memory(_below_this) as memory, simulation(recipe) as grid:
        times = time_rounds(FlowerEngine(grid, clients=clients, patience=300), recipe, 3)
    return times, max(memory)


def _deployment(recipe: Recipe, clients: int) -> tuple[dict[str, Any], float]:
    sys.path.insert(0, str(_ROOT.parent / "examples" / "flower-deployment"))
    from deployment import Deployment  # type: ignore[import-not-found]

    # In memory where that can be: the SuperLink's SQLite file makes nodes that answer together wait for the disk.
    memory_disk = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory_disk if memory_disk.exists() else None) as folder:
        out = Path(folder) / "seconds.json"
        repeats = 3 if clients < 10 else 1  # a round takes a minute then
        changed = f"federation.clients={clients} data.validation=0 train.local_epochs=1"
        with Deployment(Path(folder) / "sites", clients) as sites, _memory(sites.processes) as memory:
            status, log = sites.run_app(_ROOT / "engine_app", out=str(out), set=changed, repeats=repeats)
        if status != "finished:completed":
            raise RuntimeError(log)
        times: dict[str, Any] = json.loads(out.read_text())
        return times, max(memory)


@contextmanager
def _memory(processes: Callable[[], Iterable[int]]) -> Iterator[list[float]]:
    """Collect the megabytes that ``processes()`` hold together, until the context ends."""
    found: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            found.append(sum(_pss(number) for number in list(processes())) / 1e3)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def _below_this() -> set[int]:
    """Return this process and all below it, those of Ray that have no parent left included."""
    parents, found = {}, {os.getpid()}
    for process in psutil.process_iter(["ppid", "cmdline"]):
        parents[process.pid] = process.info["ppid"]
        if "ray" in "".join((process.info["cmdline"] or [])[:1]):
            found.add(process.pid)
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _pss(number: int) -> float:
    """Return the proportional set size of a process in kilobytes, 0 where it has ended."""
    try:
        return float(psutil.Process(number).memory_full_info().pss / 1024)
    except psutil.Error:
        return 0.0


_ENGINES = {"local": _local, "simulation": _simulation, "deployment": _deployment}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
