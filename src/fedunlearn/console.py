"""What a person sees: progress while a run works, and its table at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedunlearn.audits.table import FIGURES
from fedunlearn.audits.verdict import FEWEST, INDISTINGUISHABLE, NO_VERDICT, unseen
from fedunlearn.checkpoint import Weights
from fedunlearn.data.images import in_both
from fedunlearn.evidence.comparison import blind, summary, telling
from fedunlearn.evidence.speedup import to_equal_r
from fedunlearn.evidence.words import MODELS, apart, certainty, chosen, clipped
from fedunlearn.methods.base import Method
from fedunlearn.methods.table import METHODS
from fedunlearn.run.experiment import Experiment
from fedunlearn.run.inputs import normalised_by
from fedunlearn.run.recipe import Recipe
from fedunlearn.run.result import knew
from fedunlearn.tabular import percent

_ANY_WIDTH = 10_000
# Columns of the tables that a narrow screen can do without, those that say least first.
_SPARED = {
    "parameters": "para-\nmeters",
    "client samples": "client\nsamples",
    "client GFLOP": "client\nGFLOP",
    "U, delivered": "U, de-\nlivered",
    "speed-up": "speed-\nup",
    "sd away": "sd away",
    "band": "band",
}
_STILL_NAMED = 0.1  # U with the row kept above which the reader is warned
_PHASES = {
    "train": "training the original",
    "measure": "measuring channels",
    "reestimate": "re-estimating batch normalisation",
    "repair": "repairing",
    "check": "counting what is still named",
    "finetune": "fine-tuning only",
    "erase_only": "the erase step with nothing pruned",
    "l1_sparse": "fine-tuning with an L1 penalty",
    "neg_grad": "NegGrad+",
    "salun": "SalUn",
    "negate": "training after negation",
    "distil": "distilling without the class",
    "ssd": "summing squared gradients",
    "svd": "summing second moments",
    "relabel": "training with other labels",
    "scrub": "SCRUB",
    "retrain": "retraining",
    "audit": "auditing, a model a step",
    "evaluate": "measuring on the test images",
}


_BLOCKS = ("original", "pruned")  # controls that result.json has a block of its own for


class RunProgress:
    """A bar per phase; a context manager.

    Args:
        console: a terminal, or a log, where there is a line for each finished phase; standard error where None.
        every: in a log, a line for each step.

    Example:
        >>> import fedunlearn as fu
        >>> train, test = fu.read_digits()
        >>> engine = fu.LocalEngine(fu.partition(train, by="iid", clients=3, seed=0))
        >>> with fu.RunProgress() as progress:
        ...     fed = fu.Federation(engine, fu.Journal(observe=progress.observe))
        ...     net = fu.build_model("small-cnn", classes=10, colours=1)
        ...     net = fu.train_rounds(net, fed, fu.Training(0.1), rounds=1)
    """

    def __init__(self, console: Console | None = None, *, every: bool = False) -> None:
        console = console or Console(stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        self._console = console
        self._progress = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._told: set[str] = set()
        self._every = every

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._progress.stop()

    def observe(self, phase: str, done: int, planned: int) -> None:
        """Show that ``done`` of ``planned`` steps of ``phase`` are finished."""
        if not self._console.is_terminal:
            line = f"{_phase_text(phase)}: {'done' if done == planned else f'{done} of {planned}'}"
            if (done == planned or (self._every and done)) and line not in self._told:
                self._told.add(line)
                self._console.print(line, highlight=False, soft_wrap=True)
            return
        self._progress.start()  # not before there is something to show: an error then stands alone
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(_phase_text(phase), total=planned)
        self._progress.update(self._tasks[phase], completed=done)


def _phase_text(phase: str) -> str:
    part, _, step = phase.rpartition(".")
    name, _, number = step.partition("-")
    text = _PHASES.get(name, name)
    if number.isdigit() and number != "0":
        text += f" for class {int(number) + 1} in turn"
    elif number and not number.isdigit():
        text += f" ({number})"
    if part.startswith("attempt-"):
        return f"{text} ({part.removeprefix('attempt-')} % pruned)"
    return text + (f" ({MODELS.get(part, part)})" if part not in ("", "method") else "")


def describe(experiment: Experiment, weights: Weights | None = None) -> str:
    """Return what is about to run: images, clients and classes.

    Args:
        experiment: what was set up.
        weights: of the model that is audited; those of the experiment where None.
    """
    sizes = experiment.table.sum(1).sort().values
    per_class = experiment.table.sum(0).sort().values
    holders = (experiment.table > 0).sum(0)
    train, test = experiment.splits
    everything = experiment.all_classes
    held, unseen = experiment.table.sum(0).tolist(), test.counts().tolist()
    forgotten = "".join(
        f"to forget: class {everything.index(train.classes[label])} ({escape(train.classes[label])}), {held[label]} "
        f"images to train on and {unseen[label]} to test with\n"
        for label in experiment.forget
    )
    used, precision = int(sizes.sum()), experiment.recipe.compute.precision
    names = ", ".join(escape(experiment.all_classes[label]) for label in experiment.earlier)
    before = f"forgotten before, so without images now: {names}\n" if names else ""
    both = in_both(train, test)
    seen = (
        f"{both} of the test images are training images too: what is measured on them proves nothing\n" if both else ""
    )
    return (
        f"{len(train)} training and {len(test)} test images in {len(train.classes)} classes\n{seen}"
        f"{before}{forgotten}{normalised_by(train, experiment.recipe, weights or experiment.weights)}\n"
        f"{len(sizes)} clients: {used} images to train on, {len(train) - used} held out for validation\n"
        f"{_from_to(int(sizes[0]), int(sizes[-1]))} images per client (median {sizes[len(sizes) // 2]}), "
        f"{_from_to(int(per_class[0]), int(per_class[-1]))} per class\n"
        f"each class is held by {_from_to(int(holders.min()), int(holders.max()))} clients"
        f"{'' if precision == 'auto' else f'; they compute in {precision}'}"
    )


def expected(seconds: float, recipe: Recipe, command: str) -> str:
    """Return how long the training of a command will take, in words."""
    minutes = seconds / 60
    time = (
        "less than a minute"
        if minutes < 1
        else f"about {minutes:.0f} minute{'s' * (round(minutes) != 1)}"
        if minutes < 90
        else f"about {minutes / 60:.1f} hours"
    )
    audited = ""
    if command in ("run", "audit"):
        # By its name, a network of one's own is not known.
        unknown = ":" in recipe.model.name or bool(recipe.audit.models)
        audited = f"; audits are not counted{'' if unknown else ', and retrained models from the cache take none'}"
    return f"training takes {time} from the start on this machine, if nothing else runs there{audited}"


def sharpness(experiment: Experiment, *, given: int = 0, client: str | None = None) -> str:
    """Return how wide the bands of the verdict will be, in words: before anything is trained for it.

    Args:
        experiment: what is about to run.
        given: retrained models that are there; as many as the recipe says will be made where 0.
        client: who audits with its own images; a client with validation images.
    """
    oracles = given or experiment.recipe.audit.oracles
    source = " (audit.oracles)" * (not given)
    if oracles < FEWEST:
        return f"no verdict: it takes at least {FEWEST} retrained models{source}, here are {oracles}"
    test = experiment.splits.test if client is None else experiment.validation[client]
    each = [int(test.counts()[label]) for label in experiment.forget]
    if not all(each):
        return "no verdict: there are no test images of a class to forget"
    deviations, accuracy = unseen(oracles, each)
    more = ", ".join(f"{unseen(n, each)[0]:.1f} with {n}" for n in (5, 10) if n > oracles)
    return (
        f"the verdict holds the model against {oracles} retrained ones{source}: a figure fails "
        f"{deviations:.1f} of their standard deviations from their mean{f' ({more})' * bool(more)}, an accuracy near "
        f"50 % on the {sum(each)} test images to forget {100 * accuracy:.0f} points from it or more"
    )


def _from_to(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def methods_table(methods: Iterable[Method]) -> Table:
    """Return what each method asks of the clients, and by which settings it is done."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("method", "needs", "settings", "source"):
        table.add_column(column)
    for method in methods:
        values = {} if method.settings is None else asdict(method.settings)
        given = [f"{key} {value:g}" for key, value in values.items() if value is not None]
        open_keys = [key for key, value in values.items() if value is None]
        shown = ", ".join([*given, *([f"{' and '.join(open_keys)} as the recipe"] if open_keys else [])])
        needs = method.needs + ("; replies are sums" if method.sums else "")
        name = method.name + ("" if method.name in METHODS else " (compare only)")
        table.add_row(name, needs, shown or "-", method.source or "-")
    table.add_row(
        "prune (the default)", escape("what [unlearn] and [erase] of the recipe say"), escape("all of [unlearn]"), "-"
    )
    return table


