"""Ops: frozen descriptions of small transformations of a stack of task vectors.

An op sees a *stack*: an array of shape ``(n, m)`` holding the same ``m`` entries of n models
(n is 1 once a reducing op has run), and an :class:`At` saying which entries they are. Its one
reference implementation is written against the array API, so numpy runs it without torch, and
torch gives gradients and CUDA. A chain is a tuple of ops; it can be read, hashed and printed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import numpy as np

from mergebench.compute.namespace import namespace
from mergebench.compute.seen import Seen
from mergebench.core.errors import ParameterError
from mergebench.core.params import Param, bind, declared
from mergebench.core.registry import Registry
from mergebench.core.schedule import is_schedule
from mergebench.core.site import Site
from mergebench.merge.kernels.stages import Stages, side_by_side

P = ParamSpec("P")
R = TypeVar("R")
Granularity = Literal["entry", "row", "tensor"]
#: On which sides of a matrix an op commutes with orthonormal changes of basis.
Sides = Literal["none", "left", "both"]
#: Whether every model gets a result of its own, and whether also out of what was combined.
Apart = Literal["", "each", "again"]
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


@dataclass(frozen=True)
class OpSpec:
    """A registered op: its reference implementation and what it declares."""

    name: str
    function: Callable[..., Stack]
    params: Mapping[str, Param]
    granularity: Callable[..., Granularity]
    statistic: Callable[..., Statistic | None]
    reduces: bool
    linear: Callable[..., bool]
    check: Callable[..., object] = lambda site, **params: None
    needs_base: bool = False
    most: int | None = None
    check_weights: Callable[..., None] | None = None
    needs_models: bool = False
    equivariant: Callable[..., Sides] = lambda **_: "none"
    workspace: Callable[[int, int, int], int] | None = None
    tolerance: float = 0.0
    rank: Callable[..., int | None] = lambda shape, models, **_: None
    ordered: Callable[..., bool] = lambda **_: False
    report: Callable[..., tuple[Reading, ...]] | None = None
    apart: Apart = ""
    chooses: bool = False
    alone: bool = False
    equal_norms: bool = False
    of_updates: bool = False
    correction: Callable[..., Corrected] | None = None
    added_rank: Callable[..., int] = lambda shape, **_: 0
    masks: Callable[..., tuple[Stack, Stack, Stack | None]] | None = None
    checked: Mapping[str, str] = field(default_factory=dict)
    collects: Callable[..., Collects | None] = lambda **_: None
    fused: Callable[..., Stages | None] = lambda at, **params: None

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Op:
        """The op with these parameters, checked; positional ones in declared order."""
        placed = dict(zip(self.params, args, strict=False))
        if len(args) > len(self.params) or placed.keys() & kwargs.keys():
            raise TypeError(f"{self.name} takes {', '.join(self.params) or 'nothing'}, each once")
        bound = bind(self.name, self.params, placed | kwargs)
        if not any(map(is_schedule, bound.values())):
            self.check(Site("", ()), **bound)
        return Op(self.name, tuple(bound.items()))


OPS: Registry[OpSpec] = Registry("op", "mergebench.merge.ops", "mergebench.ops")


@dataclass(frozen=True)
class Op:
    """A frozen description of one transformation: name and parameters, all hashable."""

    name: str
    params: tuple[tuple[str, Any], ...] = ()

    @property
    def spec(self) -> OpSpec:
        """The registered implementation."""
        return OPS[self.name]

    @property
    def granularity(self) -> Granularity:
        """The smallest piece the op can work on: an entry, a row or a tensor."""
        return self.spec.granularity(**dict(self.params))

    @property
    def statistic(self) -> Statistic | None:
        """What must be measured before the op can run."""
        return self.spec.statistic(**dict(self.params))

    @property
    def linear(self) -> bool:
        """Whether it combines models with coefficients that depend on the site alone."""
        return self.spec.linear(**dict(self.params))

    @property
    def ordered(self) -> bool:
        """Whether its result depends on the order in which the user names the models."""
        return self.spec.ordered(**dict(self.params))

    @property
    def collects(self) -> Collects | None:
        """What must have been collected of every model with data."""
        return self.spec.collects(**dict(self.params))

    def check(self, site: Site) -> None:
        """Refuse a tensor that the op cannot work on.

        Raises
        ------
        MergebenchError
        """
        self.spec.check(site, **dict(self.params))

    @property
    def sides(self) -> Sides:
        """Where the op commutes with changes of basis; linear ops do on both sides."""
        return "both" if self.linear else self.spec.equivariant(**dict(self.params))

    def apply(self, stack: Stack, at: At) -> Stack:
        """Run the reference implementation; ``stack`` is not modified.

        Where nothing was collected of a tensor that it needs that of, what does without runs.
        """
        if at.collected is None and (wanted := self.collects) is not None:
            return wanted.otherwise().apply(stack, at)
        return self.spec.function(stack, at, **dict(self.params))

    def stages(self, at: At) -> Stages | None:
        """What the op does to the tensor of ``at``, for a kernel; ``None`` if that cannot be said.

        ``at`` has what the op has measured.
        """
        return self.spec.fused(at, **dict(self.params))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.params)})"


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


Chain = tuple[Op, ...]


def op(
    *,
    granularity: Granularity | Callable[..., Granularity] = "entry",
    statistic: Callable[..., Statistic | None] | None = None,
    reduces: bool = False,
    linear: bool | Callable[..., bool] = False,
    check: Callable[..., object] | None = None,
    needs_base: bool = False,
    most: int | None = None,
    check_weights: Callable[..., None] | None = None,
    needs_models: bool = False,
    equivariant: Sides | Callable[..., Sides] = "none",
    workspace: Callable[[int, int, int], int] | None = None,
    tolerance: float = 0.0,
    rank: Callable[..., int | None] | None = None,
    ordered: bool | Callable[..., bool] = False,
    report: Callable[..., tuple[Reading, ...]] | None = None,
    apart: Apart = "",
    alone: bool = False,
    equal_norms: bool = False,
    of_updates: bool = False,
    correction: Callable[..., Corrected] | None = None,
    added_rank: Callable[..., int] | None = None,
    masks: Callable[..., tuple[Stack, Stack, Stack | None]] | None = None,
    checked: Mapping[str, str] | None = None,
    collects: Collects | Callable[..., Collects | None] | None = None,
    fused: Callable[..., Stages | None] | None = None,
) -> Callable[[Callable[Concatenate[Stack, At, P], Stack]], Callable[P, Op]]:
    """Register a function ``(stack, at, **params) -> stack`` and return its factory.

    Parameters
    ----------
    granularity : str or callable of the parameters
        The smallest piece on which the function gives the same result as on the whole.
    statistic : callable of the parameters, optional
        Returns the :class:`Statistic` to measure first, or ``None``.
    reduces : bool
        Whether n models become one.
    linear : bool or callable of the parameters
        Whether every output entry is a combination of the same entry of the models, with
        coefficients that depend on the site alone. Chains of such ops keep low-rank factors.
    check : callable ``(site, **params)``, optional
        Raises what the declared bounds cannot express: once for a nameless tensor when the op is
        made, and for every tensor before any is read.
    needs_base : bool
        Whether the base's entries must reach the op (and its statistic) as ``At.base``.
    most : int, optional
        How many models the op can take.
    check_weights : callable ``(weights, **params)``, optional
        Raises :class:`ParameterError` for weights that the op cannot take, before any tensor is
        read.
    needs_models : bool
        Whether the task vectors as they came must reach the op as ``At.models``, also after
        they were combined.
    equivariant : none, left or both, or callable of the parameters
        Whether ``op(P X_i Qᵀ) = P op(X_i) Qᵀ`` for orthonormal P (left: with Q = I) and matrices
        out × in. Such ops run on low-rank inputs in bases of their column and row spaces.
    workspace : callable ``(models, rows, columns) -> bytes``, optional
        What the op holds beside its stack and its result while it works on one tensor.
    tolerance : float
        0 where every library gives the same value within a rounding; for ops backed by LAPACK
        the relative error, of the largest entry, that another backend may show.
    rank : callable ``(shape, models, **params) -> int or None``, optional
        The largest rank that a tensor of that shape can have after the op, as a matrix; ``None``
        where the op sets no limit.
    ordered : bool or callable of the parameters
        Whether the result depends on the order in which the user names the models, which is
        ``At.places``. The recipe of an output then keeps that order.
    report : callable ``(before, after, at, **params) -> readings``, optional
        What is to be said of one tensor, from the op's input and output; for ops of whole tensors.
    apart : each or again, optional
        Every model gets a result of its own, out of what all of them hold: one row comes out for
        each model of the merge. With again also after an op that combines them.
    alone : bool
        Whether the function, and its statistic, treat every model by itself, so that models may
        have parameters of their own.
    equal_norms : bool
        Whether the op is known to fail where task vectors differ in length, so that the plan
        warns earlier.
    of_updates : bool
        Whether the op means something for displacements from a base alone: after a method that
        combines weights it is refused.
    correction : callable ``(value, **params) -> Corrected``, optional
        For an op that scales a single update and corrects it by a low rank, both known from what
        its statistic has measured: low-rank updates then stay factored, and nothing is lost. Its
        report must do with the value alone; there it gets neither stack.
    added_rank : callable ``(shape, **params) -> int``, optional
        The most rank that a correction adds.
    masks : callable ``(stack, at, **params) -> (shared, masks, scales)``, optional
        The parts of an op whose results are one row (1, m), masked for each model (n, m) and
        multiplied by its number (n,), or by none; so they can be stored as these.
    checked : mapping of implementation to tolerance, optional
        What else its results were compared with as a step of their own, in words.
    collects : Collects or callable of the parameters, optional
        What must have been collected of every model with data; it is ``At.collected``.
    fused : callable ``(at, **params) -> Stages or None``, optional
        The same in stages that a kernel can run, to the bit: see :mod:`mergebench.merge.kernels`.
        ``at`` is the whole tensor, with what the op has measured and without any entries.
    """

    def register(function: Callable[Concatenate[Stack, At, P], Stack]) -> Callable[P, Op]:
        name = function.__name__.rstrip("_")
        spec = OpSpec(
            name,
            function,
            declared(function, skip=2),
            granularity if callable(granularity) else lambda **_: granularity,
            statistic or (lambda **_: None),
            reduces,
            linear if callable(linear) else lambda **_: linear,
            check or (lambda site, **params: None),
            needs_base,
            most,
            check_weights,
            needs_models,
            equivariant if callable(equivariant) else lambda **_: equivariant,
            workspace,
            tolerance,
            rank or (lambda shape, models, **_: None),
            ordered if callable(ordered) else lambda **_: ordered,
            report,
            apart,
            alone=alone,
            equal_norms=equal_norms,
            of_updates=of_updates,
            correction=correction,
            added_rank=added_rank or (lambda shape, **_: 0),
            masks=masks,
            checked=checked or {},
            collects=collects if callable(collects) else lambda **_: collects,
            fused=fused or (lambda at, **params: None),
        )
        return cast("Callable[P, Op]", OPS.add(name, spec))

    return register


def chain(*ops: Op) -> Chain:
    """A chain, checked for the order of its ops.

    Raises
    ------
    ParameterError
        If an op that needs several models stands after one that leaves a single one.
    """
    reduced = ""
    for each in ops:
        spec = each.spec
        if reduced and (spec.reduces or spec.apart == "each"):
            raise ParameterError(
                f"{each.name}: nothing left to combine, {reduced} has left a single task vector",
                fix="use one combining op per chain",
            )
        reduced = each.name if spec.reduces else "" if spec.apart else reduced
    return ops


def combines(ops: Chain) -> bool:
    """Whether the chain leaves a single task vector, not one for each model."""
    single = False
    for each in ops:
        single = not each.spec.apart and (single or each.spec.reduces)
    return single


def is_apart(ops: Chain) -> bool:
    """Whether the chain gives every model a result of its own."""
    return not combines(ops) and any(each.spec.apart for each in ops)


def check_models(ops: Chain, weights: Sequence[float]) -> None:
    """Refuse models that are too many for an op of the chain, or weights that it cannot take.

    Raises
    ------
    ParameterError
    """
    given = weights
    for each in ops:
        most = each.spec.most
        if most is not None and len(weights) > most:
            raise ParameterError(
                f"{each.name}: number of models", got=str(len(weights)), expected=f"at most {most}"
            )
        if each.spec.check_weights is not None:
            each.spec.check_weights(weights, **dict(each.params))
        weights = given if each.spec.apart else (1.0,) if each.spec.reduces else weights


def needs_base(ops: Iterable[Op]) -> bool:
    """Whether an op of the chain looks at the base's entries."""
    return any(each.spec.needs_base for each in ops)


