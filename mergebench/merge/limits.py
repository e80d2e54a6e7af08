"""What the machine must offer: memory, disk, and a place that is free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mergebench.compute.tiles import Load, Tiling, fit
from mergebench.core.delta import LowRank
from mergebench.core.errors import MergebenchError, ParameterError, ResourceError
from mergebench.core.tensor import DTYPES
from mergebench.merge.align import Aligned
from mergebench.merge.op import Granularity, granularity_of
from mergebench.merge.package import Package
from mergebench.merge.stream import Item
from mergebench.merge.variants import Variant
from mergebench.sources import Source

DEFAULT_MEMORY = 512 << 20
#: What a search for a threshold may hold (see compute.select), and small buffers.
_STATISTIC, _BUFFERS = 72 << 20, 8 << 20


def choose_tiling(
    aligned: Aligned,
    variants: Sequence[Variant],
    built: Package,
    budget: int,
    workers: int | None,
) -> tuple[Tiling, int, int]:
    """The tiling within ``budget`` bytes, the memory it needs, and the least that any needs.

    Raises
    ------
    ResourceError
        If even the least is above the budget, naming it.
    """
    items = list(aligned.items.values())
    chains = {ops for each in variants for ops in each.distinct}
    statistic = any(op.statistic is not None for ops in chains for op in ops)
    fixed = _BUFFERS + (_STATISTIC if statistic else 0) + built.dense_bytes
    largest, where = max(
        ((_unit(variants, item), item.site.name) for item in items),
        default=(1, ""),
    )
    load = Load(
        models=max((len(item.deltas) for item in items), default=1),
        outputs=len(variants),
        itemsize=max((item.dtype.itemsize for item in items), default=4),
        out_itemsize=max(DTYPES[spec.dtype].itemsize for spec in built.specs),
        unit=largest,
        fixed=fixed,
        largest=max((item.site.size for item in items), default=1),
        shared=max((_shared(variants, name) for name in aligned.items), default=0),
        factors=tuple(_factors(item) for item in items),
    )
    if workers is not None and workers < 1:
        raise ParameterError("workers", expected="at least 1", got=str(workers))
    tiling, least = fit(load, budget, workers or cores())
    needed = load.bytes(tiling)
    if needed > budget:
        why = ""
        if built.dense_bytes > least // 2:
            why = "it holds the factors and matrix of a whole module, which --as delta does not; "
        elif (piece := _piece(variants, where)) != "entry":
            why = f"its largest piece is a {piece} of {where!r}; "
        raise ResourceError(
            f"this merge needs at least {_mib(least)}",
            got=f"--memory {_mib(budget)}",
            fix=f"{why}give --memory {-(-least // (1 << 20))}MiB",
        )
    return tiling, needed, least


def _shared(variants: Sequence[Variant], name: str) -> int:
    """Beginnings of chains that are kept while a tile serves several outputs."""
    if len(variants) == 1:
        return 0
    chains = [each.at(name) for each in variants]
    return len({ops[:end] for ops in chains for end in range(1, len(ops) + 1)})


def _factors(item: Item) -> tuple[int, int]:
    """Entries of a tensor, and bytes of its low-rank factors while it is worked on."""
    held = 0
    for delta in item.deltas:
        if isinstance(delta, LowRank):
            held += 8 * (item.site.size // max(item.site.row, 1) + item.site.row) * delta.rank
    return item.site.size, held


def _unit(variants: Sequence[Variant], item: Item) -> int:
    return Tiling().unit(_piece(variants, item.site.name), item.site.size, item.site.row)


def _piece(variants: Sequence[Variant], name: str) -> Granularity:
    return granularity_of(tuple(op for each in variants for op in each.at(name)))


def _mib(count: int) -> str:
    return f"{-(-count // (1 << 20))} MiB"


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def check_places(variants: Sequence[Variant], inputs: Sequence[Source]) -> None:
    """Refuse an output that would replace an input, stand inside of one, or around it.

    Raises
    ------
    MergebenchError
    """
    names = [source.label for source in inputs]
    paths = [Path(part).expanduser() for name in names for part in (name, *name.split("+"))]
    taken = [path.resolve() for path in paths if path.exists()]
    for variant in variants:
        if variant.out is None:
            continue
        out = variant.out.resolve()
        for path in taken:
            if out == path or (path.is_dir() and path in out.parents) or out in path.parents:
                raise MergebenchError(
                    f"{variant.out}: the output would replace or lie inside the input {path}",
                    fix="give another place with -o",
                )
