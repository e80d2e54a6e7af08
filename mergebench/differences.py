"""How two inputs differ, tensor by tensor, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite, nan, sqrt
from typing import Any

import numpy as np

from mergebench.core.delta import Delta, Dense, Replacement, tile
from mergebench.core.errors import MismatchError
from mergebench.core.tensor import FLOATING, size_of
from mergebench.sources import Applied, Source

_PIECE = 1 << 20


@dataclass(frozen=True)
class Row:
    """One tensor of either input.

    Attributes
    ----------
    name : str
    status : equal, differs, only left, only right, shape or dtype
        ``equal`` means equal values; the dtypes may differ and are then in ``detail``.
    relative : float
        ``‖left - right‖ / ‖left‖`` (Frobenius norms in float64), ``nan`` where not comparable.
    largest : float
        Largest absolute difference.
    cosine : float
        Between the flattened tensors; ``nan`` if one is zero.
    entries : int
    detail : str
    """

    name: str
    status: str
    relative: float = nan
    largest: float = nan
    cosine: float = nan
    entries: int = 0
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, ``None`` for ``nan``."""
        return {
            key: None if isinstance(value, float) and not isfinite(value) else value
            for key, value in asdict(self).items()
        }


def differences(
    left: Source, right: Source, progress: Callable[[int, int], None] | None = None
) -> Iterator[Row]:
    """Compare two checkpoints, or two task vectors, by name.

    Raises
    ------
    MismatchError
        If one is a checkpoint and the other a task vector.
    """
    one, two = _values(left), _values(right)
    if (left.checkpoint is None) != (right.checkpoint is None):
        raise MismatchError(
            f"{left.label} and {right.label}: a checkpoint and a task vector cannot be compared",
            fix="write base+adapter for the one that is an adapter",
        )
    names = dict.fromkeys([*one, *two])
    total = sum(size_of(one[name].shape) for name in names if name in one)
    done = 0
    for name in names:
        if name not in two or name not in one:
            status = "only left" if name in one else "only right"
            yield Row(name, status, entries=size_of((one.get(name) or two[name]).shape))
            continue
        yield _compare(name, one[name], two[name])
        done += size_of(one[name].shape)
        if progress is not None:
            progress(done, total)


def _values(source: Source) -> Mapping[str, Delta]:
    """What is compared: weights as they would be used, or displacements."""
    if source.checkpoint is None:
        return source.deltas or {}
    found: dict[str, Delta] = {
        name: Dense(tensor) for name, tensor in source.checkpoint.tensors.items()
    }
    for name, delta in (source.deltas or {}).items():
        if isinstance(delta, Replacement):
            found[name] = Dense(delta.values)
        else:
            found[name] = Dense(Applied(source.checkpoint.tensors[name], delta))
    return found


def _dtype(delta: Delta) -> str:
    values = getattr(delta, "values", None)
    return "" if values is None else str(values.dtype)


def _compare(name: str, left: Delta, right: Delta) -> Row:
    size = size_of(left.shape)
    if left.shape != right.shape:
        return Row(name, "shape", entries=size, detail=f"{left.shape} against {right.shape}")
    kinds = _dtype(left), _dtype(right)
    detail = f"{kinds[0]} against {kinds[1]}" if kinds[0] != kinds[1] else ""
    if detail and (kinds[0] in FLOATING) != (kinds[1] in FLOATING):
        return Row(name, "dtype", entries=size, detail=detail)
    sums = np.zeros(4)
    largest = 0.0
    wide = np.dtype(np.float64)
    for start in range(0, size, _PIECE):
        stop = min(start + _PIECE, size)
        a, b = (_read(each, start, stop, wide) for each in (left, right))
        gap = a - b
        sums += [gap @ gap, a @ a, b @ b, a @ b]
        largest = max(largest, float(np.abs(gap).max(initial=0.0)))
        if np.isnan(gap).any():
            largest = nan
    apart, own, other, inner = (float(each) for each in sums)
    relative = sqrt(apart / own) if own > 0 else (0.0 if apart == 0 else float("inf"))
    cosine = inner / sqrt(own * other) if own > 0 and other > 0 else nan
    status = "equal" if apart == 0 else "differs"
    return Row(name, status, relative, largest, cosine, size, detail)


def _read(delta: Delta, start: int, stop: int, dtype: np.dtype[Any]) -> Any:
    if isinstance(delta, Replacement):
        return delta.values.read(start, stop).astype(dtype)
    return tile(delta, start, stop, dtype)
