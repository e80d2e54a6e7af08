"""Displacements of one tensor as learning holds them: added, and multiplied with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergebench.core.delta import Delta, LowRank, factors, tile
from mergebench.core.tensor import Array

if TYPE_CHECKING:
    import torch

#: Entries of a product of factors that are formed at a time where parts differ.
_ENTRIES = 1 << 22


@dataclass(frozen=True, eq=False)
class Whole:
    """The displacement of one tensor."""

    values: torch.Tensor

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.values.nbytes

    def to(self, device: str) -> Whole:
        """The same elsewhere."""
        return Whole(self.values.to(device))

    def add_to(self, out: torch.Tensor, coefficient: float) -> None:
        """``out += coefficient · τ``."""
        out.add_(self.values.to(out.dtype), alpha=coefficient)

    def dot(self, gradient: torch.Tensor) -> torch.Tensor:
        """``⟨gradient, τ⟩``, a scalar."""
        return (gradient * self.values.to(gradient.dtype)).sum()

    def add_parts(self, out: torch.Tensor, part: torch.Tensor, each: torch.Tensor) -> None:
        """``out += each[part] ⊙ τ``; ``part`` (size,) are indices into ``each`` (K,)."""
        out.view(-1).addcmul_(each[part.long()], self.values.reshape(-1).to(out.dtype))

    def dot_parts(self, gradient: torch.Tensor, part: torch.Tensor, count: int) -> torch.Tensor:
        """``⟨gradient, m_k ⊙ τ⟩`` of every part k, (count,)."""
        import torch

        product = (gradient * self.values.to(gradient.dtype)).reshape(-1)
        found = torch.zeros(count, dtype=product.dtype, device=product.device)
        return found.index_add_(0, part.long(), product)


@dataclass(frozen=True, eq=False)
class Factored:
    """A displacement whose 2-D form is ``left @ right``: (rows, r) and (r, columns)."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.left.nbytes + self.right.nbytes

    def to(self, device: str) -> Factored:
        """The same elsewhere."""
        return Factored(self.left.to(device), self.right.to(device))

    def add_to(self, out: torch.Tensor, coefficient: float) -> None:
        """``out += coefficient · τ``."""
        out.view(self.left.shape[0], -1).addmm_(self.left, self.right, alpha=coefficient)

    def dot(self, gradient: torch.Tensor) -> torch.Tensor:
        """``⟨gradient, τ⟩``, a scalar, without the product of the factors."""
        flat = gradient.reshape(self.left.shape[0], -1)
        return ((self.left.T @ flat) * self.right).sum()

    def add_parts(self, out: torch.Tensor, part: torch.Tensor, each: torch.Tensor) -> None:
        """As :meth:`Whole.add_parts`; some rows of the product exist at a time."""
        flat = out.view(-1)
        for start, stop, block in self._blocks():
            flat[start:stop].addcmul_(each[part[start:stop].long()], block.view(-1))

    def dot_parts(self, gradient: torch.Tensor, part: torch.Tensor, count: int) -> torch.Tensor:
        """As :meth:`Whole.dot_parts`."""
        import torch

        flat = gradient.reshape(-1)
        found = torch.zeros(count, dtype=flat.dtype, device=flat.device)
        for start, stop, block in self._blocks():
            found.index_add_(0, part[start:stop].long(), flat[start:stop] * block.view(-1))
        return found

    def _blocks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """``(first entry, past the last, rows of the product)``, one block after the other."""
        width = self.right.shape[1]
        rows = max(_ENTRIES // max(width, 1), 1)
        for row in range(0, self.left.shape[0], rows):
            block = self.left[row : row + rows] @ self.right
            yield row * width, row * width + block.numel(), block


Vector = Whole | Factored


def vector_of(delta: Delta, shape: Sequence[int], dtype: torch.dtype) -> Vector | None:
    """What is held of a displacement: factors in float32, else entries in ``dtype``."""
    import torch

    if isinstance(delta, LowRank):
        left, right = factors(delta, np.dtype(np.float32))
        return Factored(torch.from_numpy(left.copy()), torch.from_numpy(right.copy()))
    size = int(np.prod(shape, dtype=np.int64))
    return whole_of(tile(delta, 0, size, np.dtype(np.float32)), shape, dtype)


def whole_of(values: Array, shape: Sequence[int], dtype: torch.dtype) -> Whole | None:
    """Entries in ``dtype``; ``None`` if all are zero."""
    import torch

    if not values.any():
        return None
    whole = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(tuple(shape))
    narrow = whole.to(dtype)
    # What float16 cannot hold stays as it is.
    return Whole(narrow if bool(torch.isfinite(narrow).all()) else whole)
