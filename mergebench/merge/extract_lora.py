"""The recipe that extracts a LoRA from a full fine-tune."""

from __future__ import annotations

from collections.abc import Sequence

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.core.errors import MismatchError, ParameterError, did_you_mean
from mergebench.core.site import make_sites
from mergebench.recipe import ModelRef, Recipe
from mergebench.sources.opening import open_source

#: What is done with embeddings and heads.
EMBEDDINGS = ("whole", "lora", "base")
_CLASSES = ("embedding", "head")


def extraction(
    model: str,
    base: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    embeddings: str = "whole",
    whole: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str = "keep",
    target: str | None = None,
    allow_base_mismatch: bool = False,
    out: str | None = None,
) -> Recipe:
    """A merge of one model that writes the best low-rank approximation of what it has moved.

    Parameters
    ----------
    model, base : str
        References, as of merges.
    rank : int, optional
        Most rank of a layer.
    energy : float in (0, 1], optional
        Share of the squared norm of a layer's update that its rank keeps; with ``rank`` the less
        of both. One of them is needed.
    embeddings : whole, lora or base, default whole
        Embeddings and the head: their new values in full, factors like those of other layers, or
        nothing, which leaves them as they are in the base.
    whole : sequence of str
        Selectors of other tensors that are written in full.
    include, exclude, dtype, target, allow_base_mismatch, out
        As in :class:`~mergebench.recipe.Recipe`.

    Raises
    ------
    ParameterError
        Without rank and energy, and for an unknown choice.
    MismatchError
        If the model is an adapter.
    """
    if rank is None and energy is None:
        raise ParameterError("extract-lora: how much to keep is not said", fix="add --rank 16")
    if embeddings not in EMBEDDINGS:
        raise ParameterError(
            f"embeddings: {embeddings!r}", fix=did_you_mean(embeddings, EMBEDDINGS)
        )
    opened = open_source(model, ReadOptions()).checkpoint
    if opened is None:
        raise MismatchError(
            f"{model}: is an adapter already",
            fix=f"truncate it: mergebench merge {model} --as lora -m task_arithmetic --rank 16",
        )
    sites = make_sites({name: tuple(each.shape) for name, each in opened.tensors.items()})
    present = {site.kind for site in sites.values()}
    ends = [f"class={kind}" for kind in _CLASSES if kind in present]
    return Recipe(
        models=(ModelRef(model),),
        base=base,
        method="task_arithmetic",
        form="lora",
        rank=rank,
        energy=energy,
        whole=(*whole, *(ends if embeddings == "whole" else ())),
        include=tuple(include),
        exclude=(*exclude, *(ends if embeddings == "base" else ())),
        dtype=dtype,
        target=target,
        allow_base_mismatch=allow_base_mismatch,
        out=out,
    )
