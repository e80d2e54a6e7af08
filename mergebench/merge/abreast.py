"""One op with other parameters for each model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mergebench.compute.namespace import namespace
from mergebench.compute.seen import Seen
from mergebench.core.errors import ParameterError
from mergebench.core.site import Site
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.chains import granularity_of
from mergebench.merge.kernels.stages import Stages, side_by_side
from mergebench.merge.op import Chain, Granularity, Op, R, Sides


@dataclass(frozen=True)
class _Only:
    """The row of one model."""

    row: int

    def __call__(self, stack: Stack, at: At) -> tuple[Stack, At]:
        return stack[self.row : self.row + 1, :], at.of(self.row)


@dataclass(frozen=True)
class _Row:
    """A sweep that shows one model only."""

    sweep: Sweep
    row: int
    models: int = 1
    inputs: int = 1

    @property
    def size(self) -> int:
        return self.sweep.size

    def __call__(self, visit: Callable[[Stack, At], R]) -> Iterator[tuple[At, R]]:
        return self.sweep(Seen(visit, _Only(self.row)))

    def again(
        self, visit: Callable[[Stack, At], R], spans: Collection[tuple[str, int, int]]
    ) -> Iterator[tuple[At, R]]:
        seen = Seen(visit, _Only(self.row))
        again = getattr(self.sweep, "again", None)
        return self.sweep(seen) if again is None else again(seen, spans)

    def sample(self, count: int) -> Stack:
        return self.sweep.sample(count)[self.row : self.row + 1, :]


def _measure_each(sweep: Sweep, measures: Sequence[Callable[[Sweep], Any] | None]) -> list[Any]:
    return [
        None if measure is None else measure(_Row(sweep, row))
        for row, measure in enumerate(measures)
    ]


@dataclass(frozen=True)
class Abreast(Op):
    """One op with other parameters for each model, in stack order.

    Attributes
    ----------
    ops : tuple of Op
        Of one name, which treat every model by itself.
    """

    ops: Chain = ()

    @property
    def granularity(self) -> Granularity:
        """The coarsest of all."""
        return granularity_of(self.ops)

    @property
    def statistic(self) -> Statistic | None:
        """What each op must know of its model."""
        own = [each.statistic for each in self.ops]
        scopes = {each.scope for each in own if each is not None}
        if not scopes:
            return None
        if len(scopes) > 1:
            raise ParameterError(
                f"{self.name}: `scope` differs between models", fix="give all models one scope"
            )
        measures = tuple(None if each is None else each.measure for each in own)
        return Statistic(scopes.pop(), partial(_measure_each, measures=measures))

    @property
    def sides(self) -> Sides:
        """Where all of them commute with changes of basis."""
        own = {each.sides for each in self.ops}
        return own.pop() if len(own) == 1 else "none"

    def check(self, site: Site) -> None:
        """Refuse a tensor that one of the ops cannot work on."""
        for each in self.ops:
            each.check(site)

    def apply(self, stack: Stack, at: At) -> Stack:
        """Run each op on the entries of its model."""
        rows = []
        for row, each in enumerate(self.ops):
            value = None if at.value is None else at.value[row]
            rows.append(each.apply(stack[row : row + 1, :], replace(at.of(row), value=value)))
        return namespace(stack).concat(rows, axis=0)

    def stages(self, at: At) -> Stages | None:
        """Those of each op for its model, if they are alike."""
        found: list[Stages] = []
        for row, each in enumerate(self.ops):
            value = None if at.value is None else at.value[row]
            own = each.stages(replace(at.of(row), value=value))
            if own is None:
                return None
            found.append(own)
        return side_by_side(found)

    def __str__(self) -> str:
        return " | ".join(map(str, self.ops))


def abreast(chains: Sequence[Chain]) -> Chain:
    """One chain from those of each model: where parameters differ, each model has its own.

    Raises
    ------
    ParameterError
        If they differ in an op that does not treat every model by itself.
    """
    found: list[Op] = []
    for ops in zip(*chains, strict=True):
        first = ops[0]
        if all(each == first for each in ops):
            found.append(first)
            continue
        if not first.spec.alone or any(each.name != first.name for each in ops):
            name = next(k for (k, v) in first.params if any(dict(o.params)[k] != v for o in ops))
            raise ParameterError(
                f"{first.name}: `{name}` cannot differ between models, which it looks at together",
                fix="give one value for all",
            )
        found.append(Abreast(first.name, first.params, ops))
    return tuple(found)
