"""One self-contained page: words, maps, curves, matrices of models, tables, details."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mergebench.core.errors import shortened
from mergebench.core.text import cell, written
from mergebench.spectral.html.colours import DIVERGING, SEQUENTIAL, colours
from mergebench.spectral.html.context import context
from mergebench.spectral.report import Record

#: Most characters of one text: names come from files, and may be of any length.
_LONGEST = 2000


def page(data: Record) -> str:
    """The whole page.

    Parameters
    ----------
    data : record
        As :meth:`mergebench.spectral.report.Report.to_json` gives it.

    Returns
    -------
    str
        HTML that loads nothing, and whose policy forbids it to; the same text for the same data.
    """
    environment = Environment(
        loader=PackageLoader("mergebench.spectral.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["number"] = written
    scales = {"sequential": colours(SEQUENTIAL), "diverging": colours(DIVERGING)}
    # No name from a file is in either.
    style = Markup(environment.get_template("style.css").render(scales))  # noqa: S704
    script = Markup(_source("script.js"))  # noqa: S704
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template("report.html")
    return template.render(context(data), style=style, script=script, policy=policy)


def _shown(value: Any) -> Any:
    """A text of a page: not endless, and nothing in it that turns what follows around."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return cell(shortened(value, _LONGEST))
    return value


def _source(name: str) -> str:
    text = files("mergebench.spectral.html").joinpath("templates", name).read_text("utf-8")
    # A browser reads line ends so before it compares digests.
    return text.replace("\r\n", "\n")


def _digest(text: str) -> str:
    """How a policy names a style or a script: by what it holds."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
