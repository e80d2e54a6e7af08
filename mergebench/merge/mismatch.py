"""``--on-mismatch``: tensors that a model lacks, has in another shape, or has alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.ties import is_tied, same_content
from mergebench.core.errors import MismatchError
from mergebench.core.schedule import value_at
from mergebench.core.site import is_constant, is_counter, is_statistic, kind_of, make_sites
from mergebench.core.tensor import FLOATING, Tensor
from mergebench.merge.align import Aligned
from mergebench.merge.averaged import average
from mergebench.merge.spaces import Spaces
from mergebench.sources import Source


@dataclass(frozen=True)
class Odd:
    """One tensor of one model that does not match.

    Attributes
    ----------
    model, tensor : str
    what : str
        ``missing``, ``shape`` or ``extra``; ``differs`` for integers.
    fate : str
        What is done about it.
    """

    model: str
    tensor: str
    what: str
    fate: str

    def to_json(self) -> dict[str, str]:
        """Plain data."""
        return {"model": self.model, "tensor": self.tensor, "what": self.what, "fate": self.fate}


@dataclass(frozen=True, eq=False)
class Evened:
    """Inputs with the same tensors.

    Attributes
    ----------
    models : tuple of Source
    odd : tuple of Odd
    muted : mapping of tensor name to positions of models
        Whose weight does not take part there.
    added : mapping of tensor name to (tensor, reason)
        Of the output, beyond those of the reference.
    """

    models: tuple[Source, ...]
    odd: tuple[Odd, ...] = ()
    muted: Mapping[str, frozenset[int]] = field(default_factory=dict)
    added: Mapping[str, tuple[Tensor, str]] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """One sentence for each model and fate."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for each in self.odd:
            groups.setdefault((each.model, each.what, each.fate), []).append(each.tensor)
        words = {"missing": "are missing", "shape": "have another shape", "extra": "are extra",
                 "differs": "are other integers"}  # fmt: skip
        return [
            f"{model}: {len(names)} tensors {words[what]} ({_few(names)}) and {fate}"
            for (model, what, fate), names in groups.items()
        ]


def even_out(
    models: Sequence[Source],
    weights: Sequence[Any],
    base: Source | None,
    first: Source | None,
    spaces: Spaces,
    form: str,
    policy: str,
    *,
    lenient: bool,
) -> Evened:
    """Make the tensors of all full models those of the reference: the base, or the first of them.

    Parameters
    ----------
    models : sequence of Source, in canonical order
    weights : sequence of float, Gradient or Cases
        In the same order.
    base, first : Source or None
        ``first`` is the full model whose config the output gets without a base.
    spaces : Spaces
    form : model, lora or delta
        Only models get tensors that the reference lacks.
    lenient : bool
        Let entries that are not finite pass through means.
    policy : error, base, skip or union
        ``error`` changes nothing. ``base``: a tensor that does not match in some model comes from
        the base. ``skip``: the model that lacks it, or has it in another shape, does not move it,
        and in weight space its weight does not take part. Both leave extra tensors out. ``union``:
        as ``skip``, and extra tensors are kept, as the weighted mean of those that have them.

    Raises
    ------
    MismatchError
        If ``base`` is asked for and there is none; if extra tensors differ in shape.
    """
    under = base if base is not None else first
    reference = None if under is None else under.checkpoint
    if policy == "error" or reference is None:
        return Evened(tuple(models))
    if policy == "base" and base is None:
        raise MismatchError(
            "--on-mismatch base takes tensors from the base, and none is given", fix="add --base"
        )
    odd: list[Odd] = []
    amiss = [_amiss(model, reference, policy) for model in models]
    everywhere = {name for found in amiss for name in found} if policy == "base" else set()
    changed: list[Source] = []
    muted: dict[str, set[int]] = {}
    extra: dict[str, list[tuple[int, Tensor]]] = {}
    for position, (model, found) in enumerate(zip(models, amiss, strict=True)):
        own = model.checkpoint
        if own is None or own is reference:
            changed.append(_without(model, everywhere) if own is None and everywhere else model)
            continue
        fate = "come from the base" if policy == "base" else "do not take part"
        odd += [Odd(model.label, name, what, fate) for name, what in sorted(found.items())]
        tensors = dict(own.tensors)
        for name in found if policy != "base" else everywhere:
            tensors[name] = reference.tensors[name]
            # No displacement keeps a statistic out of a mean.
            if policy != "base" and (spaces.at(name) == "weight" or is_statistic(name)):
                muted.setdefault(name, set()).add(position)
        for name in _extra(own, reference):
            kept = policy == "union" and form == "model"
            fate = "are added" if kept else "are left out"
            odd.append(Odd(model.label, name, "extra", fate))
            tensor = tensors.pop(name)
            if kept:
                extra.setdefault(name, []).append((position, tensor))
        changed.append(replace(model, checkpoint=replace(own, tensors=tensors)))
    added = {
        name: _joined(name, holders, models, weights, lenient=lenient)
        for name, holders in sorted(extra.items())
    }
    places = {name: frozenset(found) for name, found in muted.items()}
    return Evened(tuple(changed), tuple(odd), places, added)


