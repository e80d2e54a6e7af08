"""Ops: frozen descriptions of small transformations of a stack of task vectors.

An op sees a *stack*: an array of shape ``(n, m)`` holding the same ``m`` entries of n models
(n is 1 once a reducing op has run), and an :class:`At` saying which entries they are. Its one
reference implementation is written against the array API, so numpy runs it without torch, and
torch gives gradients and CUDA. A chain is a tuple of ops; it can be read, hashed and printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, cast

from mergebench.core.params import Param, bind, declared
from mergebench.core.registry import Registry
from mergebench.core.schedule import is_schedule
from mergebench.core.site import Site
from mergebench.merge.at import At, Collects, Corrected, Reading, Stack, Statistic
from mergebench.merge.kernels.stages import Stages

P = ParamSpec("P")


R = TypeVar("R")


Granularity = Literal["entry", "row", "tensor"]


#: On which sides of a matrix an op commutes with orthonormal changes of basis.
Sides = Literal["none", "left", "both"]


#: Whether every model gets a result of its own, and whether also out of what was combined.
Apart = Literal["", "each", "again"]


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


def with_value(at: At, value: Any) -> At:
    """The same place, with a statistic's value."""
    return replace(at, value=value)
