"""Statistics that no data are behind, for the methods and ops that ask for some."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

import mergebench
from mergebench.core.site import Site
from mergebench.merge.at import Collects
from mergebench.merge.chains import collects_of
from mergebench.merge.collected import Collected, collected_of_arrays
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS, Op


def wanted(method: str, then: Iterable[str] = ()) -> Collects | None:
    """What a method, or an op after it, needs to have been collected."""
    if (found := collects_of(METHODS[method]())) is not None:
        return found
    named = [OPS[each.partition(":")[0]] for each in then]
    ready = [op() for op in named if not any(p.required for p in op.params.values())]
    return collects_of(ready)


def invented(
    wants: Collects, shapes: Mapping[str, tuple[int, ...]], mark: int
) -> dict[str, np.ndarray]:
    """Statistics of one model: squares for entries, products of random inputs for matrices.

    Parameters
    ----------
    mark : int
        Which model it is, wherever it stands.
    """
    found = {}
    for name, shape in shapes.items():
        for allowed in wants.shapes(Site(name, tuple(shape)))[:1]:
            make = _squares if wants.entries else _products
            found[name] = make(mark, name, tuple(allowed))
    return found


# Whoever asks again is given the same ones, which cannot be written to.
@cache
def _squares(mark: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    random = _random(mark, name)
    squares = random.normal(size=shape) ** 2 * (random.random(shape) < 0.8)
    return _frozen(np.asarray(squares * 10.0 ** random.integers(-3, 3)))


@cache
def _products(mark: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    inputs = _random(mark, name).normal(size=(4 * shape[0], shape[0]))
    return _frozen(inputs.T @ inputs)


def _random(mark: int, name: str) -> np.random.Generator:
    return np.random.default_rng([mark, zlib.crc32(name.encode())])


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def statistics_of(
    wants: Collects | None, tables: Sequence[Any], base: Any, marks: Sequence[int] | None = None
) -> list[dict[str, np.ndarray]] | None:
    """Of every model, by its mark; ``None`` where nothing is asked for."""
    if wants is None:
        return None
    shapes = _shapes(tables, base)
    return [invented(wants, shapes, mark) for mark in marks or range(len(tables))]


def files_of(
    wants: Collects | None, tables: Sequence[Any], base: Any, marks: Sequence[int] | None = None
) -> list[Collected] | None:
    """The same for a plan."""
    made = statistics_of(wants, tables, base, marks)
    return made and [collected_of_arrays(f"statistics[{i}]", each) for i, each in enumerate(made)]


def needs(ops: Op | Sequence[Op]) -> Collects | None:
    """What some ops need to have been collected."""
    return collects_of((ops,) if isinstance(ops, Op) else ops)


def _shapes(tables: Sequence[Any], base: Any) -> dict[str, tuple[int, ...]]:
    given = [each[0] if isinstance(each, tuple) else each for each in tables]
    if not given:
        return {}
    for table in (base, *given):
        if isinstance(table, Mapping):
            return {name: tuple(array.shape) for name, array in table.items()}
    if hasattr(given[0], "shape"):
        return {"tensor": tuple(given[0].shape)}
    found: dict[str, tuple[int, ...]] = {}
    for path in (base, *given):
        if path is not None:
            opened = mergebench.load(path)
            held = getattr(opened, "tensors", opened)
            found |= {name: tuple(held[name].shape) for name in held}
    return found
