"""What the machine must offer: memory, disk, and a place that is free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from mergebench.compute.machine import cores
from mergebench.compute.matrices import matrix_shape
from mergebench.compute.tiles import Load, Tiling, fit
from mergebench.core.delta import LowRank
from mergebench.core.errors import MergebenchError, ParameterError, ResourceError
from mergebench.core.tensor import DTYPES
from mergebench.merge.align import Aligned
from mergebench.merge.chains import collects_of, granularity_of, workspace_of
from mergebench.merge.core_space import core_bytes, fits
from mergebench.merge.item import Item
from mergebench.merge.op import Chain, Granularity
from mergebench.merge.package import Package
from mergebench.merge.variants import Variant
from mergebench.sources import Source
from mergebench.sources.references import paths_of

DEFAULT_MEMORY = 512 << 20
#: What a search for a threshold may hold (see compute.select), and small buffers.
_STATISTIC, _BUFFERS = 72 << 20, 8 << 20
#: Entries of all models below which another thread costs more than it gains.
_FEW = 1 << 16
#: Stacks that a tile of what was collected, in float64, and shares made of it take.
_TILED = 10


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
    inside = max((_inside(variants, item) for item in items), default=0)
    fixed = _BUFFERS + (_STATISTIC if statistic else 0) + built.dense_bytes + inside
    largest, where = max(
        ((_unit(variants, item), item.site.name) for item in items), default=(1, "")
    )
    working, heaviest = max(
        ((_workspace(variants, item), item.site.name) for item in items), default=(0, "")
    )
    load = Load(
        models=max((len(item.deltas) for item in items), default=1),
        outputs=len(variants),
        itemsize=max((item.dtype.itemsize for item in items), default=4),
        out_itemsize=max(DTYPES[spec.dtype].itemsize for spec in built.specs),
        unit=largest,
        fixed=fixed,
        largest=max((item.site.size for item in items), default=1),
        shared=max((_shared(variants, name) for name in aligned.items), default=0)
        + (_TILED if any(i.collected and i.collected.entries for i in items) else 0),
        workspace=working,
        factors=tuple(_factors(item) for item in items),
    )
    if workers is not None and workers < 1:
        raise ParameterError("workers", expected="at least 1", got=str(workers))
    entries = sum(len(item.deltas) * item.site.size for item in items)
    tiling, least = fit(load, budget, workers or (1 if entries < _FEW else cores()))
    needed = load.bytes(tiling)
    if needed > budget:
        why = ""
        if built.dense_bytes > least // 2:
            why = "it holds the factors and matrix of a whole module, which --as delta does not; "
        elif working > least // 4:
            why = f"a decomposition of {heaviest!r} takes {_mib(working)}; "
        elif (piece := _piece(_dense(variants, aligned.items[where]))) != "entry":
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
    starts = {ops[:end] for ops in chains for end in range(1, len(ops) + 1)}
    # What only chooses a row of what is there already takes nothing.
    return sum(not ops[-1].spec.chooses for ops in starts)


def _factors(item: Item) -> tuple[int, int]:
    """Entries of a tensor, and bytes of its low-rank factors while it is worked on."""
    held = 0
    for delta in item.deltas:
        if isinstance(delta, LowRank):
            held += 8 * (item.site.size // max(item.site.row, 1) + item.site.row) * delta.rank
    return item.site.size, held


def _unit(variants: Sequence[Variant], item: Item) -> int:
    return Tiling().unit(_piece(_dense(variants, item)), item.site.size, item.site.row)


def _dense(variants: Sequence[Variant], item: Item) -> list[Chain]:
    """The chains that merge an item entry by entry, rather than in factors."""
    chains = [each.at(item.site.name) for each in variants]
    return [ops for ops in chains if not fits(ops, item)]


def _piece(chains: Sequence[Chain]) -> Granularity:
    return granularity_of(tuple(op for ops in chains for op in ops))


def _workspace(variants: Sequence[Variant], item: Item) -> int:
    """The most that an op holds beside its stack while it decomposes a tensor."""
    shape = matrix_shape(item.site.shape)
    own = max(
        (workspace_of(ops, len(item.deltas), shape) for ops in _dense(variants, item)),
        default=0,
    )
    return own + _collected(variants, item)


def _collected(variants: Sequence[Variant], item: Item) -> int:
    """What was collected of a tensor as a whole, and what is computed from it."""
    if item.collected is None or item.collected.entries:
        return 0
    wanted = [collects_of(each.at(item.site.name)) for each in variants]
    return max(each.workspace(len(item.deltas), item.site) for each in wanted if each is not None)


def _inside(variants: Sequence[Variant], item: Item) -> int:
    """What merging an item in bases of its factors holds, and the merged factors of each output."""
    chains = [each.at(item.site.name) for each in variants]
    core = [ops for ops in chains if fits(ops, item)]
    if not core:
        return 0
    rows, columns = matrix_shape(item.site.shape)
    rank = sum(delta.rank for delta in item.deltas if isinstance(delta, LowRank))
    most = max(core_bytes(item, partial(_within, ops)) for ops in core)
    return most + 8 * len(core) * (rows + columns) * min(rank, rows, columns)


def _within(ops: Chain, models: int, rows: int, columns: int) -> int:
    return workspace_of(ops, models, (rows, columns))


def _mib(count: int) -> str:
    return f"{-(-count // (1 << 20))} MiB"


def check_places(variants: Sequence[Variant], inputs: Sequence[Source]) -> None:
    """Refuse an output that would replace an input, stand inside of one, or around it.

    Raises
    ------
    MergebenchError
    """
    paths = [path for source in inputs for path in paths_of(source.label)]
    taken = [path.resolve() for path in paths if path.exists()]
    for variant in variants:
        if variant.out is None:
            continue
        try:
            out = variant.out.resolve()
            os.lstat(out)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise MergebenchError(
                f"{variant.out}: no place that an output can have",
                got=str(error.strerror),
                fix="choose another name with -o",
            ) from None
        for path in taken:
            if out == path or (path.is_dir() and path in out.parents) or out in path.parents:
                raise MergebenchError(
                    f"{variant.out}: the output would replace or lie inside the input {path}",
                    fix="give another place with -o",
                )
