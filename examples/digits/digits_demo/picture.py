"""One picture: the seven domains, the accuracy of every model, and the choice of λ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .data import DOMAINS, UPRIGHT, in_domain, load_splits
from .summary import Row

_EXAMPLES = 4
#: Inches of a bar, and how many curves can be told apart.
_ROW, _CURVES = 0.24, 12
_COLOURS = {
    "base": "#777777",
    "experts": "#4c78a8",
    "single": "#9ecae9",
    "merge": "#e45756",
    "apart": "#54a24b",
}


def draw(rows: Sequence[Row], seed: int, path: Path) -> None:
    """Save the picture of ``rows`` as PNG; ``seed`` picks the digits that are shown."""
    tall = max(6.5, _ROW * len(rows))
    figure = Figure(figsize=(13, 2.5 + tall), layout="constrained")
    FigureCanvasAgg(figure)
    halves = np.asarray(figure.subfigures(2, 1, height_ratios=(2.5, tall)))
    top, bottom = halves[0], halves[1]
    _samples(list(top.subplots(1, 1 + len(DOMAINS))), seed)
    bars, curves = bottom.subplots(1, 2, width_ratios=(1.25, 1))
    _bars(bars, rows)
    _curves(curves, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _samples(axes: Sequence[Axes], seed: int) -> None:
    """Show the same test digits in every domain, stacked in a square."""
    test = load_splits(seed)["test"]
    for ax, domain in zip(axes, (UPRIGHT, *DOMAINS), strict=True):
        shown = in_domain(test, domain, (seed, 1)).images[:_EXAMPLES]
        framed = np.pad(shown, ((0, 0), (0, 1), (0, 1)), constant_values=0.5)
        ax.imshow(np.block([[framed[0], framed[1]], [framed[2], framed[3]]]), cmap="gray_r")
        ax.set_title(domain)
        ax.set_axis_off()


def _bars(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw average accuracy with spread over seeds, and the upright control as a tick."""
    places = np.arange(len(rows))[::-1]
    spreads = [row.average.spread or 0.0 for row in rows]
    colours = [_COLOURS[row.role] for row in rows]
    averages = [row.average.mean for row in rows]
    ax.barh(places, averages, xerr=spreads, color=colours, capsize=3)
    upright = [row.upright.mean for row in rows]
    ax.plot(upright, places, "k|", markersize=12, label="upright digits (control)")
    ax.axvline(averages[0], color=_COLOURS["base"], linewidth=1, linestyle=":")
    ax.set_yticks(places, [row.title for row in rows])
    ax.set_xlim(0, 100)
    ax.set_xlabel("test accuracy, mean of the six domains (%)")
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _curves(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw the validation accuracy of the best merges over their grids of λ."""
    searched = [row for row in rows if row.role == "merge" and len(row.curve) > 1]
    best = sorted(searched, key=lambda row: -max(each.mean for each in row.curve.values()))
    for row in [row for row in searched if row in best[:_CURVES]]:
        lams = [float(lam) for lam in row.curve]
        means = np.array([each.mean for each in row.curve.values()])
        spreads = np.array([each.spread or 0.0 for each in row.curve.values()])
        adapters = "LoRA" in row.title
        (line,) = ax.plot(lams, means, "--" if adapters else "-", marker=".", label=row.title)
        if not adapters:
            ax.fill_between(
                lams, means - spreads, means + spreads, color=line.get_color(), alpha=0.15
            )
    base = next(row for row in rows if row.role == "base")
    ax.axhline(base.curve["0"].mean, color=_COLOURS["base"], linestyle=":", label=base.title)
    ax.set_xlabel("λ")
    ax.set_ylabel("validation accuracy, mean of the six domains (%)")
    ax.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.08))
