"""Weights that a model holds once and a checkpoint stores twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mergebench.core.site import kind_of
from mergebench.core.tensor import DTYPES, Tensor, size_of

#: Bytes of each tensor compared at a time.
PIECE = 8 << 20


def find_ties(
    config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Heads that repeat the input embedding, as ``{head: embedding}``, and notes for the user.

    Only where the config says ``tie_word_embeddings`` (itself or its ``text_config``), and only
    for tensors of one shape and dtype whose bytes are the same. The input embedding is one with
    the most rows: the vocabulary, rather than positions or token types.

    Raises
    ------
    MergebenchError
        If a tensor cannot be read.
    """
    if not is_tied(config):
        return {}, ()
    aliases: dict[str, str] = {}
    notes = []
    for head, alike in heads(tensors).items():
        same = next((name for name in alike if same_bytes(tensors[name], tensors[head])), None)
        if same is not None:
            aliases[head] = same
        elif alike:
            notes.append(
                f"the config ties the embeddings, but {head} differs from {alike[0]}: both are kept"
            )
    return aliases, tuple(notes)


def heads(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Every head, with the input embeddings of its shape and dtype that it may repeat."""
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) == 2}
    kinds = {name: kind_of(name, tensor.shape) for name, tensor in matrices.items()}
    embeddings = [name for name, kind in kinds.items() if kind == "embedding"]
    rows = max((matrices[name].shape[0] for name in embeddings), default=0)
    return {
        head: [
            name
            for name in embeddings
            if matrices[name].shape[0] == rows
            and matrices[name].shape == matrices[head].shape
            and matrices[name].dtype == matrices[head].dtype
        ]
        for head, kind in kinds.items()
        if kind == "head"
    }


def same_content(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bytes."""
    if left is right:
        return True
    if left.dtype != right.dtype or tuple(left.shape) != tuple(right.shape):
        return False
    return same_bytes(left, right)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes, read in small pieces."""
    step = PIECE // DTYPES[left.dtype].itemsize
    size = size_of(left.shape)
    for start in range(0, size, step):
        stop = min(start + step, size)
        mine, other = left.read(start, stop), right.read(start, stop)
        # Bytes rather than numbers: a NaN equals itself here, and 0 is not -0.
        if not np.array_equal(
            np.ascontiguousarray(mine).view(np.uint8), np.ascontiguousarray(other).view(np.uint8)
        ):
            return False
    return True


def is_tied(config: Mapping[str, Any] | None) -> bool:
    """Whether a config ties the head to the embeddings."""
    parts = (config or {}, (config or {}).get("text_config"))
    return any(
        isinstance(part, Mapping) and part.get("tie_word_embeddings") is True for part in parts
    )
