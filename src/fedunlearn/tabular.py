"""Results that print as a table: as text, in a notebook, as a data frame."""

from __future__ import annotations

import html
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fedunlearn.errors import FedUnlearnError


class Tabular(ABC):
    """A result with rows; ``print`` and notebooks show a line of words above them."""

    @abstractmethod
    def table(self) -> list[dict[str, Any]]:
        """Return a row per line of the table, by name of the column."""

    @abstractmethod
    def headline(self) -> str:
        """Return what a reader must know first, in one line."""

    @abstractmethod
    def cells(self) -> list[Sequence[str]]:
        """Return the rows as people read them, the names of the columns first."""

    def to_frame(self) -> Any:
        """Return the table as a ``pandas.DataFrame``.

        Raises:
            FedUnlearnError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise FedUnlearnError(
                "to_frame() needs pandas, which is not installed: pip install 'fedunlearn[frames]', or take "
                "table(), a list of rows"
            ) from error
        return pandas.DataFrame(self.table())

    def __str__(self) -> str:
        rows = self.cells()
        wide = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        ends = len(wide) - 1
        lines = [
            "  ".join(
                cell if place == ends else cell.ljust(wide[0]) if place == 0 else cell.rjust(wide[place])
                for place, cell in enumerate(row)
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.headline(), *(lines if len(lines) > 1 else ())])

    def _repr_html_(self) -> str:
        """Return the same for a notebook."""
        head, *rows = self.cells()
        lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        body = "".join(f"<tr>{line}</tr>" for line in (names, *lines))
        return f"<table><caption>{html.escape(self.headline())}</caption>{body}</table>"


def amount(value: float) -> str:
    """Return a positive number with three digits that count, all before the point kept; a whole number as it is."""
    digits = 0 if float(value).is_integer() else max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f}"


def percent(share: float | None, *, digits: int = 1) -> str:
    """Return a share in percent; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.{digits}f}"
