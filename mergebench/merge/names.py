"""Whether a model has the tensors of another, by name and kind."""

from __future__ import annotations

from collections.abc import Sequence

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.ties import is_tied
from mergebench.core.errors import MismatchError
from mergebench.core.site import is_constant, kind_of
from mergebench.core.tensor import FLOATING, Tensor
from mergebench.sources import Source

_UNTIE = (
    "merge models that are both tied or both untied: load the tied one, set tie_word_embeddings to "
    "false, give the head a copy of the embedding and save it"
)


def check_names(model: Source, reference: Checkpoint, notes: list[str]) -> dict[str, Tensor]:
    """Compare names and kinds; returns floating tensors that the reference does not have."""
    assert model.checkpoint is not None
    own = model.checkpoint
    if own is reference:
        return {}
    for name in own.tensors.keys() & reference.tensors.keys():
        kinds = own.tensors[name].dtype, reference.tensors[name].dtype
        differ = (kinds[0] in FLOATING) != (kinds[1] in FLOATING)
        if differ and not is_constant(name, reference.tensors[name].shape):
            raise MismatchError(
                f"{name}: {kinds[0]} in {model.label}, {kinds[1]} in {reference.label}",
                fix="give models that agree on which tensors are numbers to merge",
            )
    mine = set(own.tensors) - set(own.aliases)
    theirs = set(reference.tensors) - set(reference.aliases)
    missing = sorted(theirs - mine - set(own.aliases))
    extra = sorted(mine - theirs - set(reference.aliases))
    # Buffers that one version of a library saves and another does not.
    missing = [name for name in missing if not is_optional(name, reference.tensors[name])]
    for name in [name for name in extra if is_optional(name, own.tensors[name])]:
        extra.remove(name)
        notes.append(f"{name} of {model.label} is left out: {reference.label} does not have it")
    # Mixtures with a head that repeats the embedding have been made alike before.
    for tied, apart, names in (
        (reference, own, mine & set(reference.aliases)),
        (own, reference, theirs & set(own.aliases)),
    ):
        if names:
            name = min(names)
            raise MismatchError(
                f"{name}: tied to {tied.aliases[name]!r} in {tied.label}, "
                f"but a tensor of its own in {apart.label}",
                fix=_UNTIE,
            )
    if is_tied(own.config) and (lost := [n for n in missing if _is_head(n, reference)]):
        raise MismatchError(
            f"{lost[0]}: tied to the embeddings in {model.label}, but a tensor of its own in "
            f"{reference.label}",
            fix=_UNTIE,
        )
    if missing:
        others = f", and {_few(extra)} not in {reference.label}" if extra else ""
        raise MismatchError(
            f"{model.label}: {len(missing)} tensors are missing ({_few(missing)}){others}",
            fix="give models fine-tuned from the same base, or choose with --on-mismatch "
            "base|skip|union",
        )
    heads = [name for name in extra if kind_of(name, own.tensors[name].shape) == "head"]
    if heads and is_tied(reference.config):
        raise MismatchError(
            f"{heads[0]}: a tensor of its own in {model.label}, but {reference.label} ties it to "
            "the embeddings",
            fix=_UNTIE,
        )
    return {name: own.tensors[name] for name in extra}


def _is_head(name: str, reference: Checkpoint) -> bool:
    return kind_of(name, reference.tensors[name].shape) == "head"


def is_optional(name: str, tensor: Tensor) -> bool:
    """Whether a model may lack it: integers, and buffers that hold constants."""
    return tensor.dtype not in FLOATING or is_constant(name, tuple(tensor.shape))


def _few(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (", …" if len(names) > most else "")
