"""What a process does for a merge that it shares with others: one unit at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mergebench.checkpoints.placed import Placed, Staged
from mergebench.checkpoints.placement import Layout
from mergebench.compute.seen import fold_of
from mergebench.merge.at import At, Stack
from mergebench.merge.one_tensor import merge_tensor, targets_of
from mergebench.merge.op import Chain
from mergebench.merge.outcome import Outcome
from mergebench.merge.plan import Plan
from mergebench.merge.stream import Evaluator
from mergebench.merge.sweep import ItemSweep

#: ``(tensor, first entry, entry after the last, result of a visitor)``.
Look = tuple[str, int, int, Any]
#: Results of a tensor that are folded at once.
_TOGETHER = 64


@dataclass(frozen=True)
class Merged:
    """A unit that lies on the disk.

    Attributes
    ----------
    outcomes : mapping of tensor name to Outcome
        Tensors of the plan.
    digests : tuple of mappings of tensor name to digest
        Per output, of its tensors: xxh3-128 of their bytes.
    """

    outcomes: Mapping[str, Outcome]
    digests: tuple[Mapping[str, str], ...]


def look(sweep: ItemSweep, visit: Callable[[Stack, At], Any]) -> list[Look]:
    """What a visitor says of some tensors, folded as far as it can be."""
    found: list[Look] = []
    fold = fold_of(visit)
    own: list[Look] = []
    for at, result in sweep.here(visit):
        if fold is None:
            found.append((at.site.name, at.start, at.stop, result))
            continue
        if own and own[0][0] != at.site.name:
            found.append(_folded(own, fold))
            own = []
        own.append((at.site.name, at.start, at.stop, result))
        if len(own) == _TOGETHER:
            own = [_folded(own, fold)]
    return [*found, _folded(own, fold)] if own else found


def _folded(own: Sequence[Look], fold: Callable[[Any], Any]) -> Look:
    name, start = own[0][:2]
    return name, start, own[-1][2], fold([each[1:] for each in own])


def seen(sweep: ItemSweep, looks: Iterable[Look]) -> Iterator[tuple[At, Any]]:
    """The results of :func:`look`, wherever it ran, as those of the sweep."""
    items = {item.site.name: item for item in sweep.items}
    for name, start, stop, result in looks:
        yield sweep.after(items[name].at(start, stop)), result


def merge_unit(
    plan: Plan,
    evaluator: Evaluator,
    names: Iterable[str],
    places: Sequence[tuple[Staged, Layout]],
    merged: Callable[[int], None] = lambda entries: None,
) -> Merged:
    """Merge some tensors into every output, down to the disk.

    Whoever does so, and however often, writes the same bytes to the same places.
    """
    with ExitStack() as stack:
        sinks = [stack.enter_context(Placed(staged, layout)) for staged, layout in places]
        outcomes = {}
        for name in names:
            outcomes[name] = merge_tensor(plan, evaluator, name, sinks, merged)
            for sink in sinks:
                for target in targets_of(plan, name):
                    sink.finish(target)
            evaluator.forget(name)
        return Merged(outcomes, tuple(sink.digests() for sink in sinks))


def measure_whole(plan: Plan, evaluator: Evaluator) -> None:
    """Measure whatever is measured over the whole model, always in the same order."""
    for name in plan.aligned.order:
        item = plan.aligned.items.get(name)
        for variant in plan.variants if item is not None else ():
            assert item is not None
            evaluator.prepare(variant.at(name), item, whole=True)


def whole_only(known: Mapping[tuple[Chain, str], Any]) -> dict[tuple[Chain, str], Any]:
    """Of what was measured, what units need from each other."""
    return {
        key: value
        for key, value in known.items()
        if (asked := key[0][-1].statistic) is not None and asked.scope == "model"
    }
