"""The numbers of single matrices that a report maps: by layer and module, model by model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from mergebench.spectral.diagnostic import DIAGNOSTICS
from mergebench.spectral.report import Record

#: Of a matrix, and of a cell, which may hold several: their model last.
Place = tuple[str, str, int | None]
Tensor = tuple[str, int | None]

_FIRST = ("intruders", "norm", "spectra", "heavy_tail")
#: What pictures are called after, where that is not their diagnostic.
_KEYS = {"spectra": "effective-rank", "heavy_tail": "alpha"}
_NORM = "Frobenius norm of the update over that of the base: how far the matrix was moved."
_NORM_ALONE = "Frobenius norm of the update: how far the matrix was moved."
_WHAT = {
    "spectra": (
        "How many equal singular values would be as spread out as those of ΔW: the exponential "
        "of the entropy of σ/Σσ."
    ),
    "heavy_tail": (
        "Exponent of the power law that the largest eigenvalues of WᵀW follow; 2 to 6 is often "
        "called healthy. Empty where there are too few to fit."
    ),
    "rotation": "How far singular directions turned away from those of the base, by place.",
    "allocation": "Rank that the energy of ΔW asks for, within the budget of one rank everywhere.",
}


@dataclass(frozen=True, eq=False)
class Quantity:
    """One number of every matrix and model.

    Attributes
    ----------
    key : str
        Its own among all of a report; what its picture is called.
    name, what : str
        Heading, and what it means in a sentence.
    models : list of int or None
        ``None`` for all models together.
    cells : mapping of (layer, module, model) to float or None
        Matrices of one cell are combined as in the totals of the diagnostic.
    rows : mapping of (tensor, model) to float or None
    """

    key: str
    name: str
    what: str
    models: list[int | None]
    cells: Mapping[Place, float | None]
    rows: Mapping[Tensor, float | None]

    @property
    def span(self) -> tuple[float, float] | None:
        """The smallest and the largest value in a cell; counts begin at 0."""
        values = [each for each in self.cells.values() if each is not None]
        if not values:
            return None
        low = min(values)
        counted = all(isinstance(each, int) for each in values)
        return (min(0, low) if counted else low), max(values)


@dataclass(frozen=True)
class Grid:
    """Rows and columns of maps.

    Attributes
    ----------
    layers, modules : lists of str
        As rows of diagnostics name them.
    left : int
        Matrices that stand outside of blocks, and in no map.
    """

    layers: list[str]
    modules: list[str]
    left: int


def grid_of(data: Record) -> Grid:
    """Which layers and modules maps have: those of matrices in blocks, or of all if there are none.

    Stacks and modules follow the model, blocks their numbers.
    """
    matrices = [each for each in data["tensors"] if each["decomposed"] and _changed(each)]
    inside = [each for each in matrices if each["block"] is not None]
    shown = inside or matrices
    stacks = list(dict.fromkeys(each["stack"] for each in shown))
    ordered = sorted(shown, key=lambda each: (stacks.index(each["stack"]), each["block"] or 0))
    return Grid(
        list(dict.fromkeys(each["layer"] for each in ordered)),
        list(dict.fromkeys(each["module"] for each in ordered)),
        len(matrices) - len(shown),
    )


def quantities(data: Record) -> list[Quantity]:
    """All that can be mapped, what people ask for first in front.

    ‖ΔW‖ comes from the list of tensors; the others are leading numbers of those diagnostics that
    look at one model or at all together.
    """
    found = [("norm", _norm(data))]
    for name, result in data["diagnostics"].items():
        if result["rows"] and name in DIAGNOSTICS and name != "contribution":
            if any(row["other"] is not None for row in result["rows"]):
                continue
            found += [(name, each) for each in _of(name, result)]
    found.sort(key=lambda each: _FIRST.index(each[0]) if each[0] in _FIRST else len(_FIRST))
    first = list(dict.fromkeys(name for name, _ in found))
    # The first of each diagnostic, then what else it has, such as other thresholds.
    places: dict[str, int] = {}
    ranked = []
    for name, each in found:
        ranked.append(((places.setdefault(name, 0) > 0, first.index(name)), each))
        places[name] += 1
    return [each for _, each in sorted(ranked, key=lambda pair: pair[0])]


def _changed(record: Record) -> bool:
    return any(each["state"] == "changed" for each in record["models"])


def _norm(data: Record) -> Quantity:
    relative = data["base"] is not None
    squares: dict[Place, tuple[float, float]] = {}
    rows: dict[Tensor, float | None] = {}
    for record in data["tensors"]:
        for each in record["models"]:
            if each["state"] != "changed":
                continue
            base = record["base_norm"] if relative else 1.0
            rows[record["tensor"], each["model"]] = _ratio(each["norm"], base)
            if record["decomposed"]:
                place = (record["layer"], record["module"], each["model"])
                one, other = squares.get(place, (0.0, 0.0))
                squares[place] = (one + _squared(each["norm"]), other + _squared(base or 0.0))
    cells = {
        place: _ratio(sqrt(one), sqrt(other) if relative else 1.0)
        for place, (one, other) in squares.items()
    }
    models: list[int | None] = list(range(len(data["models"])))
    name, what = ("‖ΔW‖ / ‖W0‖", _NORM) if relative else ("‖ΔW‖", _NORM_ALONE)
    return Quantity("norm", name, what, models, cells, rows)


def _squared(value: float) -> float:
    # A power would raise where a product is infinite.
    return value * value


def _ratio(one: float, other: float | None) -> float | None:
    found = one / other if other else None
    return found if found is None or isfinite(found) else None


def _of(name: str, result: Record) -> Iterator[Quantity]:
    spec = DIAGNOSTICS[name]
    groups: dict[Place, list[Record]] = {}
    for row in result["rows"]:
        groups.setdefault((row["layer"], row["module"], row["model"]), []).append(row)
    cells = {place: spec.headline(spec.combine(rows)) for place, rows in groups.items()}
    rows = {(row["tensor"], row["model"]): spec.headline(row) for row in result["rows"]}
    models = sorted({row["model"] for row in result["rows"]}, key=lambda each: (each is None, each))
    headings = list(next(iter(cells.values())))
    for heading in _headings(name, headings):
        key, title, what = _words(name, heading, result)
        yield Quantity(
            key,
            title,
            what,
            models,
            {key: _number(each.get(heading)) for key, each in cells.items()},
            {key: _number(each.get(heading)) for key, each in rows.items()},
        )


def _headings(name: str, headings: Sequence[str]) -> list[str]:
    if name == "intruders":
        return [each for each in headings if each.startswith(("<", "energy <"))]
    return [headings[0]]


def _words(name: str, heading: str, result: Mapping[str, Any]) -> tuple[str, str, str]:
    if name != "intruders":
        title = heading if name in _KEYS else f"{heading} ({name})"
        return _KEYS.get(name, name), title, _WHAT.get(name, result["about"])
    epsilon = heading.rpartition("<")[2]
    k = result["params"]["k"]
    if heading.startswith("energy"):
        return (
            f"intruder-energy-{epsilon}",
            f"energy of intruders, ε = {epsilon}",
            f"Share of ‖W‖² that leading directions hold whose largest |cos| is below {epsilon}.",
        )
    what = (
        f"How many of {k} leading directions of W have no |cos| of {epsilon} or more with any "
        "direction of W0; matrices of one cell are added up."
    )
    return f"intruders-{epsilon}", f"intruders, ε = {epsilon}", what


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        return None
    return value
