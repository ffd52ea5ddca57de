"""The templates of the pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedunlearn.evidence.words import clipped
from fedunlearn.tabular import amount, percent


def rendered(name: str, values: Mapping[str, Any]) -> str:
    """Return the template ``name`` filled with ``values``; in HTML all of them are text."""
    import jinja2  # slow to import: who only wants a table needs no page

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedunlearn", "evidence/templates"),
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": percent, "clipped": clipped, "signed": signed, "amount": amount}
    return environment.get_template(name).render(values)


def signed(distance: float) -> str:
    """Return a distance with its sign; what rounds to 0 has none."""
    text = f"{distance:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")
