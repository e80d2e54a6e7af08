"""Pictures: singular values, maps and matrices,."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mergebench.core.text import written
from mergebench.pages.colours import SEQUENTIAL, colour_map
from mergebench.pages.drawing import DASHES, GRID, INK, PAPER, SCREEN, SERIES, plain_name
from mergebench.spectral.html.curves import MODELS, Line, Panel
from mergebench.spectral.html.matrices import Matrix
from mergebench.spectral.html.quantities import Grid, Quantity


def panel_figure(panel: Panel, inks: Mapping[str, str] = SCREEN) -> Figure:
    """One type of modules, 3.4 × 2.3 inches; its heading is left to the page."""
    figure = Figure(figsize=(3.4, 2.3))
    figure.subplots_adjust(left=0.18, right=0.98, bottom=0.17, top=0.97)
    _draw_panel(figure.subplots(), panel, inks)
    return figure


def curves_figure(panels: Sequence[Panel], labels: Sequence[str]) -> Figure:
    """All panels on one page, with a legend, for papers."""
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.35 * columns + 0.2, 1.9 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for at, panel in zip(axes, panels, strict=False):
        _draw_panel(at, panel, PAPER)
        at.set_title(plain_name(panel.module), fontsize=8)
    for at in axes[len(panels) :]:
        at.set_axis_off()
    shown: dict[str, Any] = {}
    for at in axes:
        for line, name in zip(*at.get_legend_handles_labels(), strict=True):
            shown.setdefault(name, line)
    names = ["W0" if name == "base" else f"ΔW of {plain_name(labels[int(name)])}" for name in shown]
    figure.legend(list(shown.values()), names, loc="outside lower center", fontsize=7, ncols=3)
    return figure


def map_figure(quantity: Quantity, grid: Grid, labels: Sequence[str]) -> Figure:
    """Layers against modules, one map for each model (the first six), on one scale."""
    models = quantity.models[:MODELS]
    columns = min(len(models), 3)
    lines = -(-len(models) // columns)
    names = [plain_name(each) for each in grid.modules]
    wide = max(min(0.32 * len(names), 7.0), 1.2)
    high = min(0.14 * len(grid.layers), 8.0) + _inches(names) + 0.5
    figure = Figure(
        figsize=(
            wide * columns + _inches(plain_name(each) for each in grid.layers) + 1.2,
            high * lines,
        ),
        layout="constrained",
    )
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    low, top = quantity.span or (0.0, 1.0)
    image = None
    for number, (at, model) in enumerate(zip(axes, models, strict=False)):
        values = np.array(
            [[_float(quantity.cells.get((layer, module, model))) for module in grid.modules]
             for layer in grid.layers]
        )  # fmt: skip
        image = at.imshow(values, colour_map(SEQUENTIAL), vmin=low, vmax=top, aspect="auto",
                          interpolation="nearest")  # fmt: skip
        at.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        # Beside the first of each line: the others have the same layers.
        places = (
            range(0, len(grid.layers), -(-len(grid.layers) // 16)) if number % columns == 0 else []
        )
        at.set_yticks(places, [plain_name(grid.layers[each]) for each in places], fontsize=6)
        at.set_title("together" if model is None else plain_name(labels[model]), fontsize=8)
    for at in axes[len(models) :]:
        at.set_axis_off()
    if image is not None:
        bar = figure.colorbar(image, ax=list(axes[: len(models)]), shrink=0.6)
        bar.set_label(plain_name(quantity.name), fontsize=8)
        bar.ax.tick_params(labelsize=6)
    return figure


def matrix_figure(matrix: Matrix, labels: Sequence[str]) -> Figure:
    """Models against models, with the numbers written into the cells."""
    count = len(labels)
    names = [plain_name(each) for each in labels]
    side = min(0.62 * count, 8.0) + _inches(names) + 0.6
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    at = figure.subplots()
    values = np.array([[_float(each) for each in row] for row in matrix.values])
    low, top = matrix.span
    image = at.imshow(values, colour_map(matrix.scale), vmin=low, vmax=top)
    at.set_xticks(range(count), names, rotation=90, fontsize=7)
    at.set_yticks(range(count), names, fontsize=7)
    for row, held in enumerate(matrix.inks if count <= 16 else ()):
        for column, ink in enumerate(held):
            text = written(matrix.values[row][column])
            at.text(column, row, text, ha="center", va="center", fontsize=6, color=ink)
    bar = figure.colorbar(image, ax=at, shrink=0.7)
    bar.set_label(plain_name(matrix.name), fontsize=8)
    bar.ax.tick_params(labelsize=6)
    return figure


def _draw_panel(at: Any, panel: Panel, inks: Mapping[str, str]) -> None:
    at.set_xscale("log")
    at.set_yscale("log")
    if panel.base is not None:
        _draw_line(at, panel.base, inks[INK], (0, (1, 1)), "base")
    for model, line in panel.updates.items():
        _draw_line(at, line, inks[SERIES[model]], DASHES[model], str(model))
    for axis in (at.xaxis, at.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    at.set_xlabel("place", fontsize=7, color=inks[INK], labelpad=1)
    at.set_ylabel("σ", fontsize=8, color=inks[INK], labelpad=1)
    at.tick_params(which="both", labelsize=7, colors=inks[INK], width=0.5)
    at.grid(color=inks[GRID], linewidth=0.5)
    for spine in at.spines.values():
        spine.set(edgecolor=inks[GRID], linewidth=0.7)
    at.patch.set_visible(False)


def _draw_line(at: Any, line: Line, ink: str, dash: Any, label: str) -> None:
    single = "o" if line.place.size == 1 else None
    at.fill_between(line.place, line.low, line.high, color=ink, alpha=0.18, linewidth=0)
    at.plot(line.place, line.middle, color=ink, linestyle=dash, linewidth=1.4, label=label,
            marker=single, markersize=3)  # fmt: skip


def _float(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _inches(names: Iterable[str]) -> float:
    """Room for labels of 7 points."""
    return 0.065 * max(map(len, names), default=0)
