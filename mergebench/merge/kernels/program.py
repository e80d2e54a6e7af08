"""Stages written down as numbers, for the compiled pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.cut import Cut
from mergebench.compute.linking import Held
from mergebench.core.site import Site
from mergebench.merge.kernels import codes as c
from mergebench.merge.kernels.stages import (
    OF_ROWS,
    REDUCING,
    Add,
    Disjoint,
    Divide,
    Draw,
    Elect,
    Multiply,
    RowDraw,
    RowWindow,
    Stage,
    Stages,
    Step,
    Window,
)

#: How the models of a tensor are stored.
Rows = Literal["differences", "values", "mixed"]
_DIVISORS = {"none": c.NONE, "count": c.COUNT, "weights": c.WEIGHTS}


@dataclass(frozen=True, eq=False)
class Program:
    """Stages for one tensor.

    Attributes
    ----------
    codes : int64 array, (stages, 4)
        What to do, and up to three numbers.
    ints : int64 array, (stages, models + 2, 2)
    floats : float32 array, (stages, models)
    bounds : float32 array, (stages, models, 4)
        Of windows.
    chances : float64 array, (stages, models, 2)
        Of draws by rank: the least, and half of how much more the largest is.
    row : int
        Entries of a row, if a stage must see whole ones, else 0.
    sorts : bool
        Whether a stage ranks all entries of a row.
    rows : int
        How many models are left.
    onto : int
        Whether and how the result is added to what
        :data:`~mergebench.merge.kernels.codes.GATHER` or the base has left in the workspace.
    """

    codes: NDArray[np.int64]
    ints: NDArray[np.int64]
    floats: NDArray[np.float32]
    bounds: NDArray[np.float32]
    chances: NDArray[np.float64]
    row: int
    sorts: bool
    rows: int
    onto: int

    @cached_property
    def held(self) -> Held:
        """What the passes are told of it."""
        return Held(self.codes, self.ints, self.floats, self.bounds)


def program(
    stages: Stages,
    models: int,
    site: Site,
    *,
    rows: Rows = "mixed",
    onto: int | None = c.NOWHERE,
) -> Program:
    """Stages for the entries of one tensor.

    Parameters
    ----------
    stages : Stages
    models : int
    site : Site
    rows : differences, values or mixed
        How models are stored: all so that the base, in the row after them, is to be subtracted,
        all as they are, or otherwise.
    onto : int or None
        Whether the base is added to the result; ``None`` for rows that are no result yet.
    """
    stages = _shortened(stages)
    gathered = None
    if stages and onto is not None:
        gathered = _gathered(stages, models, rows, onto)
    count = len(stages)
    codes = np.zeros((count, 4), np.int64)
    ints = np.zeros((count, models + 2, 2), np.int64)
    floats = np.ones((count, models), np.float32)
    bounds = np.zeros((count, models, 4), np.float32)
    chances = np.zeros((count, models, 2))
    # What is too large for float32 is found, and refused, where it is rounded.
    with np.errstate(over="ignore"):
        for place, stage in enumerate(stages):
            _write(stage, site, codes[place], ints[place], floats[place], bounds[place])
            if isinstance(stage, RowDraw):
                chances[place, : len(stage.least)] = list(zip(stage.least, stage.half, strict=True))
    if gathered is not None:
        codes[0, 0] = c.GATHER
        ints[0, :, 0] = gathered
        if isinstance(stages[0], Step):
            onto = c.EXACTLY if stages[0].exact else c.PLAINLY
    left = 1 if any(isinstance(stage, REDUCING) for stage in stages) else models
    row = site.row if any(isinstance(stage, OF_ROWS) for stage in stages) else 0
    sorts = any(isinstance(stage, RowDraw) for stage in stages)
    return Program(codes, ints, floats, bounds, chances, row, sorts, left, onto or c.NOWHERE)


def _shortened(stages: Stages) -> Stages:
    """Without products by one; weights of a sum are its own."""
    found: list[Stage] = []
    for stage in stages:
        if isinstance(stage, (Multiply, Divide)) and set(stage.by) == {1.0}:
            continue
        if isinstance(stage, Add) and found and isinstance(found[-1], Multiply):
            found[-1] = replace(stage, weights=found[-1].by)
        else:
            found.append(stage)
    return tuple(found)


def _gathered(stages: Stages, models: int, rows: Rows, onto: int) -> list[int] | None:
    """The row that all others are displaced from, how many these are, and which.

    ``None`` if the first stage is not a weighted sum of such displacements.
    """
    match stages:
        case [Add(), *_] if rows == "differences" or (rows == "values" and onto == c.NOWHERE):
            # Behind values there is no row, which is read as zeros.
            return [models, models, *range(models)]
        case [Step(pivot, towards)] if rows == "values" and len(towards) == models - 1:
            # Its end is where a result is added to the base, of which there must be none.
            return [pivot, models - 1, *towards, 0] if onto == c.NOWHERE else None
    return None


def _write(stage: Stage, site: Site, codes: Any, ints: Any, floats: Any, bounds: Any) -> None:
    match stage:
        case Window(keep, drop):
            codes[0] = c.WINDOW
            bounds[:, 2:] = inf
            for half, cuts in enumerate((keep, drop)):
                for model, cut in enumerate(cuts):
                    ints[model, half] = cut.ties_until(site.name, 0, site.size)
                    bounds[model, 2 * half : 2 * half + 2] = limits(cut)
        case Draw(streams, limits_):
            codes[0] = c.DRAW
            ints[: len(streams), 0] = _signed(streams)
            # One below the limit, which may be 2^32.
            ints[: len(streams), 1] = [each - 1 for each in limits_]
        case RowWindow(low, high, ties):
            codes[0] = c.ROW_WINDOW
            own = slice(None if len(low) == 1 else len(low))
            ints[own, 0], ints[own, 1], floats[own] = low, high, ties
        case RowDraw(streams, _, _, divide):
            codes[:2] = c.ROW_DRAW, divide
            ints[: len(streams), 0] = _signed(streams)
        case Multiply(by) | Divide(by):
            codes[0] = c.MULTIPLY if isinstance(stage, Multiply) else c.DIVIDE
            floats[: None if len(by) == 1 else len(by)] = by
        case Elect(rule, weights, tie):
            codes[:3] = c.ELECT, (1 if weights else 0) + (2 if rule == "count" else 0), tie
            floats[: len(weights)] = weights
        case Add(weights):
            codes[0] = c.ADD
            floats[: None if len(weights) == 1 else len(weights)] = weights
        case Step(pivot, towards, shares, exact):
            codes[:2] = c.STEP, exact
            ints[: 2 + len(towards), 0] = [pivot, len(towards), *towards]
            floats[: len(shares)] = shares
        case Disjoint(weights, divisor, cancelled):
            codes[:3] = c.DISJOINT, _DIVISORS[divisor], cancelled == "zero"
            floats[: len(weights)] = weights


def _signed(numbers: Sequence[int]) -> NDArray[np.int64]:
    return np.array(numbers, np.uint64).view(np.int64)


def limits(cut: Cut) -> tuple[Any, Any]:
    """float32 numbers that a magnitude must exceed to stay: where its ties do, and where not."""
    nearest = np.float32(cut.value)
    below = np.nextafter(nearest, np.float32(-inf))
    if float(nearest) == cut.value:
        return below, nearest
    # Between two numbers of float32: nothing ties with it.
    least = nearest if float(nearest) < cut.value else below
    return least, least
