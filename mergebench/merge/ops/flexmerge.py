"""FlexMerge: merge block by block, only where and as far as tasks are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge

from mergebench.compute.gram import grouped_sums, inner_products
from mergebench.compute.linkage import Linkage, cosines, grouped
from mergebench.compute.masking import silence
from mergebench.compute.matrices import mean_rows, sum_rows
from mergebench.compute.namespace import as_numpy, namespace
from mergebench.compute.seen import Seen
from mergebench.core.site import Site
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.op import op

#: What is merged as a whole: the parts of a numbered block (attention, MLP, each norm), the block,
#: or every tensor alone. Outside of numbered blocks parts are modules.
Blocks = Literal["part", "layer", "tensor"]
Merger = Literal["average", "ties"]


def block_of(site: Site, blocks: Blocks) -> str:
    """The block that a tensor belongs to, by name."""
    if blocks == "tensor":
        return site.name
    if site.block is None:
        return site.name.rpartition(".")[0] or site.name
    _, index, rest = site.name.partition(f".{site.block}.")
    layer = f"{site.stack}.{site.block}"
    if blocks == "layer" or not index:
        return layer
    # T5 numbers the parts of a block: layer.0 is attention.
    part, *more = rest.split(".")
    return ".".join([layer, part, *([more[0]] if more and more[0].isdecimal() else [])])


def _raw(at: At) -> Stack:
    """The task vectors as they came, times their weights, (n, m)."""
    assert at.models is not None
    xp = namespace(at.models)
    shares = xp.asarray(at.weights, dtype=at.models.dtype, device=at.models.device)
    return at.models * shares[:, None]


def _as_they_came(stack: Stack, at: At) -> tuple[Stack, At]:
    del stack
    return _raw(at), at


def _groups(
    sweep: Sweep, size: float, linkage: Linkage, blocks: Blocks
) -> dict[str, tuple[int, ...]]:
    """For every block and model the model that its group is called after."""
    sizes: Counter[str] = Counter()
    keys: tuple[int, ...] = ()

    def raw(visit: Callable[[Stack, At], Any]) -> Iterator[tuple[At, Any]]:
        nonlocal keys
        for at, found in sweep(Seen(visit, _as_they_came)):
            sizes[block_of(at.site, blocks)] += at.stop - at.start
            keys = at.keys
            yield at, found

    sums = grouped_sums(raw, inner_products, lambda site: block_of(site, blocks))
    products = {name: as_numpy(each).reshape(each.shape[-2:]) for name, each in sums.items()}
    likeness = {name: cosines(each) for name, each in products.items()}
    return grouped(likeness, sizes, size * sum(sizes.values()), linkage, keys)


def _statistic(
    size: float, merger: Merger, lam: float, linkage: Linkage, blocks: Blocks
) -> Statistic:
    return Statistic("model", partial(_groups, size=size, linkage=linkage, blocks=blocks))


def _ties(stack: Stack) -> Stack:
    """The mean of what has the sign of the sum, (1, m); zero where the sum is."""
    xp = namespace(stack)
    total = sum_rows(stack)
    agrees = ((stack > 0) & (total > 0)) | ((stack < 0) & (total < 0))
    behind = sum_rows(xp.astype(agrees, stack.dtype))
    return sum_rows(silence(stack, agrees)) / (behind + xp.astype(behind == 0, stack.dtype))


@op(statistic=_statistic, needs_models=True, apart="each")
def flexmerge(
    stack: Stack,
    at: At,
    size: Annotated[float, Ge(1)] = 2.0,
    merger: Merger = "average",
    lam: float = 1.0,
    linkage: Linkage = "complete",
    blocks: Blocks = "part",
) -> Stack:
    """Merge the blocks in which tasks are most alike, until all fit a size (FlexMerge).

    At first every task has every block for itself. In every step the two groups of tasks that are
    most alike in one block share it from then on, until all blocks that are left take no more
    than ``size`` models. Cosines are those of the task vectors as they came in; what a group
    shares is always merged from those that reach this op.

    Parameters
    ----------
    size : float >= 1, default 2
        In models. 1 merges all tasks in every block; the number of models merges nothing.
    merger : average or ties, default average
        The mean, or the mean of what has the sign of the sum.
    lam : float, default 1.0
        Multiplies what several tasks share. What a task has for itself stays as it came in.
    linkage : complete, average or single, default complete
        Groups are as alike as their least alike members, as all pairs on average, or as the most
        alike members.
    blocks : part, layer or tensor, default part
        What is shared as a whole: the parts of numbered blocks (attention, MLP, each norm) and
        other modules, whole numbered blocks, or tensors.
    """
    groups = at.value.get(block_of(at.site, blocks), tuple(range(stack.shape[0])))
    raw, rows, shared = _raw(at), [], {}
    for model, first in enumerate(groups):
        members = [other for other, name in enumerate(groups) if name == first]
        if len(members) == 1:
            rows.append(raw[model : model + 1, :])
            continue
        if first not in shared:
            xp = namespace(stack)
            part = xp.concat([stack[other : other + 1, :] for other in members], axis=0)
            shared[first] = (mean_rows(part) if merger == "average" else _ties(part)) * lam
        rows.append(shared[first])
    return namespace(stack).concat(rows, axis=0)
