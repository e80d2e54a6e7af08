"""What is measured of inputs once, for several merges of them.

Thresholds, norms and votes depend on the inputs and on the ops up to the one that asks, and not on
what comes after: recipes that differ in a final scale, as those of a grid over it, have all of them
in common.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from mergebench.compute.cut import Cut
from mergebench.merge.item import Item
from mergebench.merge.op import Chain
from mergebench.merge.plan import Plan

#: Bytes that are kept. Thresholds of a model of 1000 tensors take less than one of it.
ROOM = 8 << 20
#: What comes of these is among the ops, and the items of a plan.
_LATER = ("method", "params", "ops", "then", "compat", "out", "shard_size", "dtype")
#: Of one value that is no array, about.
_PLAIN = 64

Key = tuple[Chain, str]


class Shared:
    """Measured values of several plans.

    Parameters
    ----------
    room : int, bytes, default 8 MiB
        Values that find no room are measured again.
    """

    def __init__(self, room: int = ROOM) -> None:
        self.room = room
        self._values: dict[str, dict[Key, Any]] = {}

    def of(self, plan: Plan, about: dict[str, Any]) -> Measured:
        """Those of plans with the same inputs.

        Parameters
        ----------
        plan : Plan
        about : mapping
            What decides an output of it, see :func:`mergebench.merge.resume.decides`.
        """
        return Measured(self, self._values.setdefault(_inputs(plan, about), {}))


class Measured:
    """The values of one set of inputs; see :class:`Shared`."""

    def __init__(self, owner: Shared, values: dict[Key, Any]) -> None:
        self._owner, self._values = owner, values

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __getitem__(self, key: Key) -> Any:
        return self._values[key]

    def add(self, key: Key, value: Any) -> None:
        """Keep a value that nobody will change, if there is room."""
        size = _bytes(value)
        if size is not None and size <= self._owner.room and key not in self._values:
            self._owner.room -= size
            self._values[key] = value


def _inputs(plan: Plan, about: dict[str, Any]) -> str:
    """Names all that ops can see."""
    recipe = {name: value for name, value in about["recipe"].items() if name not in _LATER}
    rest = {name: value for name, value in about.items() if name not in ("ops", "layout", "recipe")}
    items = [list(map(repr, _item(each))) for each in plan.aligned.items.values()]
    return json.dumps([recipe, rest, items], sort_keys=True, default=repr)


def _item(item: Item) -> Iterator[Any]:
    yield from (item.site.name, item.site.shape, item.part, item.weights, item.keys, item.places)
    yield from (item.dtype, item.lenient, item.base is None, item.origin is None)
    yield from (type(delta).__name__ for delta in item.deltas)


def _bytes(value: Any) -> int | None:
    """What a value takes; ``None`` for one of which that is not known."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic, Cut)):
        return _PLAIN + (len(value) if isinstance(value, (str, bytes)) else 0)
    if isinstance(value, np.ndarray):
        return _PLAIN + value.nbytes
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, (list, tuple)):
        return None
    sizes = [_bytes(each) for each in value]
    return None if None in sizes else _PLAIN + sum(size for size in sizes if size is not None)
