"""What opens for one matrix: compact data that the page's script draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergebench.core.errors import shortened
from mergebench.core.text import cell, written
from mergebench.spectral.diagnostic import DIAGNOSTICS
from mergebench.spectral.html.quantities import Grid
from mergebench.spectral.report import Record

#: Most rows (tensor and model) of a page, and most numbers between pairs.
ROWS, PAIRS = 2500, 20_000
_POINTS = 32
_DIRECTIONS = 32
_NAME = 300
_PARTS = ("base", "delta", "tuned")


def name_of(text: str) -> str:
    """A name as it is shown: at most 300 characters, nothing in it that turns text around."""
    return cell(shortened(text, _NAME))


def chosen(data: Record) -> list[Record]:
    """The tensors that a page lists: as many as fit, those that moved most, in model order."""
    changed = [
        each for each in data["tensors"] if any(m["state"] != "unchanged" for m in each["models"])
    ]
    room = max(ROWS // max(len(data["models"]), 1), 1)
    if len(changed) <= room:
        return changed
    ranked = sorted(changed, key=lambda each: (not each["decomposed"], -_moved(each)))
    kept = {each["tensor"] for each in ranked[:room]}
    return [each for each in changed if each["tensor"] in kept]


def details(data: Record, tensors: Sequence[Record], grid: Grid) -> dict[str, Any]:
    """Everything of some tensors.

    Returns
    -------
    dict
        ``heads`` (what numbers of each diagnostic are called), ``grids`` (places of singular
        values, which many matrices share), ``pairs`` (diagnostics between models), ``items``: ``n``
        name, ``s`` shape, ``w`` ‖W0‖, ``l`` and ``c`` row and column of maps or -1, ``b`` values
        of W0, ``p`` numbers between models, ``m`` models, each with ``i`` its place, ``x`` its
        state, ``d`` ‖ΔW‖, ``v`` texts by diagnostic, ``k`` values by part, ``u`` directions.
    """
    kept = {each["tensor"] for each in tensors}
    own: dict[str, dict[tuple[str, Any], Record]] = {}
    between: dict[str, dict[str, list[Record]]] = {}
    for name, found in data["diagnostics"].items():
        if name not in DIAGNOSTICS:
            continue
        for row in found["rows"]:
            if row["tensor"] not in kept:
                continue
            if row["other"] is None:
                own.setdefault(name, {})[row["tensor"], row["model"]] = row
            else:
                between.setdefault(name, {}).setdefault(row["tensor"], []).append(row)
    if sum(len(rows) for each in between.values() for rows in each.values()) > PAIRS:
        between = {}
    heads = {
        name: list(DIAGNOSTICS[name].headline(next(iter(rows.values()))))
        for name, rows in own.items()
    }
    places = _Places()
    layers = {name: number for number, name in enumerate(grid.layers)}
    modules = {name: number for number, name in enumerate(grid.modules)}
    items = []
    for record in tensors:
        inside = record["decomposed"] and record["layer"] in layers and record["module"] in modules
        items.append(
            {
                "n": name_of(record["tensor"]),
                "s": " × ".join(map(str, record["shape"])),
                "w": written(record["base_norm"]),
                "l": layers[record["layer"]] if inside else -1,
                "c": modules[record["module"]] if inside else -1,
                **_of_models(record, own, places),
                "p": _of_pairs(record["tensor"], between),
            }
        )
    return {"heads": heads, "pairs": list(between), "grids": places.held, "items": items}


class _Places:
    """Lists of places, each once."""

    def __init__(self) -> None:
        self.held: list[list[int]] = []
        self._known: dict[tuple[int, ...], int] = {}

    def number(self, places: tuple[int, ...]) -> int:
        if places not in self._known:
            self._known[places] = len(self.held)
            self.held.append(list(places))
        return self._known[places]


def _moved(record: Record) -> float:
    norm = max((each["norm"] or 0.0 for each in record["models"]), default=0.0)
    return float(norm / record["base_norm"]) if record["base_norm"] else float(norm)


def _of_models(
    record: Record, own: Mapping[str, Mapping[tuple[str, Any], Record]], places: _Places
) -> dict[str, Any]:
    name = record["tensor"]
    found: dict[str, Any] = {"m": []}
    for each in record["models"]:
        if each["state"] == "unchanged":
            continue
        model = each["model"]
        values = {
            kind: [written(v) for v in DIAGNOSTICS[kind].headline(rows[name, model]).values()]
            for kind, rows in own.items()
            if (name, model) in rows
        }
        held: dict[str, Any] = {
            "i": model, "x": each["state"], "d": written(each["norm"]), "v": values,
        }  # fmt: skip
        spectra = own.get("spectra", {}).get((name, model), {})
        curves = {part: _thinned(spectra.get(f"{part}_curve") or [], places) for part in _PARTS}
        if curves["base"] is not None:
            found["b"] = curves["base"]
        held["k"] = {p: curves[p] for p in ("delta", "tuned") if curves[p] is not None}
        directions = own.get("intruders", {}).get((name, model), {}).get("directions", [])
        if directions:
            held["u"] = [_direction(one) for one in directions[:_DIRECTIONS]]
        found["m"].append(held)
    together = {
        kind: [written(v) for v in DIAGNOSTICS[kind].headline(rows[name, None]).values()]
        for kind, rows in own.items()
        if (name, None) in rows
    }
    if together:
        found["t"] = together
    return found


def _direction(one: Mapping[str, Any]) -> list[Any]:
    below = [epsilon for epsilon, inside in one["intruder"].items() if inside]
    certified = one["status"] == "certified"
    found = [one["index"] + 1, written(one["sigma"]), written(one["cosine"])]
    found.append(written(one["bound"]) if certified else "")
    found.append("" if one["gap"] is None else f"{one['gap']:.2g}")
    return [*found, below[0]] if below else found


def _of_pairs(name: str, between: Mapping[str, Mapping[str, list[Record]]]) -> list[Any]:
    found: dict[tuple[int, int], list[str]] = {}
    for place, (kind, rows) in enumerate(between.items()):
        for row in rows.get(name, []):
            texts = found.setdefault((row["model"], row["other"]), ["–"] * len(between))
            texts[place] = written(next(iter(DIAGNOSTICS[kind].headline(row).values())))
    return [[*pair, texts] for pair, texts in found.items()]


def _thinned(curve: Sequence[Mapping[str, Any]], places: _Places) -> list[Any] | None:
    held = [(each["index"] + 1, each["sigma"]) for each in curve if each["sigma"]]
    if not held:
        return None
    if len(held) > _POINTS:
        at = np.unique(np.round(np.geomspace(1, len(held), _POINTS)).astype(int)) - 1
        # Places are spread in their logarithm already, unless all were asked for.
        spread = held[-1][0] > len(held)
        at = (
            np.unique(np.round(np.linspace(0, len(held) - 1, _POINTS)).astype(int))
            if spread
            else at
        )
        held = [held[each] for each in at]
    number = places.number(tuple(place for place, _ in held))
    return [number, [float(f"{sigma:.3g}") for _, sigma in held]]