def _without(model: Source, names: set[str]) -> Source:
    """An adapter without what it displaces of some tensors."""
    deltas = model.deltas
    assert deltas is not None
    kept = {name: delta for name, delta in deltas.items() if name not in names}
    return replace(model, deltas=replace(deltas, deltas=kept))


def _amiss(model: Source, reference: Checkpoint, policy: str) -> dict[str, str]:
    """Tensors of the reference that a model lacks or has otherwise, and how."""
    own = model.checkpoint
    if own is None or own is reference:
        return {}
    found: dict[str, str] = {}
    for name, tensor in reference.tensors.items():
        # A head that one side ties is no missing tensor: that mixture stays refused.
        if name in reference.aliases or (is_tied(own.config) and _is_head(name, tensor)):
            continue
        mine = own.tensors.get(name)
        counted = tensor.dtype in FLOATING and not is_constant(name, tuple(tensor.shape))
        if mine is None:
            if counted:
                found[name] = "missing"
        elif counted and tuple(mine.shape) != tuple(tensor.shape):
            found[name] = "shape"
        elif policy == "base" and _integers(name, tensor) and not same_content(tensor, mine):
            found[name] = "differs"
    return found


def _integers(name: str, tensor: Tensor) -> bool:
    return tensor.dtype not in FLOATING and not is_counter(name)


def _extra(own: Checkpoint, reference: Checkpoint) -> list[str]:
    return [
        name
        for name, tensor in own.tensors.items()
        if name not in reference.tensors
        and name not in own.aliases
        and tensor.dtype in FLOATING
        and not is_constant(name, tuple(tensor.shape))
        and not (is_tied(reference.config) and _is_head(name, tensor))
    ]


def _is_head(name: str, tensor: Tensor) -> bool:
    return kind_of(name, tuple(tensor.shape)) == "head"


def _joined(
    name: str,
    holders: Sequence[tuple[int, Tensor]],
    models: Sequence[Source],
    weights: Sequence[Any],
    *,
    lenient: bool,
) -> tuple[Tensor, str]:
    """One value for a tensor that only some models have."""
    first, shape = holders[0]
    for position, tensor in holders[1:]:
        if tuple(tensor.shape) != tuple(shape.shape):
            raise MismatchError(
                f"{name}: {tuple(shape.shape)} in {models[first].label}, {tuple(tensor.shape)} in "
                f"{models[position].label}, and no base has it",
                fix="--on-mismatch skip leaves it out",
            )
    labels = ", ".join(models[position].label for position, _ in holders)
    if all(same_content(shape, tensor) for _, tensor in holders):
        return shape, f"only in {labels}"
    (site,) = make_sites({name: tuple(shape.shape)}).values()
    plain = [(models[p].label, float(value_at(weights[p], site)), t) for p, t in holders]
    mean, _ = average(name, plain, None, lenient=lenient)
    return mean, f"only in {labels}, their weighted mean"


def extended(aligned: Aligned, evened: Evened) -> Aligned:
    """The fates of all tensors, those that are added included."""
    added = {name: tensor for name, (tensor, _) in evened.added.items()}
    reasons = {name: reason for name, (_, reason) in evened.added.items()}
    amiss = {each.tensor for each in evened.odd if each.fate == "come from the base"}
    reasons |= {name: "does not match in all inputs" for name in amiss if name in aligned.copies}
    return replace(
        aligned,
        order=(*aligned.order, *added),
        copies={**aligned.copies, **added},
        reasons={**aligned.reasons, **reasons},
    )


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
