"""The page and the picture of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from mergebench.merge.fit import tables
from mergebench.merge.fit.tables import Record, number, seconds
from mergebench.pages.drawing import GRID, INK, PAPER, SCREEN, SERIES, plain_name, plain_style, png
from mergebench.pages.shell import render
from mergebench.pages.svg import inline_svg

#: Most parameters that have a picture of their own.
_PARAMETERS = 12


def history_page(data: Record) -> str:
    """The whole page.

    Parameters
    ----------
    data : mapping
        As :meth:`mergebench.merge.fit.search.Found.to_json` gives it, or
        :func:`mergebench.merge.fit.grid.record`.

    Returns
    -------
    str
        As of :func:`mergebench.pages.shell.render`.
    """
    trials = data["trials"]
    names = ", ".join(data["tasks"])
    about = "Grid" if data["sampler"] == "grid" else "Search"
    how = f", sampled by {data['sampler']} with seed {data['seed']}" if about == "Search" else ""
    values = {
        "data": data,
        "title": f"{about} of {data['method']}: {len(trials)} trial{'s'[: len(trials) != 1]}",
        "lead": f"Scores of {names} on {data['select']}{how}.",
        "said": sentences(data),
        "problems": [(f"{each['number'] + 1}, {each['label']}", each["problem"])
                     for each in trials if each["problem"]],
        "figures": list(_figures(data)),
        "table": tables.trials(data),
        "recipe": yaml.safe_dump(data["recipe"], sort_keys=False, allow_unicode=True).splitlines(),
        "newline": Markup("\n"),
    }  # fmt: skip
    return render("mergebench.merge.fit.html", "history.html", values)


def history_picture(data: Record, resolution: int) -> bytes:
    """Scores by trial, and by every parameter, for papers."""
    names = _parameters(data)
    columns = min(len(names), 3) if names else 1
    lines = 1 + -(-len(names) // columns)
    with plain_style():
        figure = Figure(figsize=(2.3 * max(columns, 2), 1.9 * lines), layout="constrained")
        grid = figure.add_gridspec(lines, columns)
        _draw_history(figure.add_subplot(grid[0, :]), data, PAPER)
        for place, name in enumerate(names):
            _draw_parameter(
                figure.add_subplot(grid[1 + place // columns, place % columns]), data, name, PAPER
            )
        return png(figure, resolution)


def sentences(data: Record) -> list[str]:
    """What one would say of it."""
    trials = data["trials"]
    best = next(each for each in trials if each["label"] == data["chosen"])
    said = [f"The best is trial {best['number'] + 1}: {best['label']}, {number(best['value'])}."]
    first = trials[0]
    if first is not best and first["value"] is not None:
        said.append(f"The first, {first['label']}, has {number(first['value'])}.")
    for state, words in (
        ("pruned", "given up before all tasks were scored"),
        ("failed", "without a score, because a scorer failed"),
        ("refused", "with values that the method does not take together"),
    ):
        count = sum(each["state"] == state for each in trials)
        if count:
            said.append(f"{count} of {len(trials)} trials were {words}.")
    spent = sum(each["seconds"] for each in trials)
    said.append(f"Merging and scoring took {seconds(spent)} s.")
    return said


def _parameters(data: Record) -> list[str]:
    """Those whose values can be put on an axis."""
    first = data["trials"][0]["values"]
    return [name for name, value in first.items() if _is_number(value)][:_PARAMETERS]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figures(data: Record) -> Sequence[Mapping[str, Any]]:
    done = [each for each in data["trials"] if each["value"] is not None]
    top = max(each["value"] for each in done)
    words = (
        f"{len(data['trials'])} trials; values from {number(min(e['value'] for e in done))} to "
        f"{number(top)}"
    )
    found = []
    with plain_style():
        figure = Figure(figsize=(3.6, 2.3), layout="constrained")
        _draw_history(figure.subplots(), data, SCREEN)
        found.append(_drawn(figure, 0, "By trial", words))
        for place, name in enumerate(_parameters(data), start=1):
            figure = Figure(figsize=(3.6, 2.3), layout="constrained")
            _draw_parameter(figure.subplots(), data, name, SCREEN)
            best = next(each for each in done if each["label"] == data["chosen"])
            about = f"The best has {name} = {best['values'][name]:g}; " + words
            found.append(_drawn(figure, place, name, about))
    return found


def _drawn(figure: Figure, place: int, title: str, words: str) -> Mapping[str, Any]:
    svg = Markup(inline_svg(figure, f"f{place}", title, words))  # noqa: S704
    return {"title": title, "svg": svg}


def _draw_history(at: Any, data: Record, inks: Mapping[str, str]) -> None:
    done = [each for each in data["trials"] if each["value"] is not None]
    places = [each["number"] + 1 for each in done]
    at.plot(places, [each["value"] for each in done], linestyle="", marker="o", markersize=3.5,
            color=inks[SERIES[0]])  # fmt: skip
    best = [max(each["value"] for each in done[: end + 1]) for end in range(len(done))]
    last = len(data["trials"])
    at.step([*places, last], [*best, best[-1]], where="post", color=inks[SERIES[1]], linewidth=1.2)
    low = min(each["value"] for each in done)
    for state, mark in (("pruned", "x"), ("failed", "v"), ("refused", "v")):
        some = [each["number"] + 1 for each in data["trials"] if each["state"] == state]
        at.plot(some, [low] * len(some), linestyle="", marker=mark, markersize=4, color=inks[INK])
    _finish(at, "trial", inks)


def _draw_parameter(at: Any, data: Record, name: str, inks: Mapping[str, str]) -> None:
    done = [each for each in data["trials"] if each["value"] is not None]
    for each in done:
        best = each["label"] == data["chosen"]
        at.plot([each["values"][name]], [each["value"]], linestyle="", marker="D" if best else "o",
                markersize=5 if best else 3.5, color=inks[SERIES[1 if best else 0]])  # fmt: skip
    if name in data["log"]:
        at.set_xscale("log")
    _finish(at, plain_name(name), inks)


def _finish(at: Any, title: str, inks: Mapping[str, str]) -> None:
    at.set_xlabel(title, fontsize=7, color=inks[INK], labelpad=1)
    at.set_ylabel("mean", fontsize=7, color=inks[INK], labelpad=1)
    at.tick_params(which="both", labelsize=7, colors=inks[INK], width=0.5)
    at.grid(color=inks[GRID], linewidth=0.5)
    at.set_axisbelow(True)
    for spine in at.spines.values():
        spine.set(edgecolor=inks[GRID], linewidth=0.7)
    at.patch.set_visible(False)
