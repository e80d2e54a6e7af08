"""Choosing the density that reaches a ratio or keeps an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeVar

import numpy as np

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.core.tensor import Array
from mergebench.ship.measure import Sums, sample_of, together
from mergebench.ship.packer import entropy
from mergebench.ship.pieces import Contents, Piece
from mergebench.ship.schemes import Scheme

R = TypeVar("R")
_SAMPLE, _TRIES = 1 << 20, 8
_BITS = {"bf16": 16, "f16": 16, "f32": 32, "int8": 8}


@dataclass(frozen=True)
class Goal:
    """What is to be reached: a ratio of at least, or an error of at most."""

    ratio: float | None
    error: float | None
    density: bool

    @classmethod
    def of(
        cls, scheme: Scheme, ratio: float | None, error: float | None, lowrank: bool
    ) -> Goal | None:
        """The goal that options state, or ``None``.

        Raises
        ------
        ParameterError
            If both are given, one is no such number, or the scheme has nothing to choose.
        """
        if ratio is None and error is None:
            return None
        if ratio is not None and error is not None:
            raise ParameterError("--target-ratio and --max-error: give one of them")
        if ratio is not None and not 1 < ratio < 1e6:
            raise ParameterError("--target-ratio", expected="more than 1", got=f"{ratio:g}")
        if error is not None and not 0 < error < 1:
            raise ParameterError("--max-error", expected="a number in (0, 1)", got=f"{error:g}")
        if ratio is not None and lowrank:
            raise ParameterError(
                "--target-ratio chooses a density, which lowrank has none of",
                fix="choose the energy: -p energy=0.9, or --max-error",
            )
        return cls(ratio, error, "density" in scheme.params and not lowrank)


def settled(
    goal: Goal | None,
    params: Mapping[str, Any],
    attempt: Callable[[Mapping[str, Any]], tuple[R, float, float]],
    pieces: Sequence[Piece],
    sums: Mapping[str, Sums],
    pool: Executor,
    contents: Contents,
) -> tuple[R, dict[str, Any]]:
    """Try until the goal is reached: what was made, and with which parameters.

    A sample of the entries gives the first density; each try that misses corrects it.

    Raises
    ------
    MergebenchError
        If no density reaches the goal, naming the best that was found.
    """
    own = dict(params)
    if goal is None or not goal.density:
        made, ratio, error = attempt(own)
        if goal is not None and (
            (goal.ratio and ratio < goal.ratio) or (goal.error and error > goal.error)
        ):
            raise _missed(goal, ratio, error)
        return made, own
    curve = None if goal.error is None else _Curve.of(pieces, sums, own, pool)
    wanted: float = goal.ratio or goal.error or 0.0
    best: tuple[float, float] | None = None
    for _ in range(_TRIES):
        if curve is None:
            own["density"] = _density(wanted, pieces, contents, own)
        else:
            density = curve.density(wanted)
            if density is None:
                break
            own["density"] = density
        made, ratio, error = attempt(own)
        if goal.ratio is not None:
            if ratio >= goal.ratio:
                return made, own
            wanted *= goal.ratio / ratio * 1.01
        else:
            assert goal.error is not None
            if error <= goal.error:
                return made, own
            wanted *= goal.error / error * 0.99
        best = (ratio, error)
    if best is None:
        own["density"] = curve.best() if curve is not None else 1.0
        _, *numbers = attempt(own)
        best = (numbers[0], numbers[1])
    raise _missed(goal, *best)


def _missed(goal: Goal, ratio: float, error: float) -> MergebenchError:
    if goal.ratio is not None:
        return MergebenchError(
            "--target-ratio: not reached",
            expected=f"{goal.ratio:g} times smaller",
            got=f"{ratio:.3g}",
            fix="ask for less: headers and what is stored exactly take room too",
        )
    return MergebenchError(
        "--max-error: not reached by this scheme",
        expected=f"a relative error of {goal.error:g}",
        got=f"{error:.3g}",
        fix="use --scheme sparse, with int8 or bf16 values, or lowrank",
    )


def _density(
    ratio: float, pieces: Sequence[Piece], contents: Contents, params: Mapping[str, Any]
) -> float:
    """The density at which entropy alone would reach a ratio."""
    entries = sum(piece.size for piece in pieces)
    exact = sum(piece.size * 4 for piece in contents.pieces.values() if piece.exact)
    room = 8 * (contents.nbytes / ratio - exact - 150 * len(contents.pieces)) / max(entries, 1)
    each = _BITS.get(str(params.get("values", "")), 1)
    low, high = 1e-6, 1.0
    # Both terms rise with the density up to where the code of places has its peak.
    for _ in range(50):
        middle = sqrt(low * high)
        cost = (entropy(middle) if middle < 0.5 else 1.0) + each * middle
        low, high = (middle, high) if cost <= room else (low, middle)
    return low


@dataclass(frozen=True, eq=False)
class _Curve:
    """Relative errors by density, from a sample."""

    densities: Array
    errors: Array

    @classmethod
    def of(
        cls,
        pieces: Sequence[Piece],
        sums: Mapping[str, Sums],
        params: Mapping[str, Any],
        pool: Executor,
    ) -> _Curve:
        values = np.sort(np.abs(sample_of(pieces, _SAMPLE, pool).astype(np.float64)))[::-1]
        counts = np.arange(1, values.size + 1)
        total = max(float(values @ values), 1e-300)
        kept = np.cumsum(values)
        if "level" in params:
            spread = together(sums[piece.name] for piece in pieces).std * params["alpha"]
            level = spread if params["level"] == "std" else kept / counts * params["alpha"]
            lost = total - 2 * level * kept + level**2 * counts
        else:
            lost = total - np.cumsum(values**2)
        return cls(counts / values.size, np.sqrt(np.maximum(lost, 0) / total))

    def density(self, wanted: float) -> float | None:
        """The least density of at most that error; ``None`` if none has it."""
        reached = np.flatnonzero(self.errors <= wanted)
        return float(self.densities[reached[0]]) if reached.size else None

    def best(self) -> float:
        """The density of the least error."""
        return float(self.densities[int(self.errors.argmin())])
