"""Means of directions on the sphere, from inner products alone.

A direction is written as coefficients of the n unit vectors, so that vectors of any length take
n² numbers. All of it is float64 and follows the array API; numbers that are not chosen are kept
finite, since the derivative of what is not chosen must be a number too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mergebench.compute.namespace import namespace

Tangent = Literal["log", "projection"]
#: Squared length of a weighted sum of unit vectors below which it has no direction, and the
#: distance of a cosine to ±1 below which a direction is the mean itself or its antipode.
_NO_DIRECTION, _AT_POLE = 1e-14, 1e-9
#: A tangent whose squared length is below this share of its parts' is the rounding of nothing.
_CANCELLED = 1e-12


@dataclass(frozen=True)
class Directions:
    """Unit vectors of n models with their weights.

    Attributes
    ----------
    units : array, (n, n)
        Inner products of the unit vectors; zero for a zero vector, which has no direction.
    lengths : array, (n,)
        1 for a zero vector.
    alive : array of bool, (n,)
        Which vectors are not zero.
    pull : array, (n,)
        Weights of the directions; zero for a zero vector.
    """

    units: Any
    lengths: Any
    alive: Any
    pull: Any

    @classmethod
    def of(cls, products: Any, weights: Any, *, normalize: bool) -> Directions:
        """From inner products (n, n) and weights (n,), divided by their sum where asked."""
        xp = namespace(products)
        squares = xp.linalg.diagonal(products)
        alive = squares > 0
        lengths = xp.sqrt(xp.where(alive, squares, 1.0))
        pull = xp.where(alive, weights, 0.0)
        if normalize:
            behind = xp.sum(pull)
            pull = pull / xp.where(behind == 0, 1.0, behind)
        return cls(products / lengths[:, None] / lengths[None, :], lengths, alive, pull)

    def start(self) -> tuple[Any, Any]:
        """The normalised weighted sum, (n,), and whether it has a direction."""
        xp = namespace(self.units)
        square = self.pull @ (self.units @ self.pull)
        directed = square > _NO_DIRECTION
        return self.pull / xp.sqrt(xp.where(directed, square, 1.0)), directed

    def step(self, mean: Any, tangent: Tangent) -> Any:
        """The weighted sum of the tangents at ``mean``, (n,).

        The tangent of u is ``θ/sin θ · (u - cos θ · m)``, or without the factor. That of the
        antipode is left out, as it has no direction.
        """
        xp = namespace(self.units)
        cosines, pull = self.units @ mean, self.pull
        if tangent == "log":
            here, beyond = cosines > 1 - _AT_POLE, cosines < _AT_POLE - 1
            safe = xp.where(here | beyond, 0.0, cosines)
            factor = xp.acos(safe) / xp.sqrt(1 - safe * safe)
            pull = pull * xp.where(here, 1.0, xp.where(beyond, 0.0, factor))
        return pull - xp.sum(pull * cosines) * mean

    def moved(self, mean: Any, step: Any) -> tuple[Any, Any]:
        """``cos ‖v‖ · m + sin ‖v‖ · v / ‖v‖`` for a tangent v at m, (n,), and ‖v‖."""
        xp = namespace(self.units)
        square = step @ (self.units @ step)
        parts = xp.abs(step)
        some = square > _CANCELLED * (parts @ (xp.abs(self.units) @ parts))
        length = xp.sqrt(xp.where(some, square, 1.0))
        there = xp.cos(length) * mean + xp.sin(length) / length * step
        return xp.where(some, there, mean), xp.where(some, length, 0.0)

    def shares(self, mean: Any, directed: Any, weights: Any) -> Any:
        """Coefficients of the models, (n,): the mean direction times the weighted mean length.

        Without a direction the weights themselves, so the arithmetic mean.
        """
        xp = namespace(self.units)
        length = xp.sum(xp.where(self.alive, weights * self.lengths, 0.0))
        return xp.where(directed, length * mean / self.lengths, weights)
