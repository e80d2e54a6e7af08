"""Singular values by type of modules: what is drawn, before anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergebench.core.tensor import Array
from mergebench.spectral.report import Record

#: Most panels and most models in one.
PANELS, MODELS = 12, 6
_POINTS = 40
_SHARES = (10, 50, 90)
#: Of the largest: below there is no direction (numerical rank).
_SMALLEST = 2.0**-20


@dataclass(frozen=True, eq=False)
class Line:
    """Singular values of some matrices of one kind.

    Attributes
    ----------
    place : array, (n,)
        From 1, evenly spaced in the logarithm.
    low, middle, high : arrays, (n,)
        The 10th, 50th and 90th percentile over matrices.
    """

    place: Array
    low: Array
    middle: Array
    high: Array


@dataclass(frozen=True, eq=False)
class Panel:
    """Singular values of one type of modules.

    Attributes
    ----------
    module : str
    matrices : int
    base : Line or None
    updates : mapping of model to Line
    """

    module: str
    matrices: int
    base: Line | None
    updates: Mapping[int, Line]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return self.base is None and not self.updates


def panels_of(data: Record) -> list[Panel]:
    """All types of modules whose singular values the report has, the largest ΔW first."""
    if "spectra" not in data["diagnostics"]:
        return []
    modules: dict[str, list[Record]] = {}
    for row in data["diagnostics"]["spectra"]["rows"]:
        if row["model"] < MODELS:
            modules.setdefault(row["module"], []).append(row)
    largest = {
        module: max((row["delta"]["norm"] or 0.0 for row in rows), default=0.0)
        for module, rows in modules.items()
    }
    found = [
        _panel(module, modules[module]) for module in sorted(modules, key=lambda m: -largest[m])
    ]
    return [each for each in found if not each.empty]


def _panel(module: str, rows: Sequence[Record]) -> Panel:
    by_tensor = {row["tensor"]: row for row in rows}
    base = _line([row["base_curve"] for row in by_tensor.values() if "base_curve" in row])
    updates = {
        model: line
        for model in sorted({row["model"] for row in rows})
        if (line := _line([row["delta_curve"] for row in rows if row["model"] == model]))
    }
    return Panel(module, len(by_tensor), base, updates)


def _line(curves: Sequence[Sequence[Mapping[str, float]]]) -> Line | None:
    held = [kept for curve in curves if (kept := _kept(curve)) is not None]
    if not held:
        return None
    # As far as half of them go, so that one short matrix does not end the line of all.
    longest = float(np.median([places[-1] for places, _ in held]))
    at = np.unique(np.geomspace(1, max(longest, 1.0), _POINTS))
    values = np.full((len(held), at.size), np.nan)
    for number, (places, sigma) in enumerate(held):
        inside = at <= places[-1] * (1 + 1e-9)
        values[number, inside] = np.interp(np.log(at[inside]), np.log(places), np.log(sigma))
    low, middle, high = np.exp(np.nanpercentile(values, _SHARES, axis=0))
    return Line(at, low, middle, high)


def _kept(curve: Sequence[Mapping[str, float]]) -> tuple[Array, Array] | None:
    pairs = [(each["index"] + 1, each["sigma"]) for each in curve if each["sigma"]]
    if not pairs:
        return None
    places, sigma = np.array(pairs, np.float64).T
    kept = sigma > sigma[0] * _SMALLEST
    return (places[kept], sigma[kept]) if kept.any() else None
