"""One self-contained page: words, maps, curves, matrices of models, tables, details."""

from __future__ import annotations

from mergebench.pages.shell import render
from mergebench.spectral.html.context import context
from mergebench.spectral.report import Record


def page(data: Record) -> str:
    """The whole page.

    Parameters
    ----------
    data : record
        As :meth:`mergebench.spectral.report.Report.to_json` gives it.

    Returns
    -------
    str
        As of :func:`mergebench.pages.shell.render`.
    """
    return render("mergebench.spectral.html", "report.html", context(data), "script.js")
