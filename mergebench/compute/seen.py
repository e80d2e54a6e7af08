"""Visitors of tiles that see something else than what is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Seen:
    """A visitor that sees what ``turn`` makes of a stack and its place; folds as it did.

    It holds no sweep, so that it can be sent to another process.

    Attributes
    ----------
    visit : callable ``(stack, at) -> result``
    turn : callable ``(stack, at) -> (stack, at)``
    """

    visit: Callable[[Any, Any], Any]
    turn: Callable[[Any, Any], tuple[Any, Any]]

    def __call__(self, stack: Any, at: Any) -> Any:
        """The visitor's result."""
        return self.visit(*self.turn(stack, at))

    @property
    def fold(self) -> Callable[[Sequence[tuple[int, int, Any]]], Any] | None:
        """That of the visitor, if it has one."""
        found: Callable[[Sequence[tuple[int, int, Any]]], Any] | None = fold_of(self.visit)
        return found


def fold_of(visit: Any) -> Any:
    """How a visitor's results for runs of tiles of one tensor become one result, if it says so.

    ``fold`` takes ``(start, stop, result)`` of runs that begin with the tensor and follow each
    other, and gives what stands for all of them; it is associative.
    """
    return getattr(visit, "fold", None)
