"""The tables of a recipe: their keys, defaults and ranges."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from fedunlearn.arguments import is_fraction
from fedunlearn.channels.scores import CRITERIA
from fedunlearn.data.batches import AUGMENTATIONS
from fedunlearn.data.readers import READERS
from fedunlearn.methods.table import METHODS
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.sgd import SCHEDULES

PRUNE = "prune"  # the method of this project, by all keys of [unlearn] and [erase]


def _among(table: Collection[str]) -> AfterValidator:
    """Return a check that a value is a name of ``table``: who adds a row there has nothing to add here."""

    def known(name: str) -> str:
        if name not in table:
            near = difflib.get_close_matches(name, table, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"Input should be one of {', '.join(table)}{hint}")  # pydantic says which key it is
        return name

    return AfterValidator(known)


def _fraction(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not is_fraction(value):
        raise ValueError('Input should be at least 0 and below 1, or "auto"')
    return float(value)


def _number_or_name(value: Any) -> int | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Integral) or isinstance(value, bool):  # "true" is a name, and true would be 1
        raise ValueError("Input should be the number or the name of a class, a name in quotes")
    return int(value)


Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**62)]  # torch takes 63 bits, and retrained models count on
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Table(BaseModel):
    """A table of a recipe: its keys are known, and stay as they were read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataTable(Table):
    """Where the images come from."""

    source: Annotated[str, _among(READERS)]
    path: str = ""
    validation: Share = 0.1
    official: bool = True
    size: Annotated[int, Field(ge=0)] = 0
    mean: list[float] = []
    std: list[float] = []


class FederationTable(Table):
    """Who holds them, and who runs the clients. ``clients = 0``: one per group."""

    clients: Annotated[int, Field(ge=0)] = 10
    partition: Literal["iid", "dirichlet", "bias", "group"] = "iid"
    alpha: Positive | None = None
    bias: Annotated[float, Field(ge=0, le=1)] | None = None
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    engine: str = "local"  # engines.py knows them
    deadline: Positive = 600.0
    seed: Seed = 0


class ModelTable(Table):
    """The architecture, and weights to start from."""

    name: str
    weights: str = ""
    shortcut: Literal["A", "B"] = "A"


class TrainTable(Table):
    """Training from fresh weights: the original and the retrained model."""

    rounds: Count
    local_epochs: Positive = 1.0
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Positive = 0.1
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    label_smoothing: Share = 0.0
    server_momentum: Share = 0.0
    validate_every: Count = 1
    augment: tuple[Annotated[str, _among(AUGMENTATIONS)], ...] = ()


class UnlearnTable(Table):
    """Forgetting: what, by which ranking, and the repair after it."""

    forget: tuple[Annotated[int | str, PlainValidator(_number_or_name)], ...]
    method: Annotated[str, _among((PRUNE, *METHODS))] = PRUNE
    settings: dict[str, int | float] = Field(default_factory=dict)  # of the method
    criterion: Annotated[str, _among(CRITERIA)] = "tf_idf"
    reference: Literal["class", "channel"] = "class"
    smoothing: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    hook: Literal["activation", "convolution"] = "activation"
    end: Literal["highest", "lowest"] = "highest"
    scope: Literal["layer", "global"] = "layer"
    fraction: Annotated[float | Literal["auto"], PlainValidator(_fraction)]
    jointly: bool = False
    mean_of_clients: bool = False
    influence: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    sample: Annotated[int, Field(ge=0)] = 0
    repair: Literal["none", "reestimate", "finetune"] = "finetune"
    rounds: Count = 1
    local_epochs: Positive = 1.0
    lr: Positive = 0.05
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # that of training where None
    schedule: Annotated[str, _among(SCHEDULES)] = "constant"
    server_momentum: Share = 0.0
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None  # that of the federation where None


class EraseTable(Table):
    """What clients do with images of the forgotten classes in the repair, see ``Erasing``; nothing by default."""

    complement: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    separation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    every: Annotated[int, Field(ge=1)] = 1

    def erasing(self) -> Erasing | None:
        """Return the settings of the erase step, None where both weights are 0."""
        return Erasing(**self.model_dump()) if self.complement or self.separation else None


class PrivacyTable(Table):
    """What leaves the clients when they are measured, see ``Privacy``; ``secure``: only the sum over all of them."""

    min_count: Annotated[int, Field(ge=0)] = 0
    clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    secure: bool = False


class ComputeTable(Table):
    """How clients of this process compute, see ``Compute``; ``auto``: all three as a probe of the machine finds best.

    ``workers = 0``: one per core.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    workers: Annotated[int, Field(ge=0)] = 0


ON_FLOWER = ComputeTable(precision="float32")


class AuditTable(Table):
    """How forgetting is judged: retrained models, images of each class for probes, rate of relearning.

    ``models``: the folder of a run whose retrained models to take, or one with such models alone.
    """

    oracles: Annotated[int, Field(ge=0)] = 3
    models: str = ""
    images: Annotated[int, Field(ge=10)] = 500
    lr: Positive = 0.05


class EvidenceTable(Table):
    """What the record says: the request it answers, who answers for it, and for how long it holds.

    ``feature_maps``: show test images, some of the forgotten class, in a report that may be passed on.
    """

    request: str = ""
    operator: str = ""
    valid_days: Annotated[int, Field(ge=1, le=36500)] = 365
    feature_maps: bool = False