def collects_of(ops: Iterable[Op]) -> Collects | None:
    """What the chain needs to have been collected of every model; ``None`` for nothing."""
    return next((each.collects for each in ops if each.collects is not None), None)


def without_collected(ops: Chain) -> Chain:
    """The chain for tensors that nothing was collected of.

    It is the same where a later op looks at the whole model, for which all chains begin alike.
    """
    behind = [place for place, each in enumerate(ops) if each.collects is not None]
    later = [each.statistic for each in ops[behind[0] + 1 :]] if behind else []
    if any(each is not None and each.scope == "model" for each in later):
        return ops
    return tuple(each if (wanted := each.collects) is None else wanted.otherwise() for each in ops)


def is_linear(ops: Chain) -> bool:
    """Whether the whole chain is a weighted sum with weights that depend on the site alone."""
    return all(each.linear for each in ops)


def sides_of(ops: Chain) -> Sides:
    """Where the whole chain commutes with changes of basis.

    An op that measures something first sees entries, so a chain with one does nowhere.
    """
    if any(each.statistic is not None or each.sides == "none" for each in ops):
        return "none"
    return "left" if any(each.sides == "left" for each in ops) else "both"


def workspace_of(ops: Chain, models: int, shape: tuple[int, int]) -> int:
    """The most bytes that an op of the chain holds beside its stack, for one matrix."""
    most, rows = 0, models
    for each in ops:
        if each.spec.workspace is not None:
            most = max(most, each.spec.workspace(rows, *shape))
        rows = models if each.spec.apart else 1 if each.spec.reduces else rows
    return most


