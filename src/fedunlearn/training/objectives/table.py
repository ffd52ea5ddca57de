"""All local objectives: what a message can ask a client to minimise."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from fedunlearn.training.objectives.ascend import Ascend
from fedunlearn.training.objectives.distil import Distil
from fedunlearn.training.objectives.erase import Erasing
from fedunlearn.training.objectives.relabel import Relabel
from fedunlearn.training.objectives.scrub import Scrub
from fedunlearn.training.objectives.sparse import Sparse

_Any = Erasing | Sparse | Ascend | Relabel | Distil | Scrub
Objective = Annotated[_Any, Field(discriminator="kind")]
OBJECTIVES: tuple[type, ...] = get_args(_Any)
