"""What the template of a page fills in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mergebench.core.text import short_labels, written
from mergebench.pages.colours import LEVELS, level
from mergebench.pages.drawing import plain_style
from mergebench.pages.svg import inline_svg
from mergebench.spectral.diagnostic import DIAGNOSTICS
from mergebench.spectral.html import words
from mergebench.spectral.html.curves import MODELS, PANELS, Panel, panels_of
from mergebench.spectral.html.details import chosen, details, name_of
from mergebench.spectral.html.figures import panel_figure
from mergebench.spectral.html.matrices import Matrix, matrices
from mergebench.spectral.html.quantities import Grid, Quantity, grid_of, quantities
from mergebench.spectral.report import Record

#: Most cells of all maps, pairs in words and in maps by layer, changes, and rows of a table.
_CELLS, _SAID, _PAIRS, _CHANGES, _TOTALS = 60_000, 60, 15, 300, 400
#: Most layers and modules of a map.
_LAYERS, _MODULES = 200, 60


def context(data: Record) -> dict[str, Any]:
    """What the template fills in."""
    labels = [name_of(each) for each in short_labels([e["label"] for e in data["models"]])]
    labels = [
        f"{label} (merge)" if each["merged"] else label
        for label, each in zip(labels, data["models"], strict=True)
    ]
    whole = grid_of(data)
    grid = Grid(whole.layers[:_LAYERS], whole.modules[:_MODULES], whole.left)
    mapped = [each for each in quantities(data) if each.span is not None]
    said = words.said(data, labels)
    tensors = chosen(data)
    panels = panels_of(data)
    rows, stack = words.short_layers(grid.layers)
    return {
        "data": data,
        "labels": labels,
        "title": f"Spectra of {', '.join(labels)}",
        "lead": words.lead(data, labels),
        **said,
        "paired": said["paired"][:_SAID],
        "paired_left": max(len(said["paired"]) - _SAID, 0),
        "grid": grid,
        "cut": len(whole.layers) > _LAYERS or len(whole.modules) > _MODULES,
        "stack": stack,
        "columns": list(zip(words.short_modules(grid.modules), grid.modules, strict=True)),
        "maps": list(_maps(mapped, grid, rows, labels)),
        "panels": [_panel(number, each, labels) for number, each in enumerate(panels[:PANELS])],
        "panels_left": [each.module for each in panels[PANELS:]],
        "drawn": list(range(min(len(labels), MODELS))),
        "matrices": [_matrix(each, labels) for each in matrices(data)],
        "totals": list(_totals(data, labels)),
        "quantities": mapped,
        "tensors": list(_rows(tensors, mapped, labels)),
        "left_out": len(data["tensors"]) - len(tensors),
        "changes": _changes(data, labels),
        "settings": json.dumps(
            {name: found["params"] for name, found in data["diagnostics"].items()}
            | {key: value for key, value in data["settings"].items() if value},
            ensure_ascii=False,
        ),
        "details": Markup(_json({"labels": labels} | details(data, tensors, grid))),  # noqa: S704
        "levels": LEVELS,
    }


def brief(value: float | None) -> str:
    """A number of at most three digits, for cells of maps."""
    if value is None:
        return ""
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    if 0.001 <= abs(value) < 1:
        return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"
    if 1 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _json(value: Any) -> str:
    """JSON that ends no script element, whatever names hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _maps(
    mapped: Sequence[Quantity], grid: Grid, rows: Sequence[str], labels: Sequence[str]
) -> Iterator[dict[str, Any]]:
    left = _CELLS
    area = max(len(grid.layers) * len(grid.modules), 1)
    for each in mapped:
        low, high = each.span or (0.0, 0.0)
        held = each.models[: max(left // area, 0)]
        left -= area * len(held)
        if held:
            yield {
                "quantity": each,
                "low": low,
                "high": high,
                "words": list(words.extremes(each, grid, labels)),
                "left": len(each.models) - len(held),
                "tables": [
                    {
                        "label": "all models together" if model is None else labels[model],
                        "model": model,
                        "rows": [
                            (name, [_cell(each.cells.get((layer, module, model)), low, high)
                                    for module in grid.modules])
                            for name, layer in zip(rows, grid.layers, strict=True)
                        ],
                    }
                    for model in held
                ],
            }  # fmt: skip


def _cell(value: float | None, low: float, high: float, letter: str = "v") -> tuple[str, str]:
    if value is None:
        return "", ""
    return f"{letter}{level(value, low, high)}", brief(value)


def _panel(number: int, panel: Panel, labels: Sequence[str]) -> dict[str, Any]:
    lines = [("W0", panel.base)] if panel.base else []
    lines += [(f"ΔW of {labels[model]}", line) for model, line in panel.updates.items()]
    text = "; ".join(
        f"{name}: σ falls from {written(float(line.middle[0]))} at place 1 to "
        f"{written(float(line.middle[-1]))} at place {line.place[-1]:.0f}"
        for name, line in lines
    )
    title = f"Singular values of {name_of(panel.module)}"
    with plain_style():
        svg = inline_svg(panel_figure(panel), f"curve{number}", title, f"Medians. {text}.")
    return {
        "module": name_of(panel.module),
        "matrices": panel.matrices,
        "svg": Markup(svg),  # noqa: S704  names in it went through an XML writer
        "words": text,
    }


def _matrix(matrix: Matrix, labels: Sequence[str]) -> dict[str, Any]:
    low, high = matrix.span
    letter = "b" if matrix.signed else "v"
    pairs = matrix.pairs[:_PAIRS]
    names, stack = words.short_layers(list(matrix.layers))
    return {
        "matrix": matrix,
        "low": low,
        "high": high,
        "letter": letter,
        "rows": [
            (label, [_cell(value, low, high, letter) for value in row])
            for label, row in zip(labels, matrix.values, strict=True)
        ],
        "pairs": [(labels[one], labels[other]) for one, other in pairs],
        "left": len(matrix.pairs) - len(pairs),
        "stack": stack,
        "layers": [
            (name, [_cell(row.get(pair), low, high, letter) for pair in pairs])
            for name, row in zip(names, matrix.layers.values(), strict=True)
        ][:_LAYERS],
    }


def _totals(data: Record, labels: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Tables of each diagnostic: whole models first, then types of modules."""
    for name, found in data["diagnostics"].items():
        if name not in DIAGNOSTICS or not found["rows"]:
            continue
        spec = DIAGNOSTICS[name]
        records = [*found["totals"]["all"], *found["totals"]["modules"]]
        yield {
            "name": name,
            "about": found["about"],
            "heads": list(spec.headline(records[0])),
            "rows": [
                (_who(each, labels), name_of(each["where"]),
                 [written(v) for v in spec.headline(each).values()])
                for each in records[:_TOTALS]
            ],
            "left": max(len(records) - _TOTALS, 0),
        }  # fmt: skip


def _who(record: Mapping[str, Any], labels: Sequence[str]) -> str:
    if record["model"] is None:
        return "together"
    one = labels[record["model"]]
    return one if record["other"] is None else f"{one} – {labels[record['other']]}"


def _rows(
    tensors: Sequence[Record], mapped: Sequence[Quantity], labels: Sequence[str]
) -> Iterator[tuple[int, str, str, str, list[str]]]:
    """A line for each tensor and model: place, name, model, shape, numbers."""
    own = [each for each in mapped if None not in each.models]
    for number, record in enumerate(tensors):
        for each in record["models"]:
            if each["state"] == "unchanged":
                continue
            key = (record["tensor"], each["model"])
            texts = [written(quantity.rows.get(key)) for quantity in own]
            shape = " × ".join(map(str, record["shape"]))
            yield number, name_of(record["tensor"]), labels[each["model"]], shape, texts


def _changes(data: Record, labels: Sequence[str]) -> dict[str, Any] | None:
    """What ``--against`` found: totals, then the largest relative changes of single tensors."""
    if "against" not in data:
        return None
    held = data["against"]

    def size(change: Mapping[str, Any]) -> float:
        top = max(abs(change["before"]), abs(change["after"]))
        return abs(change["after"] - change["before"]) / top if top else 0.0

    whole = [each for each in held["changes"] if each["scope"] == "all"]
    single = [each for each in held["changes"] if each["scope"] == "rows"]
    single.sort(key=lambda each: -size(each))
    shown = [*whole, *single][:_CHANGES]
    return {
        "path": name_of(held["path"]),
        "notes": held["notes"],
        "totals": len(whole),
        "rows": [
            (each["diagnostic"], _who(each, labels), name_of(each["where"]), each["quantity"],
             written(each["before"]), written(each["after"]),
             f"{each['after'] - each['before']:+.4g}")
            for each in shown
        ],
        "left": len(whole) + len(single) - len(shown),
    }  # fmt: skip
