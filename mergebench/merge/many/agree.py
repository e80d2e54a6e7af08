"""Whether two processes mean the same merge, and what differs if they do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergebench.core.errors import MismatchError
from mergebench.merge.plan import Plan
from mergebench.merge.resume import decides

#: Digests by kind, one mapping per output.
Marks = tuple[Mapping[str, str], ...]

_WORDS = {
    "mergebench": "another version of mergebench",
    "recipe": "another recipe",
    "ops": "other parameters of methods",
    "form": "another form of the output",
    "base": "another base: other names, sizes, times or headers of its files",
    "models": "other models: other names, sizes, times or headers of their files",
    "weights": "other weights",
    "tokenizers": "other files of a tokenizer",
    "statistics": "other statistics",
    "layout": "another layout of the output",
}


def marks_of(plan: Plan) -> Marks:
    """What decides the bytes of each output, kind by kind, as digests."""
    return tuple(
        {kind: _digest(value) for kind, value in decides(plan, variant).items()}
        for variant in plan.variants
    )


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_alike(mine: Marks, wanted: Marks, who: str, place: str) -> None:
    """Refuse to take part in another merge.

    Parameters
    ----------
    mine, wanted : Marks
    who : str
        Names this process.
    place : str
        Names the merge.

    Raises
    ------
    MismatchError
        Saying what differs.
    """
    if mine == wanted:
        return
    found = _differing(mine, wanted)
    raise MismatchError(
        f"{who}: does not see the merge {place} as it was started",
        got="; ".join(_WORDS.get(kind, kind) for kind in found) or "another number of outputs",
        fix="give every machine the same files, under the same paths, and the same mergebench",
    )


def _differing(mine: Sequence[Mapping[str, str]], wanted: Sequence[Mapping[str, str]]) -> list[str]:
    return [
        kind
        for kind in _WORDS
        if any(one.get(kind) != other.get(kind) for one, other in zip(mine, wanted, strict=False))
    ]
