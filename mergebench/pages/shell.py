"""The frame of every page: one file that loads nothing, and whose policy forbids it to."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mergebench.core.errors import shortened
from mergebench.core.text import cell, written
from mergebench.pages.colours import DIVERGING, SEQUENTIAL, colours

#: Where style, frame and the scripts of all pages are.
_OURS = "mergebench.pages"
#: Most characters of one text: names come from files, and may be of any length.
_LONGEST = 2000


def render(package: str, template: str, values: Mapping[str, Any], script: str = "") -> str:
    """A whole page.

    Parameters
    ----------
    package : str
        Whose folder ``templates`` has the template; it extends ``shell.html``.
    template : str
    values : mapping
        Of the template. Texts are escaped.
    script : str, optional
        A file in the same folder, run after ``tables.js``, which sorts tables.

    Returns
    -------
    str
        HTML that loads nothing, and whose policy forbids it to; the same text for the same values.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader(_OURS)]),
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
    parts = [_source(_OURS, "tables.js"), *([_source(package, script)] if script else [])]
    code = Markup("".join(parts))  # noqa: S704
    policy = (
        f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(code)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    frame = {"style": style, "script": code, "policy": policy}
    return environment.get_template(template).render({**values, **frame})


def _shown(value: Any) -> Any:
    """A text of a page: not endless, and nothing in it that turns what follows around."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return cell(shortened(value, _LONGEST))
    return value


def _source(package: str, name: str) -> str:
    text = files(package).joinpath("templates", name).read_text("utf-8")
    # A browser reads line ends so before it compares digests.
    return text.replace("\r\n", "\n")


def _digest(text: str) -> str:
    """How a policy names a style or a script: by what it holds."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
