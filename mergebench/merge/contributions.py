"""What each model contributes to each tensor: its weights, or how far it is from the base."""

from __future__ import annotations

from collections.abc import Mapping

from mergebench.checkpoints.layout import Checkpoint
from mergebench.core.delta import Delta, Dense, Difference, Replacement
from mergebench.core.errors import MismatchError
from mergebench.core.tensor import FLOATING, Tensor
from mergebench.merge.spaces import Spaces
from mergebench.sources import Applied, Source


def in_spaces(
    model: Source, base: Source | None, spaces: Spaces, form: str, apart: Mapping[str, Tensor]
) -> dict[str, Delta]:
    """What one model contributes to each floating tensor, in that tensor's space."""
    found = {space: _displacements(model, base, space, form, apart) for space in spaces.used}
    names = dict.fromkeys(name for each in found.values() for name in each)
    return {n: found[spaces.at(n)][n] for n in names if n in found[spaces.at(n)]}


def _displacements(
    model: Source, base: Source | None, space: str, form: str, apart: Mapping[str, Tensor]
) -> dict[str, Delta]:
    """What one model contributes to each floating tensor, in one space."""
    own = model.checkpoint
    if own is not None and model.deltas is not None and space == "delta" and base is not None:
        # An adapter on the very base of the merge is that adapter: no rounding in between.
        own = None if _same_weights(own, base.checkpoint) else own
    over: Mapping[str, Delta] = model.deltas if model.deltas is not None else {}
    if own is None:
        if space == "weight" and base is not None and base.checkpoint is not None:
            own = base.checkpoint
        else:
            # An adapter holds replaced tensors in full, whatever the base has.
            under = base.checkpoint if base is not None and form != "lora" else None
            return {name: _against(delta, under, name) for name, delta in over.items()}
    values: dict[str, Tensor] = {
        name: tensor
        for name, tensor in own.tensors.items()
        if tensor.dtype in FLOATING and name not in own.aliases and name not in apart
    }
    added: dict[str, Delta] = {}
    for name, delta in over.items():
        if isinstance(delta, Replacement) and name not in own.tensors:
            added[name] = delta
        else:
            values[name] = _on_top(values.get(name), delta, name, model.label)
    if space == "weight":
        return added | {name: Dense(tensor) for name, tensor in values.items()}
    assert base is not None
    assert base.checkpoint is not None
    origin = base.checkpoint.tensors
    return added | {name: Difference(tensor, origin[name]) for name, tensor in values.items()}


def _same_weights(own: Checkpoint, base: Checkpoint | None) -> bool:
    return base is not None and own.path.resolve() == base.path.resolve()


def _against(delta: Delta, base: Checkpoint | None, name: str) -> Delta:
    """New values become a difference where the base has the tensor."""
    if isinstance(delta, Replacement) and base is not None and name in base.tensors:
        return Difference(delta.values, base.tensors[name])
    return delta


def _on_top(weight: Tensor | None, delta: Delta, name: str, label: str) -> Tensor:
    if isinstance(delta, Replacement):
        return delta.values
    if weight is None:
        raise MismatchError(f"{label}: the adapter changes {name!r}, which its base does not have")
    return Applied(weight, delta)