def comparison_table(value: Mapping[str, Any]) -> Table:
    """Return the table of a comparison: a row per method, means over seeds in percent."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    told = telling(value)
    for column in ("U", "R", FIGURES[told].label.replace(" ", "\n", 1), "speed-\nup"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in summary(value):
        figures = (row["u"], row["r"], row["figures"].get(told))
        speed = row["speedup"]
        table.add_row(
            row["name"],
            *("-" if pair is None else f"{100 * pair[0]:.1f}" for pair in figures),
            "-" if speed is None else f"{'' if row['reached'] else '> '}{speed[0]:.1f}",
            ", ".join(
                verdict + (f" ({count} of {row['seeds']} seeds)" if count < row["seeds"] else "")
                for verdict, count in row["verdicts"].items()
            )
            + ("; R outside its band" if "retain" in row["outside"] else ""),
        )
    for name in value["failed"]:
        table.add_row(escape(name), "-", "-", "-", "-", "failed")
    if not all(row["reached"] for row in summary(value)):
        table.caption = "> is a lower bound: a retrained model never was as good on validation images"
    return table


def result_table(result: Mapping[str, Any]) -> Table:
    """Return the table of a run: one row per model, accuracies in percent."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in (
        "U, de-\nlivered",
        "U, row\nkept",
        "R",
        "para-\nmeters",
        "client\nsamples",
        "client\nGFLOP",
        "speed-\nup",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    cost = result.get("cost", {})
    for name in ("model", "original", "pruned"):
        if name in result:
            table.add_row(name, *_figures(result[name], None))
    if "unlearned" in result:
        table.add_row("unlearned", *_figures(result["unlearned"], cost["unlearn"]), _speedup(result), style="bold")
    for name, block in result.get("controls", {}).items():
        if name not in _BLOCKS:
            table.add_row(MODELS.get(name, name), *_figures(block, block.get("cost")))
    took = result.get("retraining", {})
    for name, block in result.get("oracles", {}).items():
        table.add_row(f"{name} (kept)" if block["cached"] else name, *_figures(block, took.get(name)))
    table.columns = [column for column in table.columns if any(column.cells)]  # of one model there is no cost
    return table


