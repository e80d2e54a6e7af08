"""Ops and chains on arrays in memory, of any library that follows the array API."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from mergebench.compute.namespace import as_numpy, namespace
from mergebench.core.errors import MismatchError
from mergebench.core.site import make_sites, parse_pattern
from mergebench.core.tensor import FLOATING, dtype_name
from mergebench.merge.at import At, Stack
from mergebench.merge.chains import check_models, collects_of, combines, needs_base
from mergebench.merge.collected import collected_of_arrays, slices_of
from mergebench.merge.op import Chain, Op

R = TypeVar("R")


def apply(
    ops: Op | Chain,
    models: Sequence[Any] | Sequence[Mapping[str, Any]],
    weights: Sequence[float] | None = None,
    base: Any | Mapping[str, Any] | None = None,
    *,
    keys: Sequence[int] | None = None,
    places: Sequence[int] | None = None,
    statistics: Sequence[Any] | Sequence[Mapping[str, Any]] | None = None,
    block_pattern: str | None = None,
) -> Any:
    """Run ops on task vectors held in memory.

    Parameters
    ----------
    ops : Op or Chain
        Such as ``trim(0.2)`` or ``METHODS["ties"](density=0.2)``.
    models : sequence of arrays, or of mappings of tensor name to array
        One per model: numpy arrays, torch tensors (gradients pass through) and so on. They are
        not modified.
    weights : sequence of float, optional
        One per model; 1 by default.
    base : array, or mapping of tensor name to array, optional
        For ops that look at the base's entries; it is not added to the result.
    keys : sequence of int, optional
        One per model, naming it to ops that draw random numbers; their positions by default.
        (Merges of files and of state dicts derive them from what the models hold.)
    places : sequence of int, optional
        One per model, its place where an op asks for an order; the order given by default.
    statistics : sequence of arrays, or of mappings of tensor name to array, optional
        One per model (``None`` for nothing), what was collected of it with data, for ops that need
        that. Tensors that none of them has are averaged, as they are in a merge.
    block_pattern : str, optional
        Finds numbered blocks in tensor names; see :func:`~mergebench.core.site.parse_pattern`.

    Returns
    -------
    array or mapping where the ops combine models, else a list of one per model

    Raises
    ------
    MismatchError
        If names or shapes differ between models, or an op needs the base or statistics and there
        are none.
    ParameterError
        For weights that an op cannot take.
    """
    steps: Chain = (ops,) if isinstance(ops, Op) else tuple(ops)
    named = all(isinstance(each, Mapping) for each in models)
    tables: list[Mapping[str, Any]] = (
        [dict(each) for each in models] if named else [{"tensor": each} for each in models]
    )
    if not tables:
        raise MismatchError("no task vectors", fix="give at least one")
    shares = tuple(weights) if weights is not None else (1.0,) * len(tables)
    if len(shares) != len(tables):
        raise MismatchError("one weight per model", got=str(len(shares)), expected=str(len(tables)))
    check_models(steps, shares)
    names = tuple(keys) if keys is not None else tuple(range(len(tables)))
    if len(names) != len(tables):
        raise MismatchError("one key per model", got=str(len(names)), expected=str(len(tables)))
    turns = tuple(places) if places is not None else ()
    if places is not None and sorted(turns) != list(range(len(tables))):
        raise MismatchError(
            "places of models", got=str(list(turns)), expected=f"0 to {len(tables) - 1}, each once"
        )
    pieces = _stacks(tables, shares, names, turns, parse_pattern(block_pattern))
    if needs_base(steps):
        if base is None:
            raise MismatchError("the ops look at the base, and none is given", fix="give base=")
        pieces = _on(pieces, base if named else {"tensor": base})
    if collects_of(steps) is not None:
        if statistics is None or len(statistics) != len(tables):
            raise MismatchError(
                "the ops need statistics of every model",
                got="none" if statistics is None else str(len(statistics)),
                fix="give statistics=",
            )
        held = [
            {} if each is None else dict(each) if named else {"tensor": each} for each in statistics
        ]
        pieces = _beside(pieces, steps, held)
    given = {piece.at.site.name: piece.at for piece in pieces}
    for step in steps:
        pieces = _step(step, pieces, given)
    results = [
        {piece.at.site.name: _shaped(piece.stack[row, :], piece.at.site.shape) for piece in pieces}
        for row in range(int(pieces[0].stack.shape[0]) if pieces else len(tables))
    ]
    outs = results if named else [table["tensor"] for table in results]
    return outs[0] if combines(steps) else outs


@dataclass(frozen=True, eq=False)
class _Piece:
    """A tensor of all models: where it stands, and what ops have made of it."""

    at: At
    stack: Stack


def _shaped(flat: Stack, shape: tuple[int, ...]) -> Stack:
    return namespace(flat).reshape(flat, shape)


def _stacks(
    tables: Sequence[Mapping[str, Any]],
    weights: tuple[float, ...],
    keys: tuple[int, ...],
    places: tuple[int, ...],
    pattern: re.Pattern[str],
) -> list[_Piece]:
    first = tables[0]
    for position, table in enumerate(tables):
        if set(table) != set(first):
            odd = min(set(table) ^ set(first))
            raise MismatchError(f"model {position}: tensor {odd!r} is not in every model")
    shapes = {name: tuple(array.shape) for name, array in first.items()}
    sites = make_sites(shapes, pattern=pattern)
    pieces = []
    for name in sorted(first, key=str.encode):
        arrays = [table[name] for table in tables]
        xp = namespace(arrays[0])
        for position, array in enumerate(arrays):
            if tuple(array.shape) != sites[name].shape:
                raise MismatchError(
                    f"{name}: model {position} has another shape",
                    got=str(tuple(array.shape)),
                    expected=str(sites[name].shape),
                )
        _check_floating(name, arrays)
        stack = xp.stack([xp.reshape(array, (-1,)) for array in arrays])
        at = At(sites[name], 0, sites[name].size, weights, keys=keys, places=places, models=stack)
        pieces.append(_Piece(at, stack))
    return pieces


def _on(pieces: Sequence[_Piece], base: Mapping[str, Any]) -> list[_Piece]:
    found = []
    for piece in pieces:
        array = base.get(piece.at.site.name)
        if array is None or tuple(array.shape) != piece.at.site.shape:
            raise MismatchError(
                f"{piece.at.site.name}: the base has "
                + ("no such tensor" if array is None else "another shape"),
                expected=str(piece.at.site.shape),
            )
        xp = namespace(array)
        flat = xp.astype(xp.reshape(array, (-1,)), piece.stack.dtype, copy=False)
        found.append(_Piece(replace(piece.at, base=flat), piece.stack))
    return found


def _beside(
    pieces: Sequence[_Piece], steps: Chain, held: Sequence[Mapping[str, Any]]
) -> list[_Piece]:
    """The same with what was collected of each tensor."""
    asking = next(step for step in steps if step.collects is not None)
    files = [
        collected_of_arrays(f"statistics[{place}]", {n: as_numpy(a) for n, a in each.items()})
        for place, each in enumerate(held)
    ]
    found = []
    for piece in pieces:
        at, xp = piece.at, namespace(piece.stack)
        assert asking.collects is not None
        slices = slices_of(at.site.name, asking, files, asking.collects.shapes(at.site))
        if slices is not None:
            values = slices.read(0, at.site.size)
            at = replace(at, collected=xp.asarray(values, device=piece.stack.device))
        found.append(_Piece(at, piece.stack))
    return found


def _check_floating(name: str, arrays: Sequence[Any]) -> None:
    for position, array in enumerate(arrays):
        if isinstance(array, np.ndarray):
            floating = dtype_name(array.dtype) in FLOATING
        else:
            floating = namespace(array).isdtype(array.dtype, "real floating")
        if not floating:
            raise MismatchError(
                f"{name}: model {position} is no task vector",
                got=str(array.dtype),
                expected="floating-point numbers",
            )


def _step(step: Op, pieces: list[_Piece], given: Mapping[str, At]) -> list[_Piece]:
    statistic = step.statistic
    value = None
    if statistic is not None and statistic.scope == "model":
        value = statistic.measure(_Arrays(pieces))
    done = []
    for piece in pieces:
        if statistic is not None and statistic.scope == "tensor":
            value = statistic.measure(_Arrays([piece]))
        models = piece.at.models if step.spec.needs_models else None
        stack = step.apply(piece.stack, replace(piece.at, value=value, models=models))
        done.append(_Piece(piece.at.after(step, given[piece.at.site.name]), stack))
    return done


@dataclass(frozen=True, eq=False)
class _Arrays:
    """A sweep over stacks that are already there."""

    pieces: Sequence[_Piece]

    @property
    def models(self) -> int:
        return int(self.pieces[0].stack.shape[0])

    @property
    def inputs(self) -> int:
        models = self.pieces[0].at.models
        return self.models if models is None else int(models.shape[0])

    @property
    def size(self) -> int:
        return sum(piece.at.site.size for piece in self.pieces)

    def __call__(self, visit: Callable[[Stack, At], R]) -> Iterator[tuple[At, R]]:
        for piece in self.pieces:
            yield piece.at, visit(piece.stack, piece.at)

    def sample(self, count: int) -> Stack:
        step = max(self.size // count, 1)
        xp = namespace(self.pieces[0].stack)
        return xp.concat([piece.stack[:, ::step] for piece in self.pieces], axis=1)
