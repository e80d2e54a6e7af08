"""All pictures of a report as PNG."""

from __future__ import annotations

from matplotlib.figure import Figure

from mergebench.core.text import short_labels
from mergebench.pages.drawing import plain_style, png
from mergebench.spectral.html.curves import PANELS, panels_of
from mergebench.spectral.html.figures import curves_figure, map_figure, matrix_figure
from mergebench.spectral.html.matrices import matrices
from mergebench.spectral.html.quantities import grid_of, quantities
from mergebench.spectral.report import Record


def pictures(data: Record, dots: int) -> list[tuple[str, bytes]]:
    """Names and contents: maps, singular values, matrices of models.

    Parameters
    ----------
    data : record
        As ``Report.to_json`` gives it.
    dots : int
        Per inch.
    """
    labels = short_labels([each["label"] for each in data["models"]])
    grid = grid_of(data)
    found: list[tuple[str, Figure]] = []
    with plain_style():
        mapped = [each for each in quantities(data) if grid.layers and each.span is not None]
        found += [(each.key, map_figure(each, grid, labels)) for each in mapped]
        if panels := panels_of(data):
            found.append(("singular-values", curves_figure(panels[:PANELS], labels)))
        found += [(f"models-{m.key}", matrix_figure(m, labels)) for m in matrices(data)]
        return [(name, png(figure, dots)) for name, figure in found]
