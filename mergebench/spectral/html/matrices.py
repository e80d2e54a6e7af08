"""Numbers between models, as matrices of models and by layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from mergebench.pages.colours import DIVERGING, SEQUENTIAL, colours, level
from mergebench.spectral.diagnostic import DIAGNOSTICS
from mergebench.spectral.report import Record

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Matrix:
    """One number of every pair of models.

    Attributes
    ----------
    key, name, what : str
    values : list of lists of float or None, models × models
        Symmetric. Models with themselves: 1 for cosines, else nothing.
    pairs : list of (int, int)
    layers : mapping of layer to {pair: float or None}
    signed : bool
        Whether its scale is from -1 to 1, as of cosines.
    """

    key: str
    name: str
    what: str
    values: list[list[float | None]]
    pairs: list[Pair]
    layers: dict[str, dict[Pair, float | None]]
    signed: bool

    @property
    def span(self) -> tuple[float, float]:
        """The ends of the scale."""
        if self.signed:
            return -1.0, 1.0
        held = [each for row in self.values for each in row if each is not None]
        held += [v for row in self.layers.values() for v in row.values() if v is not None]
        return (min(0.0, *held), max(held)) if held else (0.0, 1.0)

    @property
    def scale(self) -> str:
        """The name of its colour map."""
        return DIVERGING if self.signed else SEQUENTIAL

    @property
    def inks(self) -> list[list[str]]:
        """Ink for the text of each cell."""
        known = colours(self.scale)
        return [
            ["#000" if each is None else known[level(each, *self.span)][1] for each in row]
            for row in self.values
        ]


def matrices(data: Record) -> list[Matrix]:
    """The leading number of every diagnostic that compares pairs, cosines first."""
    found = []
    for name, result in data["diagnostics"].items():
        everything = result["totals"]["all"]
        if name in DIAGNOSTICS and any(each["other"] is not None for each in everything):
            found.append(_matrix(name, result, len(data["models"])))
    return sorted(found, key=lambda each: each.key != "cosine")


def _matrix(name: str, result: Record, count: int) -> Matrix:
    spec = DIAGNOSTICS[name]
    totals = result["totals"]
    heading = next(iter(spec.headline(totals["all"][0])))

    def value(record: Record) -> float | None:
        found = spec.headline(record).get(heading)
        plain = isinstance(found, (int, float)) and isfinite(found)
        return found if plain else None

    held = {(e["model"], e["other"]): value(e) for e in totals["all"] if e["other"] is not None}
    values: list[list[float | None]] = [[None] * count for _ in range(count)]
    for (one, other), each in held.items():
        values[one][other] = values[other][one] = each
    if name == "cosine":
        for number in range(count):
            values[number][number] = 1.0
    layers: dict[str, dict[Pair, float | None]] = {}
    for each in totals["layers"]:
        if each["other"] is not None:
            layers.setdefault(each["where"], {})[each["model"], each["other"]] = value(each)
    return Matrix(name, heading, result["about"], values, list(held), layers, name == "cosine")
