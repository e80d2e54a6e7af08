"""Where a stack stands, and what an op must know of it before it can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from mergebench.core.site import Site

if TYPE_CHECKING:
    from mergebench.merge.op import Op, R

#: An array of any library that follows the array API standard.
Stack = Any


@dataclass(frozen=True)
class At:
    """Which entries of which tensor a stack holds.

    Attributes
    ----------
    site : Site
    start, stop : int
        The stack holds entries ``start:stop`` of the flattened tensor.
    weights : tuple of float
        The user's weight of each model, in stack order.
    value : object
        What the op's own statistic measured; ``None`` where it declares none.
    base : array or None
        The base's entries at the same places, shape (m,), for ops that declare to need them.
    models : array or None
        The task vectors as they came, before any op, shape (models, m), for ops that declare to
        need them and for what they measure.
    core : (int, int) or None
        Where the stack holds matrices in bases of the column and row spaces of low-rank inputs,
        the shape of those matrices in the orientation of the stored tensor.
    keys : tuple of int
        64 bits per model that name it to counter-based randomness, whatever its place: derived
        from its fingerprint and from how many equal models stand before it. ``(0,)`` once models
        are combined.
    places : tuple of int
        The place of each model in the order in which the user named them, for ops that depend on
        it; empty where the stack itself is in that order.
    collected : array or None
        What was collected of each model with data, float64, for ops that declare to need it:
        (n, m) where it belongs to entries, else (n, …) for the whole tensor.
    """

    site: Site
    start: int
    stop: int
    weights: tuple[float, ...] = ()
    value: Any = None
    base: Any = None
    models: Any = field(default=None, kw_only=True)
    core: tuple[int, int] | None = field(default=None, kw_only=True)
    keys: tuple[int, ...] = field(default=(), kw_only=True)
    places: tuple[int, ...] = field(default=(), kw_only=True)
    collected: Any = field(default=None, kw_only=True)

    def after(self, op: Op, before: At) -> At:
        """The same place once ``op`` has run, in a chain that began at ``before``."""
        if op.spec.apart:
            return replace(self, weights=before.weights, keys=before.keys, places=before.places)
        if op.spec.reduces:
            return replace(self, weights=(1.0,), keys=(0,), places=())
        return self

    def in_order(self, count: int) -> list[int]:
        """The rows of a stack of ``count`` models in the order of the user."""
        places = self.places or range(count)
        return sorted(range(count), key=places.__getitem__)

    def of(self, row: int) -> At:
        """The same place in the stack of one model alone."""
        models = None if self.models is None else self.models[row : row + 1, :]
        own = slice(row, row + 1)
        weights, keys = self.weights[own], self.keys[own]
        collected = None if self.collected is None else self.collected[own, ...]
        return replace(
            self, weights=weights, keys=keys, places=(), models=models, collected=collected
        )


class Sweep(Protocol):
    """How a statistic looks at its scope: one tensor, or all tensors of the model.

    Entries are ordered by (tensor name as bytes, flat index), whatever the files do.
    """

    @property
    def models(self) -> int:
        """Rows of the stacks that visitors get."""
        ...

    @property
    def size(self) -> int:
        """Entries per model."""
        ...

    @property
    def inputs(self) -> int:
        """Task vectors as they came, before any op."""
        ...

    def __call__(self, visit: Callable[[Stack, At], R]) -> Iterator[tuple[At, R]]:
        """Run ``visit`` on every tile; results come in order.

        That may be on several threads, and over a whole model also in other processes: all that
        comes of ``visit`` is its result, and it holds no sweep. The places that come with results
        have no entries. A visitor whose results can be folded says so: see
        :func:`mergebench.compute.seen.fold_of`.
        """
        ...

    def sample(self, count: int) -> Stack:
        """About ``count`` entries spread over the scope, shape ``(models, ≈count)``."""
        ...


@dataclass(frozen=True)
class Statistic:
    """Something an op must know first.

    Attributes
    ----------
    scope : str
        ``tensor`` or ``model``: what one measurement covers.
    measure : callable
        ``(sweep) -> value``; the value reaches the op as ``At.value``.
    """

    scope: Literal["tensor", "model"]
    measure: Callable[[Sweep], Any]


@dataclass(frozen=True)
class Collects:
    """What an op needs to know of every model that only data can tell: a statistics file.

    Attributes
    ----------
    kind : str
        Of the files: ``fisher``, ``gram`` or ``gram_pp``.
    shapes : callable ``(site) -> shapes``
        Those that what was collected of a tensor may have; none where there is nothing to collect.
    entries : bool
        Whether it belongs to the entries of the tensor, so that tiles get theirs alone.
    otherwise : callable ``() -> Op``
        What is done with tensors that no model has anything for.
    workspace : callable ``(models, site) -> bytes``
        What the op holds, with what was collected, while it works on one tensor.
    """

    kind: str
    shapes: Callable[[Site], tuple[tuple[int, ...], ...]]
    entries: bool
    otherwise: Callable[[], Op]
    workspace: Callable[[int, Site], int] = lambda models, site: 0


@dataclass(frozen=True)
class Reading:
    """A number that an op reports about one tensor, beside its result.

    Attributes
    ----------
    what : str
        In words, such as ``retained energy``.
    models : tuple of int
        The rows of the stack that it is about: one model, or a pair.
    value : float
    """

    what: str
    models: tuple[int, ...]
    value: float


class Corrected(NamedTuple):
    """An update that is scaled and corrected by a low rank: ``scale · ΔW + left @ right``.

    Attributes
    ----------
    scale : float
    left, right : float64 arrays (out, j) and (j, in), or None
        ``None`` where nothing is added.
    """

    scale: float
    left: Any
    right: Any