def print_table(console: Console, table: Table) -> None:
    """Print ``table``; on a narrow screen, columns that say least are left out and named, digits never are.

    A screen that is too narrow even for the columns that stay wraps their lines.
    """
    options = console.options.update(max_width=_ANY_WIDTH)
    left: list[str] = []
    for name, header in _SPARED.items():
        if console.measure(table, options=options).maximum > console.width:
            columns = [column for column in table.columns if column.header == header]
            table.columns = [column for column in table.columns if column not in columns]
            left += [name] * len(columns)
    screen, console.width = console.width, max(console.width, console.measure(table, options=options).maximum)
    console.print(table, crop=False)
    console.width = screen
    if left:
        console.print(f"Not shown on a screen this narrow: {'; '.join(left)}.", highlight=False)


def audit_table(result: Mapping[str, Any], cannot_tell: Sequence[str] = ()) -> Table:
    """Return the figures of an audit beside their bands; ``cannot_tell`` as ``unable`` gives them."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("audit", no_wrap=True)
    for column in ("figure", "band", "sd away", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for name, figure in FIGURES.items():
        audit = result["audits"].get(name)
        if audit is not None:
            band = audit["band"] and " to ".join(percent(end, digits=2) for end in clipped(audit["band"], name))
            away = "" if audit["distance"] is None else f"{audit['distance']:+.1f}"
            counted = figure.fixed is not None
            shown = (
                (f"{audit['figure']:g} found", "", "")
                if counted
                else (percent(audit["figure"], digits=2), band or "", away)
            )
            said = "cannot tell" if name in cannot_tell and audit["verdict"] == "inside" else audit["verdict"]
            table.add_row(figure.label, *shown, said or "no band")
    return table


def verdict_line(result: Mapping[str, Any], cannot_tell: Sequence[str] = ()) -> str:
    """Return the verdict, why, and the figures outside their bands by what that means, with their distances."""
    audits = result["audits"]
    lines = [f"Verdict: {result['verdict']}: {result['reason']}."]
    if result["verdict"] != NO_VERDICT:
        for what, names in apart(audits):
            far = ", ".join(f"{FIGURES[name].label} {audits[name]['distance']:+.1f} sd" for name in names)
            lines.append(f"  {what}: {far}")
        open_ones = [FIGURES[name].label for name in cannot_tell if audits[name]["verdict"] == "inside"]
        if open_ones:
            lines.append(f"  cannot tell here, as the original or everything lies in the band: {', '.join(open_ones)}")
    if sure := certainty(result):
        lines.append(sure)
    return "\n".join(lines)


def comparison_notes(value: Mapping[str, Any]) -> str:
    """Return what a reader of the table of a comparison must know, a line each."""
    lines = []
    if len(value["seeds"]) == 1:
        lines.append("One seed: nothing is known of the spread.")
    if cannot := blind(value):
        labels = ", ".join(FIGURES[name].label for name in cannot)
        lines.append(f"Cannot tell here, as the original or everything lies in the band: {labels}.")
    passed = [name for name, verdict in value["controls"].items() if verdict == INDISTINGUISHABLE]
    if passed:
        lines.append(f"A pass counts for little here: {', '.join(MODELS[name] for name in passed)} passes too.")
    return "\n".join(lines)


def notes(result: Mapping[str, Any], cannot_tell: Sequence[str] = ()) -> str:
    """Return what a reader of the table must know, a line each; ``cannot_tell`` as ``unable`` gives them."""
    lines = ["Accuracy in % on test images: U on the forgotten classes, R on the others."]
    if "unlearned" in result:
        lines.append("Without its output row a class is never named (U = 0): read U with the row kept.")
    if "unlearned" in result and len(result["classes"]) - len(result["forget"]) == 1:
        lines.append("One class stays, which any model names: R is 100, and a ratio of costs to equal R says nothing.")
    if "fraction" in result:
        lines.append(chosen(result["fraction"]))
    compared = to_equal_r(result)
    if compared is not None:
        lines.append(
            "Retrained: cost until as good as the unlearned model on validation images. Speed-up: ratio of GFLOP, "
            f"{compared.beside}; with all rounds {compared.whole:.1f}x."
        )
        if compared.late:
            rounds = result["recipe"]["train"]["rounds"]
            lines.append(f"{compared.never} as good as the unlearned model in {rounds} rounds: > is a lower bound.")
        if not result["cost"]["retrain"]["validation_unseen"]:
            lines.append("The original's weights may have seen the validation images: the speed-up may be too high.")
    elif "unlearned" in result and not result.get("oracles"):
        how = "audit.oracles = 5" if "oracles" in result else "fedunlearn run, with the same --weights if any"
        lines.append(f"To compare with retraining: {how}.")
    epsilon = result.get("privacy", {}).get("epsilon")
    if epsilon is not None:
        lines.append(
            f"Noise: epsilon {epsilon:.3g} at delta {result['privacy']['delta']:g}, of one image in what was measured."
        )
    if "verdict" in result:
        lines.append(verdict_line(result, cannot_tell))
    elif "unlearned" in result and not knew(result["original"]["accuracy"], len(result["classes"])):
        u = result["original"]["accuracy"]["forget_row_kept"]
        lines.append(
            f"THE ORIGINAL NEVER KNEW IT: it names {100 * u:.0f} % of the class, no more than by chance. There was "
            "nothing to forget: train it for longer (train.rounds)."
        )
    left = result.get("unlearned", {}).get("accuracy", {}).get("forget_row_kept") or 0.0
    if left > _STILL_NAMED and result.get("verdict", NO_VERDICT) == NO_VERDICT:
        lines.append(f"NOT FORGOTTEN: with its row kept, {100 * left:.0f} % are named. Prune more or repair longer.")
    return "\n".join(lines)


def _figures(block: Mapping[str, Any], cost: Mapping[str, Any] | None) -> tuple[str, ...]:
    accuracy = block["accuracy"]
    shares = (accuracy["forget"], accuracy["forget_row_kept"], accuracy["retain"])
    spent = ("", "") if cost is None else (f"{cost['client_samples']:,}", f"{cost['client_flops'] / 1e9:,.1f}")
    return (*(percent(share, digits=2) for share in shares), f"{block['parameters']:,}", *spent)


def _speedup(result: Mapping[str, Any]) -> str:
    compared = to_equal_r(result)
    return "" if compared is None else f"{compared.bound}{compared.mean:.1f}x"
