"""One tensor to be merged: what it is made of, and its entries as arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergebench.adapters_zoo.computed import Computed
from mergebench.core.delta import Delta, Dense, Difference, LowRank, reads, resident, tile
from mergebench.core.errors import MergebenchError, MismatchError
from mergebench.core.site import Site
from mergebench.core.tensor import Array, Tensor
from mergebench.merge.at import At
from mergebench.merge.collected import Slices
from mergebench.sources import Applied

#: Entries counted at a time, which no plan knows of.
_LOOKED_AT = 1 << 14


@dataclass(frozen=True, eq=False)
class Item:
    """One tensor to be merged.

    Attributes
    ----------
    site : Site
    deltas : tuple of Delta or None
        Per model, in canonical order; ``None`` where an adapter does not touch the tensor.
        In weight space the values themselves, as :class:`Dense`.
    weights : tuple of float
        Per model.
    labels : tuple of str
        Per model, for messages.
    base : Tensor or None
        Added to the result; ``None`` in weight space and where the output is a task vector.
    dtype : numpy dtype
        Arithmetic: float32, or float64 if an input is stored so.
    lenient : bool
        Whether entries that are NaN or infinite count as zero, rather than stop the merge.
    origin : Tensor or None
        The base's tensor where there is a base, whether it is added or not; for ops that look
        at its entries.
    keys : tuple of int
        Per model, for counter-based randomness.
    places : tuple of int
        Per model, its place in the order of the user.
    part : str
        Names the part of the model that it belongs to: what is measured over the whole model is
        measured over the items of one part.
    collected : Slices or None
        What was collected of it with data, for chains that ask for it.
    """

    site: Site
    deltas: tuple[Delta | None, ...]
    weights: tuple[float, ...]
    labels: tuple[str, ...]
    base: Tensor | None
    dtype: np.dtype[Any] = field(default=np.dtype(np.float32))
    lenient: bool = False
    origin: Tensor | None = None
    keys: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    part: str = ""
    collected: Slices | None = None

    def at(self, start: int, stop: int) -> At:
        """Entries ``start:stop`` of all models, before any op."""
        return At(self.site, start, stop, self.weights, keys=self.keys, places=self.places)

    def of(self, row: int) -> Item:
        """The tensor of one model alone."""
        own = slice(row, row + 1)
        return replace(
            self,
            deltas=self.deltas[own],
            weights=self.weights[own],
            labels=self.labels[own],
            keys=self.keys[own],
            places=(),
        )


def opened(item: Item) -> Item:
    """The item with low-rank factors read once, for as long as its tiles are worked on."""
    deltas = tuple(None if delta is None else resident(delta) for delta in item.deltas)
    return replace(item, deltas=deltas)


def load(item: Item, start: int, stop: int) -> tuple[Array, Array | None]:
    """The stack of displacements (n, m) and the base's entries (m,), in the arithmetic dtype.

    Raises
    ------
    MergebenchError
        If an input holds NaN or infinity, naming model and tensor; in a lenient item only where
        that is in the factors of an update.
    """
    return load_with_holes(item, start, stop)[:2]


def load_with_holes(
    item: Item, start: int, stop: int
) -> tuple[Array, Array | None, NDArray[np.bool_] | None]:
    """As :func:`load`, and where entries of a lenient item are not finite, (m,), if any are.

    There the displacement of that model (in weight space its value) is zero, and so is the base.
    """
    stack = np.empty((len(item.deltas), stop - start), item.dtype)
    base: Array | None = None
    holes: NDArray[np.bool_] | None = None
    if item.base is not None:
        base = item.base.read(start, stop).astype(item.dtype)
        # Displacements that are not taken from the base do not show what is wrong with it.
        if item.lenient and (holes := _bad(base)) is not None:
            base[holes] = 0
        elif not all(isinstance(delta, Difference) for delta in item.deltas):
            _check_finite(base, item)
    own_holes = holes
    for model, delta in enumerate(item.deltas):
        row = stack[model]
        match delta:
            case None:
                row[:] = 0
            case Difference(finetuned, origin):
                if origin is not item.base or base is None:
                    own = origin.read(start, stop).astype(item.dtype)
                else:
                    own = base
                row[:] = finetuned.read(start, stop)
                with np.errstate(over="ignore", invalid="ignore"):
                    row -= own
                if own is base and own_holes is not None:
                    row[own_holes] = 0
            case Dense(values):
                row[:] = values.read(start, stop)
            case _:
                row[:] = tile(delta, start, stop, item.dtype)
        if item.lenient and (bad := _bad(row)) is not None:
            _check_stored(item, delta, bad, start, stop)
            row[bad] = 0
            holes = bad if holes is None else holes | bad
        elif not item.lenient:
            _check_finite(row, item)
    return stack, base, holes


def _proven(row: Array) -> bool:
    # Finite sums of squares prove finite entries at the cost of one fast product.
    with np.errstate(over="ignore", invalid="ignore"):
        return isfinite(float(np.dot(row, row)))


def located(item: Item, start: int, stop: int, base: Array | None, wanted: bool) -> At:
    """Where a stack stands, with the base's entries and statistics where an op asks for them.

    Parameters
    ----------
    base : array or None
        The entries that :func:`load` has read already.
    wanted : bool
        Whether an op needs them.

    Raises
    ------
    MismatchError
        If there is no base to read them from.
    """
    at = item.at(start, stop)
    if item.collected is not None:
        at = replace(at, collected=item.collected.read(start, stop))
    if not wanted:
        return at
    if base is None:
        if item.origin is None:
            raise MismatchError(
                f"{item.site.name}: the method looks at the base, which does not have this tensor",
                fix="add --base with the model the inputs were fine-tuned from",
            )
        base = item.origin.read(start, stop).astype(item.dtype)
        if item.lenient and (bad := _bad(base)) is not None:
            base[bad] = 0
        elif not item.lenient:
            _check_finite(base, replace(item, base=item.origin))
    return replace(at, base=base)


def _check_finite(row: Array, item: Item) -> None:
    if not _proven(row) and not np.isfinite(row).all():
        raise nonfinite(item)


def _bad(row: Array) -> NDArray[np.bool_] | None:
    """Where entries are not finite; ``None`` if all are."""
    if _proven(row):
        return None
    bad = ~np.isfinite(row)
    return bad if bad.any() else None


@np.errstate(invalid="ignore")
def _check_stored(
    item: Item, delta: Delta | None, bad: NDArray[np.bool_], start: int, stop: int
) -> None:
    """Refuse what does not stand in the input as a single entry: factors, and overflow."""
    stored = np.zeros_like(bad)
    for tensor, factor in () if delta is None else _parts(delta):
        if not factor:
            stored |= ~np.isfinite(tensor.read(start, stop).astype(np.float64))
    if (bad & ~stored).any():
        raise nonfinite(item)


def _parts(delta: Delta) -> Iterator[tuple[Tensor, bool]]:
    """The tensors below a displacement, and whether each is a factor (or computed from some)."""
    for tensor in reads(delta):
        if isinstance(tensor, Applied):
            yield tensor.weight, False
            yield from _parts(tensor.delta)
        else:
            yield tensor, isinstance(delta, LowRank) or isinstance(tensor, Computed)


def _too_large(item: Item) -> MergebenchError:
    return MergebenchError(
        f"{item.site.name}: the difference to the base exceeds {item.dtype}",
        fix="store the inputs in float64",
    )


def _stored(item: Item) -> Iterator[tuple[str, Tensor, bool]]:
    """``(whose, tensor, is a factor)`` for everything an item is made of, the base once."""
    seen = set()
    for label, delta in zip(item.labels, item.deltas, strict=True):
        origin = delta.base if isinstance(delta, Difference) else item.base
        for tensor, factor in () if delta is None else _parts(delta):
            under = tensor is origin or tensor is item.base
            if not under or id(tensor) not in seen:
                yield "the base" if under else label, tensor, factor
            seen.add(id(tensor))
    if item.base is not None and id(item.base) not in seen:
        yield "the base", item.base, False


# Of signalling NaN numpy warns while it converts them.
@np.errstate(invalid="ignore")
def _count(tensor: Tensor) -> tuple[int, int, int]:
    """How many entries are NaN, how many infinite, of how many."""
    nan = infinite = 0
    size = int(np.prod(tensor.shape))
    wide = np.float64 if tensor.dtype == "F64" else np.float32
    # What is computed together would be computed again for every piece of it.
    unit = tensor.together if isinstance(tensor, Computed) else 1
    step = max(_LOOKED_AT // unit, 1) * unit
    for start in range(0, size, step):
        piece = tensor.read(start, min(start + step, size)).astype(wide)
        nan += int(np.isnan(piece).sum())
        infinite += int(np.isinf(piece).sum())
    return nan, infinite, size


def passed_through(item: Item) -> dict[str, int]:
    """How many entries of a lenient item are NaN or infinite, by model (or ``the base``)."""
    found: dict[str, int] = {}
    for label, tensor, _ in _stored(item):
        nan, infinite, _ = _count(tensor)
        if nan or infinite:
            found[label] = found.get(label, 0) + nan + infinite
    return found


def nonfinite(item: Item) -> MergebenchError:
    """The error for NaN or infinity in an input: which model, which tensor, how many."""
    for label, tensor, factor in _stored(item):
        if item.lenient and not factor:
            continue
        nan, infinite, size = _count(tensor)
        if nan or infinite:
            return MergebenchError(
                f"{label}: tensor {item.site.name!r} has {nan} NaN and {infinite} infinite "
                f"entries of {size}",
                fix="repair or replace that model"
                + (
                    "; one such number spoils a row or column of the update, which "
                    "--allow-nonfinite does not pass on"
                    if factor
                    else ", or pass these entries on with --allow-nonfinite"
                ),
            )
    return _too_large(item)
