"""What of a tensor the compiled passes read: stored entries of all models, and of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mergebench.compute.linking import Held
from mergebench.core.delta import Delta, Dense, Difference
from mergebench.core.site import Site
from mergebench.core.tensor import DTYPES, Tensor
from mergebench.merge.kernels import codes as c
from mergebench.merge.kernels.program import Rows


@dataclass(frozen=True, eq=False)
class Stored:
    """The stored entries of one tensor in all models, and in the base.

    Attributes
    ----------
    site : Site
    rows : tuple of Tensor or None
        Per model, then the base if there is one: what is read.
    computed : tuple of Delta or None
        As many: what has to be computed instead.
    kinds : int64 array, (models + 1,)
        The dtype of each, and of the base.
    minus : int64 array, (models,)
        1 where the base is to be subtracted.
    based : bool
        Whether there is a base.
    width : int
        Bytes of the widest entry.
    """

    site: Site
    rows: tuple[Tensor | None, ...]
    computed: tuple[Delta | None, ...]
    kinds: NDArray[np.int64]
    minus: NDArray[np.int64]
    based: bool
    width: int

    @cached_property
    def held(self) -> Held:
        """What the passes are told of it."""
        return Held(self.kinds, self.minus, self.based)

    @property
    def models(self) -> int:
        """How many models there are."""
        return len(self.minus)

    @property
    def alike(self) -> Rows:
        """How the models are stored."""
        if self.minus.all():
            return "differences"
        values = not self.minus.any() and bool((self.kinds[:-1] != c.ZEROS).all())
        return "values" if values else "mixed"


def stored(site: Site, deltas: Sequence[Delta | None], base: Tensor | None) -> Stored | None:
    """What a kernel reads for a tensor; ``None`` where it cannot."""
    origin = base
    rows: list[Tensor | None] = []
    computed: list[Delta | None] = []
    for delta in deltas:
        computed.append(None)
        match delta:
            case None:
                rows.append(None)
            case Difference(finetuned, below):
                if origin is not None and below is not origin:
                    return None
                origin = below
                rows.append(finetuned)
            case Dense(values):
                rows.append(values)
            case _:
                rows.append(None)
                computed[-1] = delta
    minus = np.array([isinstance(each, Difference) for each in deltas], np.int64)
    if origin is not None:
        rows.append(origin)
        computed.append(None)
    names = [
        "" if row is None and own is None else "F32" if row is None else row.dtype
        for row, own in zip(rows, computed, strict=True)
    ]
    if not all(name in c.KINDS for name in names):
        return None
    return Stored(
        site,
        tuple(rows),
        tuple(computed),
        np.array([c.KINDS[name] for name in names] + [c.ZEROS] * (origin is None)),
        minus,
        origin is not None,
        max(DTYPES[name].itemsize if name else 1 for name in names),
    )
