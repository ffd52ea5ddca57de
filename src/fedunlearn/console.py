"""What a person sees: progress while a run works, and its table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedunlearn.setting import Setting

_PHASES = {
    "train": "training the original",
    "measure": "measuring channels",
    "reestimate": "re-estimating batch normalisation",
    "repair": "repairing",
    "finetune": "fine-tuning only, for comparison",
    "retrain": "retraining, for comparison",
}


class RunProgress:
    """A bar per phase on standard error; a context manager."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._progress.stop()

    def observe(self, phase: str, done: int, planned: int) -> None:
        """Show that ``done`` of ``planned`` steps of ``phase`` are finished."""
        self._progress.start()  # not before there is something to show: an error then stands alone
        if phase not in self._tasks:
            name, _, number = phase.partition("-")
            text = _PHASES[name] + (f" for class {int(number) + 1} in turn" if number not in ("", "0") else "")
            self._tasks[phase] = self._progress.add_task(text, total=planned)
        self._progress.update(self._tasks[phase], completed=done)


def describe(setting: Setting) -> str:
    """Return what is about to run: images, clients and classes."""
    sizes = setting.table.sum(1).sort().values
    holders = (setting.table > 0).sum(0)
    train, test = setting.splits
    names = ", ".join(f"{label} ({train.classes[label]})" for label in setting.forget)
    per_class = setting.table.sum(0).sort().values
    held = int(sizes.sum())
    return (
        f"{len(train)} training and {len(test)} test images in {len(train.classes)} classes; forget {names}\n"
        f"{len(sizes)} clients train on {held}, each with one of them, and hold out {len(train) - held} to choose by\n"
        f"per client {sizes[0]}/{sizes[len(sizes) // 2]}/{sizes[-1]} images (smallest/median/largest); "
        f"per class {per_class[0]} to {per_class[-1]}, at {int(holders.min())} to {int(holders.max())} clients"
    )


def result_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a run: one row per model, accuracies in percent."""
    caption = "Accuracy in % on test images: U on the forgotten classes, R on the others."
    if not result.get("cost", {}).get("retrain", {}).get("validation_unseen", True):
        caption += "\nThe original's weights may have seen the validation images: the speed-up may be too high."
    table = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in ("U", "U, row\nkept", "R", "parameters", "client\nsamples", "speed-up"):
        table.add_column(column, justify="right", no_wrap=True)
    cost = result.get("cost", {})
    for name in ("model", "original", "pruned"):
        if name in result:
            table.add_row(name, *_figures(result[name], None))
    if "unlearned" in result:
        table.add_row("unlearned", *_figures(result["unlearned"], cost.get("unlearn")), _speedup(result), style="bold")
    for block in result.get("controls", {}).values():
        table.add_row("fine-tuning only", *_figures(block, block["cost"]))
    for block in result.get("oracles", {}).values():
        table.add_row("retrained" + (" (kept)" if block["cached"] else ""), *_figures(block, cost.get("retrain")))
    return table


def _figures(block: Mapping[str, Any], cost: Mapping[str, Any] | None) -> tuple[str, ...]:
    accuracy = block["accuracy"]
    shares = (accuracy["forget"], accuracy["forget_row_kept"], accuracy["retain"])
    samples = "" if cost is None else f"{cost['client_samples']:,}"
    return (*(_percent(share) for share in shares), f"{block['parameters']:,}", samples)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.2f}"


def _speedup(result: Mapping[str, Any]) -> str:
    if "speedup" not in result:
        return ""
    at_least = "" if result["cost"]["retrain"]["reached"] else "> "
    return f"{at_least}{result['speedup']['client_flops']:.1f}x"
