"""The error of every displacement, from what will be read from the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions, read_adapter
from mergebench.adapters_zoo.packed_file import Cache, Unpacked
from mergebench.core.delta import Delta, LowRank
from mergebench.ship.measure import Error, error_of, errors_of
from mergebench.ship.pieces import Contents
from mergebench.ship.spool import Spooled


def compared(contents: Contents, packed: Mapping[str, Spooled]) -> Iterator[tuple[str, Error]]:
    """The error of every displacement, from what will be read from the file."""
    cache = Cache()
    tensors = {name: Unpacked(each.opened(contents.label), cache) for name, each in packed.items()}
    if contents.pairs:
        yield from _compared_pairs(contents, tensors)
        return
    adapter = AdapterSource(contents.label, tensors, None, contents.metadata)
    options = contents.reopen or ReadOptions()
    yield from errors_of(contents.deltas, read_adapter(adapter, options)).items()


def _compared_pairs(
    contents: Contents, tensors: Mapping[str, Unpacked]
) -> Iterator[tuple[str, Error]]:
    def product(pair: tuple[str, str], of: Mapping[str, Any]) -> Delta:
        B, A = (of[name] for name in pair)
        return LowRank(B, A, 1.0, B.shape[:1] + A.shape[1:])

    for module, pair in contents.pairs.items():
        error = error_of(product(pair, contents.factors), product(pair, tensors))
        assert error is not None
        scale = contents.scales.get(module, 1.0) ** 2
        yield module, Error(
            error.apart * scale, error.own * scale, error.other * scale, error.inner * scale,
            error.entries,
        )  # fmt: skip