def rank_of(ops: Chain, models: int, shape: tuple[int, ...]) -> int | None:
    """The largest rank that a merged tensor of a shape can have, as a matrix.

    ``None`` where the chain sets no limit.
    """
    most: int | None = None
    rows = models
    for each in ops:
        # Only what does not depend on the basis leaves ranks where they are.
        most = None if each.sides == "none" or each.spec.apart or most is None else most
        if each.spec.reduces and most is not None and not each.spec.chooses:
            most *= rows
        own = each.spec.rank(shape, models, **dict(each.params))
        most = own if most is None else most if own is None else min(own, most)
        rows = models if each.spec.apart else 1 if each.spec.reduces else rows
    return most


def tolerance_of(ops: Chain) -> float:
    """The relative error that another backend may show; 0 where all agree within a rounding."""
    return max((each.spec.tolerance for each in ops), default=0.0)


def coefficients(
    ops: Chain, site: Site, weights: Sequence[float], places: tuple[int, ...] = ()
) -> tuple[float, ...]:
    """The weight that a linear chain gives to each model at ``site``.

    ``places`` are those of :class:`At`.
    """
    count = len(weights)
    stack: Stack = np.eye(count)
    at = At(site, 0, count, tuple(weights), places=places)
    for each in ops:
        stack = each.apply(stack, at)
    return tuple(float(x) for x in np.asarray(stack).reshape(-1))


def granularity_of(ops: Chain) -> Granularity:
    """The coarsest granularity in a chain."""
    order: tuple[Granularity, ...] = ("entry", "row", "tensor")
    return max((each.granularity for each in ops), key=order.index, default="entry")


def with_value(at: At, value: Any) -> At:
    """The same place, with a statistic's value."""
    return replace(at, value=value)
