"""Adapters on another base than the one they name: what fits, and how far the bases are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.checkpoints.layout import Checkpoint
from mergebench.core.errors import MergebenchError, MismatchError
from mergebench.core.tensor import Tensor
from mergebench.merge.origin import UNRELATED, names_another, tells
from mergebench.merge.sampled import Likeness, likeness
from mergebench.sources import Source
from mergebench.sources.opening import open_source


def check_fit(models: Sequence[Source], base: Source | None, *, allow: bool) -> list[str]:
    """Compare the base with those that adapters were trained on, where these are on this machine.

    Only headers and a bounded sample of entries are read.

    Parameters
    ----------
    models : sequence of Source
    base : Source or None
    allow : bool
        Make a note of what would be refused.

    Returns
    -------
    list of str
        A note per adapter that names another base; none where both are the same to the eye.

    Raises
    ------
    MismatchError
        If the bases are unrelated: an adapter means nothing on another pretraining.
    """
    if base is None or base.checkpoint is None:
        return []
    notes = []
    for model in models:
        name = model.config.get("base_model_name_or_path")
        if model.checkpoint is not None or not isinstance(name, str) or not name:
            continue
        said = f"{model.label} names the base {name}, and {base.label} is given"
        own = _open(name)
        if own is None:
            if names_another(name, base.label):
                notes.append(f"{said}; {_fitting(model, base.checkpoint)}")
            continue
        found = likeness(_floats(own), [_floats(base.checkpoint)])[0]
        if found and not any(each.ratio for each in found.values()):
            continue
        text = "; ".join([said, _fitting(model, base.checkpoint), *_apart(found)])
        if not allow and any(tells(each) and each.cosine < UNRELATED for each in found.values()):
            raise MismatchError(
                text,
                expected="a base that comes from the same pretraining",
                fix="give the base it was trained on, or add --allow-base-mismatch",
            )
        notes.append(text)
    return notes


def _fitting(model: Source, base: Checkpoint) -> str:
    deltas = dict(model.deltas or {})
    fit = sum(
        name in base.tensors and tuple(base.tensors[name].shape) == tuple(delta.shape)
        for name, delta in deltas.items()
    )
    return f"{fit} of its {len(deltas)} tensors fit"


def _apart(found: Mapping[str, Likeness]) -> Iterator[str]:
    if not found:
        yield "the bases have no matrix in common"
    for group, each in found.items():
        yield (
            f"the {group} matrices of the bases have cosine {each.cosine:.3f} and relative "
            f"distance {each.ratio:.2g}"
        )


def _floats(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = checkpoint.tensors.items()
    return {name: tensor for name, tensor in tensors if name not in checkpoint.aliases}


def _open(name: str) -> Checkpoint | None:
    """The checkpoint of this path, or of this name in the Hub's cache."""
    path = Path(name).expanduser()
    if not path.exists():
        cached = _cached(name)
        if cached is None:
            return None
        path = cached
    try:
        return open_source(str(path), ReadOptions()).checkpoint
    except MergebenchError:
        # What an adapter names is no input: only what can be compared is compared.
        return None


def _cached(name: str) -> Path | None:
    if name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found: Any = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
